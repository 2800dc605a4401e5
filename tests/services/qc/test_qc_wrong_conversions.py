"""Files that were converted wrongly, in qc: each has its own row, and is said what it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest

from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.config import ExportConfig, QCConfig
from so8tqc.gguf.rewrite import changed_copy, rewrite
from so8tqc.llama.vendor import is_vendored
from so8tqc.records import Diagnosis, Record, Verdict
from so8tqc.services.export.service import export
from so8tqc.services.qc.conversion import conversion_fault
from so8tqc.services.qc.service import qc

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]


@pytest.fixture(scope="module")
def converted(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A tiny Llama and its F16 file."""
    model, out = make_model("llama"), tmp_path_factory.mktemp("converted") / "right-F16.gguf"
    record = export(ExportConfig(model=model, out=out, type="f16"))
    assert record.verdict is Verdict.PASS
    return model, out


def judged(model: Path, files: Sequence[Path], folder: Path) -> Record:
    return qc(
        QCConfig(
            reference=model,
            candidates=tuple(files),
            out=folder / "qc",
            data=("builtin:validation",),
            max_tokens=128,
            resamples=100,
        )
    )


def said_of(record: Record, name: str) -> list[Diagnosis]:
    return [found for found in record.diagnosis if name in found.text]


def test_a_file_that_libllama_cannot_load_fails_and_the_others_are_judged(
    converted: tuple[Path, Path], tmp_path: Path
) -> None:
    """It lacks a tensor, so that only loading it shows that it cannot be run."""
    model, right = converted
    broken = tmp_path / "broken.gguf"
    writer = gguf.GGUFWriter(str(broken), "llama")
    reader = gguf.GGUFReader(str(right))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = field.types
            sub = kinds[-1] if kinds[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kinds[0], sub_type=sub)
    for tensor in reader.tensors:
        if tensor.name != "blk.1.ffn_up.weight":
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    record = judged(model, [broken, right], tmp_path)
    (run,) = [check for check in record.checks if check.id == "logits.run"]
    assert (run.subject, run.verdict) == ("broken.gguf", Verdict.FAIL)
    assert "libllama cannot load it" in run.detail
    assert record.verdict is Verdict.FAIL
    assert record.check("kl.mean", "right-F16.gguf").verdict is Verdict.PASS
    candidates = record.metrics["candidates"]
    assert isinstance(candidates, dict)
    assert set(candidates) == {"right-F16.gguf"}
    assert not [c for c in record.checks if c.subject == "broken.gguf" and c.id == "kl.mean"]


def test_rows_that_were_not_permuted_are_named(
    converted: tuple[Path, Path], tmp_path: Path
) -> None:
    """The rows of keys in layer 1 as transformers orders them: libllama turns other pairs."""
    model, right = converted
    data = {t.name: t.data for t in gguf.GGUFReader(str(right)).tensors}["blk.1.attn_k.weight"]
    heads, half = 2, len(data) // 4
    back = data.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(data.shape)
    wrong = tmp_path / "unpermuted.gguf"
    rewrite(right, wrong, {}, {"blk.1.attn_k.weight": lambda: iter([back.astype(np.float32)])})
    record = judged(model, [wrong], tmp_path)
    assert record.check("kl.mean").verdict is Verdict.FAIL
    assert not [d for d in record.diagnosis if d.code == "storage_rounding"]
    (found,) = said_of(record, "blk.1.attn_k.weight")
    assert "order" in found.text
    assert "unpermuted.gguf" in found.text
    said = conversion_fault(wrong, open_checkpoint(model), ())
    assert said.endswith("its source is blk.1.attn_k.weight")


def test_a_wrong_key_is_named(converted: tuple[Path, Path], tmp_path: Path) -> None:
    """Every tensor is right; positions turn by other angles."""
    model, right = converted
    wrong = tmp_path / "rope.gguf"
    changed_copy(right, wrong, {"llama.rope.freq_base": 100.0})
    record = judged(model, [wrong], tmp_path)
    assert record.check("kl.mean").verdict is Verdict.FAIL
    (found,) = said_of(record, "rope.gguf")
    assert found.code == "conversion"
    assert "llama.rope.freq_base" in found.text
