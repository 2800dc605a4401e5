"""Anything may be given to ``check``: it is recognised by content, and pointed on."""

from __future__ import annotations

import gzip
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from so8tqc.cli.main import run as run_main
from so8tqc.services.check.others import OTHERS
from so8tqc.services.check.recognise import Kind, recognise
from tiny_gguf import write_llama

PNG = b"\x89PNG\r\n\x1a\n" + bytes(32)


def header(path: Path, architecture: str, keys: dict[str, str], tensors: int = 1) -> Path:
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in keys.items():
        writer.add_string(key, value)
    for i in range(tensors):
        writer.add_tensor(f"a{i}.weight", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def cut(path: Path) -> Path:
    whole = write_llama(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def folder(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(content)
    return path


def zipped(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.txt", "x")
    return path


def torch_file(path: Path) -> Path:
    torch.save({"layers.0.rotation_gate.theta": torch.zeros(8, 8, 8)}, path)
    return path


def gates(path: Path) -> Path:
    save_file({"layers.0.rotation_gate.theta": torch.zeros(8, 8, 8)}, str(path))
    return path


def tensors(path: Path) -> Path:
    save_file({"something": torch.zeros(4)}, str(path))
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def adapter(path: Path) -> Path:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base"}
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.o_proj"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(64, 2)},
        str(path / "adapter_model.safetensors"),
    )
    return path


def capture(path: Path) -> Path:
    save_file(
        {"tokens.0": torch.tensor([1, 2, 3]), "logits.0": torch.randn(3, 8)},
        str(path),
        metadata={"so8t.capture_version": "1"},
    )
    return path


def record(path: Path) -> Path:
    content = {
        "schema_version": 1, "kind": "export", "verdict": "pass", "checks": [],
        "run": {"started": "2026-01-01T00:00:00Z", "seconds": 1.0},
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def temperature(path: Path) -> Path:
    content = {
        "temperature": 1.1, "fitted": 1.1, "objective": "nll",
        "model": {"file": "gone.gguf", "sha256": "0" * 64},
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def archived(path: Path) -> Path:
    with tarfile.open(path, "w:gz"):
        pass
    return path


Maker = Callable[[Path], Path]
MODEL_CONFIG = b'{"model_type": "llama"}'

CASES: dict[str, tuple[Maker, Kind, int, str]] = {
    # name → how it is made in a folder, what it is, the exit code, a word of the answer
    "missing": (lambda d: d / "nope.gguf", Kind.MISSING, 3, "no file"),
    "empty file": (lambda d: written(d / "x.gguf", b""), Kind.EMPTY, 3, "no byte"),
    "empty folder": (lambda d: folder(d / "x"), Kind.EMPTY, 3, "no file"),
    "gguf": (lambda d: write_llama(d / "x.gguf"), Kind.GGUF, 0, "GGUF model, llama"),
    "gguf, other name": (lambda d: write_llama(d / "x.bin"), Kind.GGUF, 0, "GGUF model"),
    "gguf, cut": (lambda d: cut(d / "x.gguf"), Kind.GGUF_BROKEN, 3, "cut off"),
    "text as gguf": (lambda d: written(d / "x.gguf", b"hello"), Kind.UNKNOWN, 3, "no GGUF file"),
    "projector": (
        lambda d: header(d / "mmproj.gguf", "clip", {"general.type": "mmproj"}),
        Kind.GGUF_PROJECTOR, 0, "mmproj",
    ),
    "lora as gguf": (
        lambda d: header(
            d / "l.gguf", "llama", {"general.type": "adapter", "adapter.type": "lora"}
        ),
        Kind.GGUF_ADAPTER, 0, "LORA adapter as GGUF",
    ),
    "importance": (
        lambda d: header(d / "i.gguf", "imatrix", {"general.type": "imatrix"}),
        Kind.GGUF_IMPORTANCE, 0, "importance matrix",
    ),
    "vocabulary": (
        lambda d: header(d / "v.gguf", "llama", {"tokenizer.ggml.model": "gpt2"}, 0),
        Kind.GGUF_VOCABULARY, 3, "vocabulary without weights",
    ),
    "torch file": (lambda d: torch_file(d / "g.pt"), Kind.GATES, 0, "1 rotation gate"),
    "pickle": (
        lambda d: written(d / "p.bin", pickle.dumps({"a": 1})), Kind.GATES, 3, "nothing was run",
    ),
    "code in a pickle": (
        lambda d: written(d / "p.pt", b"cos\nsystem\n(S'true'\ntR."), Kind.TEXT, 3, "text",
    ),
    "gates": (lambda d: gates(d / "g.safetensors"), Kind.GATES, 0, "1 rotation gate"),
    "tensors": (lambda d: tensors(d / "t.safetensors"), Kind.WEIGHTS, 3, "called a gate"),
    "cut safetensors": (
        lambda d: written(d / "t.safetensors", tensors(d / "u.safetensors").read_bytes()[:-4]),
        Kind.UNKNOWN, 3, "cut off or damaged",
    ),
    "capture": (lambda d: capture(d / "c.safetensors"), Kind.CAPTURE, 0, "recorded logits"),
    "adapter": (lambda d: adapter(d / "lora"), Kind.ADAPTER, 0, "LORA"),
    "record": (lambda d: record(d / "record.json"), Kind.RECORD, 0, "so8tqc export"),
    "directory of a command": (
        lambda d: record(folder(d / "x") / "record.json").parent, Kind.STAGE, 0, "so8tqc export",
    ),
    "temperature": (lambda d: temperature(d / "t.json"), Kind.TEMPERATURE, 3, "gone.gguf"),
    "tokenizer": (
        lambda d: folder(d / "x", tokenizer__json=b"{}"), Kind.TOKENIZER, 3, "tokenizer",
    ),
    "weightless": (
        lambda d: folder(d / "x", config__json=MODEL_CONFIG), Kind.WEIGHTLESS, 3, "no weights",
    ),
    "index": (
        lambda d: written(d / "x.index.json", b'{"weight_map": {}}'), Kind.INDEX, 3, "directory",
    ),
    "config": (
        lambda d: written(d / "config.json", MODEL_CONFIG), Kind.CONFIG, 3, "configuration",
    ),
    "yaml": (lambda d: written(d / "run.yaml", b"base: x\n"), Kind.CONFIG, 3, "config check"),
    "text": (lambda d: written(d / "x.txt", "長い".encode()), Kind.TEXT, 3, "text"),
    "json list": (lambda d: written(d / "x.json", b'["a"]'), Kind.TEXT, 3, "JSON list"),
    "broken json": (lambda d: written(d / "x.json", b'{"a": '), Kind.TEXT, 3, "text"),
    "jsonl": (lambda d: written(d / "x.jsonl", b'{"text": "a"}\n{}\n'), Kind.TEXT, 3, "lines"),
    "picture": (lambda d: written(d / "x.png", PNG), Kind.PICTURES, 3, "picture"),
    "pictures": (
        lambda d: folder(d / "x", a__png=PNG, b__jpg=PNG), Kind.PICTURES, 3, "2 pictures",
    ),
    "texts": (lambda d: folder(d / "x", a__txt=b"a", b__md=b"b"), Kind.TEXT, 3, "2 text files"),
    "zip": (lambda d: zipped(d / "x.zip"), Kind.ARCHIVE, 3, "unpack"),
    "gzip": (
        lambda d: written(d / "x.gguf.gz", gzip.compress(b"GGUF")), Kind.ARCHIVE, 3, "unpack",
    ),
    "tar.gz": (lambda d: archived(d / "x.tar.gz"), Kind.ARCHIVE, 3, "unpack"),
    "binary": (lambda d: written(d / "x", bytes(range(256))), Kind.UNKNOWN, 3, "not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_recognised_judged_and_pointed_on(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, kind, code, word = CASES[name]
    path = make(tmp_path)
    assert recognise(path).kind is kind
    assert run_main(["check", str(path), "--json", "--quiet"]) == code
    found = json.loads(capsys.readouterr().out)
    metrics = found["metrics"]
    assert word in f"{metrics['what']} {metrics['trust']} {metrics['unseen']} {metrics['next']}"
    assert path.name in metrics["what"]
    assert metrics["next"]
    assert metrics["proved"] is False
    assert found["verdict"] == {0: "pass", 3: "skip" if metrics["readable"] else "fail"}[code]


def test_every_kind_is_judged_by_something() -> None:
    assert set(Kind) == set(OTHERS) | {Kind.GGUF, Kind.MODEL}


def test_a_later_part_stands_for_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two parts, as llama.cpp names them; the second is given."""
    whole = gguf.GGUFReader(str(write_llama(tmp_path / "whole.gguf")))
    names = [tensor.name for tensor in whole.tensors]
    for number, chosen in ((0, names[:4]), (1, names[4:])):
        writer = gguf.GGUFWriter(str(tmp_path / f"m-{number + 1:05d}-of-00002.gguf"), "llama")
        writer.add_embedding_length(32)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(names))
        for tensor in whole.tensors:
            if tensor.name in chosen:
                writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    second = tmp_path / "m-00002-of-00002.gguf"
    assert run_main(["check", str(second), "--quiet", "--json"]) == 0
    what = json.loads(capsys.readouterr().out)["metrics"]["what"]
    assert "in 2 files" in what
    assert second.name in what
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    assert run_main(["check", str(second), "--quiet", "--json"]) == 3


def test_weights_that_are_no_numbers_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_llama(tmp_path / "x.gguf")
    reader = gguf.GGUFReader(str(path), "r+")
    reader.tensors[3].data[0, 0] = np.nan
    reader.data.flush()
    name = reader.tensors[3].name
    assert run_main(["check", str(path), "--quiet"]) == 1
    assert run_main(["check", str(path)]) == 1
    told = capsys.readouterr().out
    assert "Not to be trusted" in told
    assert name in told
