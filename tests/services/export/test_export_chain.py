"""Bake → export → proof → logits, by the real converter and libllama, on every architecture."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file

from so8tqc.checkpoints.provenance import read_provenance
from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.config import BakeConfig, ExportConfig, QuantizeConfig
from so8tqc.errors import MissingToolError
from so8tqc.gguf.file import GGUFFile, open_gguf
from so8tqc.gguf.rewrite import changed_copy, rewrite
from so8tqc.llama.vendor import is_vendored
from so8tqc.progress import Progress
from so8tqc.records import Check, Record, Verdict
from so8tqc.services.bake import bake
from so8tqc.services.doctor import describe
from so8tqc.services.export import logits as export_logits
from so8tqc.services.export.logits import logits_checks, rounded, run_model
from so8tqc.services.export.service import export
from so8tqc.services.quantize import service as quantize_module

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]


@pytest.mark.parametrize(
    ("architecture", "type_", "stored"),
    [
        ("llama", "auto", "BF16"),
        ("mistral", "bf16", "BF16"),
        ("phi3", "f16", "F16"),
        ("qwen2", "q8_0", "Q8_0"),
        ("qwen3", "f32", "F32"),
        ("gemma3_text", "f16", "F16"),
        ("qwen2_vl", "q8_0", "Q8_0"),
    ],
)
def test_the_chain_keeps_what_was_baked_and_has_the_models_logits(
    architecture: str,
    type_: Any,
    stored: str,
    make_model: Callable[..., Path],
    make_gates: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base, baked, out = make_model(architecture), tmp_path / "tiny", tmp_path / "tiny.gguf"
    bake(BakeConfig(base=base, rotations=make_gates(base), out=baked, baked_dtype="float32"))
    record = export(ExportConfig(model=baked, out=out, type=type_, keep_f32=("baked",)))
    assert record.verdict is Verdict.PASS, [c.detail for c in record.checks]
    assert record.check("export.logits").verdict is Verdict.PASS
    provenance = read_provenance(baked)
    assert provenance is not None
    source = load_file(str(baked / "model.safetensors"))
    reader = gguf.GGUFReader(str(out))
    tensors = {t.name: t for t in reader.tensors}
    for tensor in provenance.tensors:
        kept = tensors[f"blk.{tensor.layer}.attn_output.weight"]
        assert kept.tensor_type is gguf.GGMLQuantizationType.F32
        np.testing.assert_array_equal(kept.data, source[tensor.name].numpy())
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == stored
    keys = {n: f.contents() for n, f in reader.fields.items() if n.startswith("so8t.")}
    assert keys == {
        "so8t.baked": True,
        "so8t.convention": "column",
        "so8t.parametrization": "exp",
        "so8t.site": "input",
        "so8t.rotations.fingerprint": provenance.rotations_fingerprint,
        "so8t.base.fingerprint": provenance.base_fingerprint,
        "so8t.version": provenance.versions["so8tqc"],
    }
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["gates.safetensors", "tiny", "tiny.gguf", "tiny.gguf.log"]


class Followed(Progress):
    """Keeps what it is told about each task."""

    def __init__(self) -> None:
        self.items: dict[str, list[str | None]] = {}
        self.amounts: dict[str, float] = {}

    def task(self, description: str, total: float | None = None, unit: str = "") -> Any:
        import contextlib

        followed = self

        class Task:
            def advance(self, amount: float = 1.0, item: str | None = None) -> None:
                followed.items.setdefault(description, []).append(item)
                followed.amounts[description] = followed.amounts.get(description, 0) + amount

        return contextlib.nullcontext(Task())


@pytest.fixture(scope="module")
def exported(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Record, Followed]:
    """A tiny Llama, its F16 file, the record, and the progress of its export."""
    folder = tmp_path_factory.mktemp("exported")
    model, progress = make_model("llama"), Followed()
    record = export(ExportConfig(model=model, out=folder / "x.gguf"), progress)
    return model, folder / "x.gguf", record, progress


def test_progress_follows_the_converter(exported: tuple[Path, Path, Record, Followed]) -> None:
    _, _, record, progress = exported
    assert record.verdict is Verdict.PASS
    assert "blk.2.ffn_down.weight" in progress.items["converting to GGUF"]
    assert progress.amounts["converting to GGUF"] == 100


def _logits(model: Path, file: GGUFFile) -> Check:
    return logits_checks(run_model(open_checkpoint(model)), file)[0]


def test_a_wrong_key_is_found_by_running_the_file(
    exported: tuple[Path, Path, Record, Followed], tmp_path: Path
) -> None:
    """Every tensor is right; the rope is not."""
    model, out, record, _ = exported
    target = tmp_path / "x.gguf"
    changed_copy(out, target, {"llama.rope.freq_base": 100.0})
    check = _logits(model, open_gguf(target))
    assert check.verdict is Verdict.FAIL
    right = record.check("export.logits")
    assert right.value is not None
    assert check.limit == right.limit  # measured without the file's own values
    assert check.value > 100 * right.value


def test_two_layers_exchanged_are_found_by_running_the_file(
    exported: tuple[Path, Path, Record, Followed], tmp_path: Path
) -> None:
    model, out, _, _ = exported
    tensors = {t.name: t for t in gguf.GGUFReader(str(out)).tensors}
    names = ["blk.0.attn_output.weight", "blk.2.attn_output.weight"]
    swapped = {
        a: lambda b=b: iter([tensors[b].data.astype(np.float32)])
        for a, b in zip(names, reversed(names), strict=True)
    }
    rewrite(out, tmp_path / "x.gguf", {}, swapped)
    assert _logits(model, open_gguf(tmp_path / "x.gguf")).verdict is Verdict.FAIL


def test_a_file_that_libllama_cannot_load_fails_with_its_words(
    exported: tuple[Path, Path, Record, Followed], tmp_path: Path
) -> None:
    model, out, _, _ = exported
    rewrite(out, tmp_path / "x.gguf", {"general.architecture": "lama"}, {})
    check = _logits(model, open_gguf(tmp_path / "x.gguf"))
    assert check.verdict is Verdict.FAIL
    assert "libllama cannot load it" in check.detail
    assert "lama" in check.detail


def test_a_file_of_another_vocabulary_fails(
    exported: tuple[Path, Path, Record, Followed], tmp_path: Path
) -> None:
    from tiny_gguf import write_llama

    check = _logits(exported[0], open_gguf(write_llama(tmp_path / "x.gguf")))
    assert check.verdict is Verdict.FAIL


def test_what_cannot_be_run_is_skipped_with_the_reason(
    exported: tuple[Path, Path, Record, Followed],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    model = exported[0]
    unknown = tmp_path / "unknown"
    shutil.copytree(model, unknown)
    (unknown / "config.json").write_text('{"model_type": "nobody_knows"}')
    reasons = [run_model(open_checkpoint(unknown))]
    monkeypatch.setattr(export_logits, "_memory_available", lambda: 1000)
    reasons.append(run_model(open_checkpoint(model)))

    def missing() -> None:
        raise MissingToolError("libllama is not available", remedy="Run: pip install it")

    monkeypatch.setattr(export_logits, "bindings", missing)
    reasons.append(run_model(open_checkpoint(model)))
    for reason, says in zip(reasons, ["no reference", "memory", "pip install"], strict=True):
        assert isinstance(reason, Check)
        assert reason.verdict is Verdict.SKIP
        assert says in reason.detail
        assert logits_checks(reason, open_gguf(exported[1])) == [reason]


@given(
    arrays(np.float32, (3, 64), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from(["F16", "BF16", "Q8_0", "F32"]),
)
def test_rounding_is_that_of_the_stored_types(values: np.ndarray, type_: str) -> None:
    """gguf-py is the oracle; both forms round to nearest, ties apart."""
    kind = gguf.GGMLQuantizationType[type_]
    expected = dequantize(quantize(values, kind), kind).reshape(values.shape)
    ours = rounded(torch.from_numpy(values), type_).numpy()
    if type_ == "Q8_0":  # gguf-py rounds half away from zero, torch half to even: one step
        step = np.abs(values).reshape(-1, 32).max(axis=1).repeat(32).reshape(values.shape) / 127
        assert (np.abs(ours - expected) <= 1.001 * step + 1e-30).all()
        assert (np.abs(ours - values) <= 0.501 * step + 6e-5 * np.abs(values) * 20 + 1e-4).all()
    else:
        np.testing.assert_array_equal(ours, expected)


def test_provenance_survives_quantization_and_doctor_shows_it(
    make_model: Callable[..., Path], make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    base, baked, out = make_model("llama"), tmp_path / "tiny", tmp_path / "tiny-F16.gguf"
    bake(BakeConfig(base=base, rotations=make_gates(base), out=baked, verify=False))
    assert export(ExportConfig(model=baked, out=out)).verdict is Verdict.PASS
    quantize_module.quantize(QuantizeConfig(gguf=out, out=tmp_path / "q", types=("Q4_K_M",)))
    shown = []
    for path in (out, tmp_path / "q" / "tiny-Q4_K_M.gguf"):
        found = {f.name: f.value for f in describe(path)}
        shown.append({k: v for k, v in found.items() if k.startswith("so8t.")})
    assert shown[0] == shown[1]
    provenance = read_provenance(baked)
    assert provenance is not None
    assert shown[0]["so8t.rotations.fingerprint"] == provenance.rotations_fingerprint
    assert "so8t.base.fingerprint" not in shown[0]  # a bake without verification has not read it


def test_doctor_says_that_a_file_is_not_known_to_be_baked(
    exported: tuple[Path, Path, Record, Followed],
) -> None:
    found = {f.name: f.value for f in describe(exported[1])}
    assert found["baked"].startswith("no so8t.baked")
