"""so8tqc audit: a stranger's file beside the model that it claims to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.cli.main import run
from so8tqc.config import ExportConfig
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.rewrite import changed_copy
from so8tqc.llama.vendor import is_vendored
from so8tqc.services.export.service import write_gguf
from so8tqc.services.tensors.expected import History, history_of
from so8tqc.services.tensors.metadata import differences, metadata_checks

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]


@pytest.fixture(scope="module")
def exported(make_model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, History]:
    model = make_model("llama")
    file = tmp_path_factory.mktemp("audit") / "tiny-F16.gguf"
    write_gguf(ExportConfig(model=model, out=file))
    return model, file, history_of(open_checkpoint(model))


def audited(file: Path, base: Path, out: Path, *more: str) -> tuple[int, dict]:
    code = run(["audit", str(file), "--base", str(base), "--out", str(out), "--quiet", *more])
    return code, json.loads((out / "record.json").read_text(encoding="utf-8"))


def test_an_honest_file_passes_and_an_edited_one_fails(
    exported: tuple[Path, Path, History], tmp_path: Path
) -> None:
    base, file, _ = exported
    code, record = audited(file, base, tmp_path / "good")
    assert (code, record["verdict"], record["diagnosis"]) == (0, "pass", [])
    assert record["kind"] == "audit"
    rows = record["metrics"]["tensors"]
    assert {row["verdict"] for row in rows} == {"exact"}
    assert len(rows) == len(open_gguf(file).tensors)
    assert "blk.0.attn_q.weight" in (tmp_path / "good" / "report.html").read_text(encoding="utf-8")

    tensor = open_gguf(file).tensors["blk.1.attn_v.weight"]
    content = bytearray(file.read_bytes())
    content[tensor.offset : tensor.offset + 2] = b"\x00\x40"  # the first weight becomes 2
    edited = tmp_path / "edited.gguf"
    edited.write_bytes(content)
    code, record = audited(edited, base, tmp_path / "bad")
    assert code == 1
    (told,) = record["diagnosis"]
    assert (told["code"], told["layers"]) == ("foreign_edit", [1])
    assert "blk.1.attn_v.weight: weight row 0, column 0: " in told["text"]


def test_keys_of_another_model_are_named_with_what_they_do(
    exported: tuple[Path, Path, History], tmp_path: Path
) -> None:
    _, file, history = exported
    assert history.conversion is not None
    assert history.conversion.keys is not None
    keys = history.conversion.keys
    assert differences(open_gguf(file), keys) == []
    changed = tmp_path / "changed.gguf"
    values = {
        "llama.rope.freq_base": 10500.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-4,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
        "general.name": "another",
    }
    changed_copy(file, changed, values)
    found = {d.key: d for d in differences(open_gguf(changed), keys)}
    assert found.keys() == values.keys() - {"general.name"}
    rope = found["llama.rope.freq_base"]
    assert (rope.here, rope.expected, rope.reaches_logits) == ("10500", "10000", True)
    assert "angles" in rope.sentence
    assert not found["tokenizer.chat_template"].reaches_logits
    (check,) = metadata_checks(open_gguf(changed), keys, "it")
    assert (check.value, check.verdict.value) == (3, "fail")


def test_a_key_that_says_the_default_may_be_missing(exported: tuple[Path, Path, History]) -> None:
    _, file, history = exported
    assert history.conversion is not None
    assert history.conversion.keys is not None
    gguf, keys = open_gguf(file), dict(history.conversion.keys)
    more = {"llama.attention.key_length": keys["llama.rope.dimension_count"],
            "llama.rope.scaling.factor": b"\x06\x00\x00\x00\x00\x00\x80\x3f"}  # fmt: skip
    assert differences(gguf, keys | more) == []
    more["llama.rope.scaling.factor"] = b"\x06\x00\x00\x00\x00\x00\x00\x40"
    assert [d.key for d in differences(gguf, keys | more)] == ["llama.rope.scaling.factor"]


def test_a_file_that_is_no_gguf_is_bad_input(tmp_path: Path, make_model) -> None:
    model = make_model("llama")
    out = str(tmp_path / "out")
    assert run(["audit", str(model), "--base", str(model), "--out", out]) == 3
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert run(["audit", str(tmp_path / "a.gguf"), "--base", str(model), "--out", out]) == 3
