"""The same verdicts on a GPU: right bakes pass, wrong ones are named, and one record comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from every_source import every_source
from so8tqc.config import BakeConfig, CaptureConfig, LongTextConfig, QCConfig
from so8tqc.errors import ToolError
from so8tqc.records import Record, Verdict
from so8tqc.rotations.enums import Convention
from so8tqc.rotations.read import read_rotations
from so8tqc.services.bake import bake
from so8tqc.services.capture import capture
from so8tqc.services.doctor import examine
from so8tqc.services.longtext.service import longtext
from so8tqc.services.qc.service import qc
from so8tqc.sources.attention import attention_entropy
from so8tqc.sources.capture import CaptureSource, open_capture
from so8tqc.sources.compare import compare
from so8tqc.sources.folded import FoldedSource
from so8tqc.sources.gated import GatedSource
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.placement import on_cpu
from so8tqc.sources.protocol import EncodedText, LogitSource
from so8tqc.sources.temperatures import walk_temperatures

pytestmark = pytest.mark.gpu

TOKENS = np.random.default_rng(0).integers(3, 500, 300)
O_PROJ = "model.layers.1.self_attn.o_proj.weight"

Baked = tuple[Path, Path, Path]


def judged(
    base: Path, gates: Path, candidate: Path, texts: Path, out: Path, **options: Any
) -> Record:
    return qc(
        QCConfig(
            reference=base,
            rotations=gates,
            candidates=(candidate,),
            data=(str(texts),),
            out=out,
            max_tokens=64,
            resamples=200,
            **options,
        )
    )


def failures(record: Record) -> list[tuple[str, float | None, float | None]]:
    return [(c.id, c.value, c.limit) for c in record.checks if c.verdict is not Verdict.PASS]


def table(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "tokens.npz", allow_pickle=False) as stored:
        return dict(stored)


def logits(source: LogitSource) -> torch.Tensor:
    return torch.cat([block.clone() for block in source.logits(TOKENS, 100)])


def test_the_model_computes_on_the_gpu_in_bfloat16(llama: Path) -> None:
    model = HFModel.load(llama)
    (block,) = HFSource(model, "plain").logits(TOKENS, 300)
    assert (block.device.type, block.dtype) == ("cuda", torch.bfloat16)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "qwen2_vl", "phi3"])
@pytest.mark.parametrize("dtype", [None, "float32", "float64"])
def test_a_right_bake_passes(
    architecture: str,
    dtype: str | None,
    make_model: Callable[..., Path],
    make_gates: Callable[..., Path],
    texts_file: Path,
    tmp_path: Path,
) -> None:
    base = make_model(architecture)
    gates = make_gates(base, seed=7)
    bake(BakeConfig(base=base, rotations=gates, out=tmp_path / "baked"))
    options = {} if dtype is None else {"compute_dtype": dtype}
    record = judged(base, gates, tmp_path / "baked", texts_file, tmp_path / "qc", **options)
    assert failures(record) == []
    assert record.diagnosis == ()


def test_statistics_beside_the_passes_are_those_between_them(
    baked: Baked, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, gates, candidate = baked
    generator = np.random.default_rng(3)
    texts = [EncodedText(str(i), generator.integers(3, 500, 20 + 40 * (i % 12))) for i in range(60)]
    model, rotations = HFModel.load(base), read_rotations(gates)
    walked = [
        GatedSource(model, rotations, "a"),
        FoldedSource(model, rotations, "b", None),
        HFSource(model, "c"),
        HFSource(HFModel.load(candidate), "d"),
    ]
    pairs = [("a", "b"), ("a", "c"), ("a", "d")]
    monkeypatch.setattr("so8tqc.sources.compare.head_rows", lambda _v: 70)
    beside = compare(walked, pairs, texts)
    monkeypatch.setattr("so8tqc.sources.compare.beside_the_models", nullcontext)
    between = compare(walked, pairs, texts)
    for pair in pairs:
        for name, values in between[pair].columns.items():
            np.testing.assert_array_equal(beside[pair].columns[name], values, err_msg=name)


def unrotated_block(base: Path, baked: Path) -> None:
    path = baked / "model.safetensors"
    tensors = load_file(str(path))
    tensors[O_PROJ][:, 8:16] = load_file(str(base / "model.safetensors"))[O_PROJ][:, 8:16]
    save_file(tensors, str(path), metadata={"format": "pt"})


@pytest.mark.parametrize("fault", ["transposed", "not_baked", "foreign_edit"])
def test_a_wrong_bake_fails_and_is_named(
    fault: str, baked: Baked, texts_file: Path, tmp_path: Path
) -> None:
    base, gates, candidate = baked
    if fault == "transposed":
        candidate = tmp_path / "transposed"
        bake(BakeConfig(base=base, rotations=gates, out=candidate, convention=Convention.ROW))
    elif fault == "not_baked":
        candidate = base
    else:
        unrotated_block(base, candidate)
    record = judged(base, gates, candidate, texts_file, tmp_path / "qc")
    assert record.verdict is Verdict.FAIL
    assert {diagnosis.code for diagnosis in record.diagnosis} == {fault}, record.diagnosis
    # the logits alone show it, too: the noise of bfloat16 hides no such fault
    assert record.check("kl.mean").verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("dtype", "nll", "kl"), [("float64", 1e-5, 1e-3), ("float32", 1e-4, 0.1), (None, 0.05, None)]
)
def test_numbers_are_those_of_the_cpu(
    dtype: str | None,
    nll: float,
    kl: float | None,
    baked: Baked,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against float64 on the CPU; of bfloat16 only that its noise is small beside the effect.

    Even in float64 transformers takes norms and rotary angles in float32.
    """
    options = {} if dtype is None else {"compute_dtype": dtype}
    here = judged(*baked, texts_file, tmp_path / "gpu", **options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    there = judged(*baked, texts_file, tmp_path / "cpu", compute_dtype="float64")
    got, expected = table(tmp_path / "gpu"), table(tmp_path / "cpu")
    assert got.keys() == expected.keys()
    for name in ("baked/nll_reference", "baked/nll_candidate"):
        np.testing.assert_allclose(got[name], expected[name], atol=nll, rtol=0)
    values = [record.check("kl.mean").value for record in (here, there)]
    if kl is not None:
        assert values[0] == pytest.approx(values[1], rel=kl)
    effects = [record.check("effect.kl").value for record in (here, there)]
    assert effects[0] == pytest.approx(effects[1], rel=0.05 if dtype is None else 1e-3)
    assert values[0] is not None
    assert effects[0] is not None
    assert values[0] < 0.05 * effects[0]


def test_a_capture_made_on_the_gpu_is_read_on_the_cpu(
    baked: Baked, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, gates, candidate = baked
    path = tmp_path / "reference.safetensors"
    capture(
        CaptureConfig(model=base, rotations=gates, data=(str(texts_file),), out=path, max_tokens=64)
    )
    recorded = open_capture(path)
    text = recorded.texts[0]
    (live,) = GatedSource(HFModel.load(base), read_rotations(gates), "x").logits(text.tokens, 999)
    (stored,) = CaptureSource(recorded, "recorded").logits(text.tokens, 999)
    assert torch.equal(stored, on_cpu(live).to(stored.dtype))
    record = qc(
        QCConfig(
            reference=path,
            base=base,
            rotations=gates,
            candidates=(candidate,),
            out=tmp_path / "qc",
            resamples=200,
        )
    )
    assert record.check("kl.mean").verdict is Verdict.PASS, failures(record)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sources = [
        CaptureSource(open_capture(path), "a"),
        GatedSource(HFModel.load(base), read_rotations(gates), "b"),
    ]
    (found,) = compare(sources, [("a", "b")], recorded.texts).values()
    assert found.columns["kl"].mean() < 1e-3


def little(dtype: str) -> dict[int | str, int]:
    """Bytes that accelerate may use: two embeddings and a layer on the GPU, two layers beside."""
    scale = 2 if dtype == "float32" else 1
    return {0: 212_000 * scale, "cpu": 142_500 * scale}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_spread_over_gpu_memory_and_disk_give_the_same_logits(
    kind: str, dtype: str, make_model: Callable[..., Path], make_gates: Callable[..., Path]
) -> None:
    base = make_model(kind, dtype)
    gates = make_gates(base)
    whole = HFModel.load(base, dtype=dtype)
    spread = HFModel.load(base, dtype=dtype, device_map="auto", max_memory=little(dtype))
    places = set(spread.module.hf_device_map.values())
    assert {0, "cpu"} <= places, spread.module.hf_device_map
    assert kind != "qwen2" or "disk" in places  # whose head is not its embedding, and needs room
    theirs = every_source(spread, gates)
    values = {}
    for name, source in every_source(whole, gates).items():
        values[name] = logits(source)
        assert torch.equal(logits(theirs[name]).to(values[name].device), values[name]), name
    assert not torch.equal(values["gated"], values["plain"])
    assert torch.equal(values["plain again"], values["plain"])
    spread.close()


def test_a_spread_model_is_judged_alike(
    baked: Baked, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = judged(*baked, texts_file, tmp_path / "plain")
    load = HFModel.load

    def capped(path: Path, **options: Any) -> HFModel:
        return load(path, **options, max_memory=little("bfloat16"))

    monkeypatch.setattr("so8tqc.services.qc.models.HFModel.load", capped)
    spread = judged(*baked, texts_file, tmp_path / "spread", device_map="auto")
    assert [(c.id, c.value, c.verdict) for c in spread.checks] == [
        (c.id, c.value, c.verdict) for c in plain.checks
    ]


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", "-m"],
        ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"],
    ],
)  # fmt: skip
def test_two_processes_share_a_gpu_and_give_the_record_of_one(
    launcher: list[str], baked: Baked, texts_file: Path, tmp_path: Path
) -> None:
    base, gates, candidate = baked
    records, tokens = [], []
    for number, start in enumerate((["-m"], launcher)):
        out = tmp_path / f"qc{number}"
        done = subprocess.run(
            [
                sys.executable,
                *start,
                "so8tqc",
                "qc",
                "--reference",
                str(base),
                "--rotations",
                str(gates),
                "--candidate",
                str(candidate),
                "--data",
                str(texts_file),
                "--out",
                str(out),
                "--json",
            ],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stderr
        record = json.loads((out / "record.json").read_text())
        records.append({k: v for k, v in record.items() if k not in ("run", "config")})
        tokens.append(table(out))
    assert records[0] == records[1]
    for name, values in tokens[0].items():
        np.testing.assert_array_equal(values, tokens[1][name])


def test_longtext_runs_on_the_gpu(baked: Baked, long_texts: Path, tmp_path: Path) -> None:
    base, gates, candidate = baked
    record = longtext(
        LongTextConfig(
            model=candidate,
            reference=base,
            rotations=gates,
            data=(str(long_texts),),
            out=tmp_path / "out",
            resamples=200,
            min_tokens=256,
            max_new_tokens=40,
            png=False,
        )
    )
    assert record.check("phase.layer0").value == 0.0
    assert {c.id for c in record.checks if c.verdict is Verdict.FAIL} == set(), failures(record)


def test_entropies_are_those_of_the_cpu(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cuda in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        model = HFModel.load(llama, dtype="float32")
        with attention_entropy(model) as collector:
            model.hidden(TOKENS)
        found.append(collector.array())
    np.testing.assert_allclose(found[0], found[1], atol=2e-4)


def test_temperatures_are_walked_on_a_model_directory(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [EncodedText("t", TOKENS)]
    found = []
    for cuda, dtype in ((True, "float64"), (False, "float64"), (True, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        source = HFSource(HFModel.load(llama, dtype=dtype), "x")
        found.append(walk_temperatures(source, texts, (0.5, 3.0)).at(1.3).nll.mean())
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert found[2] == pytest.approx(found[1], rel=1e-2)


def test_the_doctor_says_where_logits_are_compared() -> None:
    (found,) = (finding for finding in examine() if finding.name == "gpu")
    assert found.ok
    assert found.value.startswith(torch.cuda.get_device_name())


def test_too_little_gpu_memory_is_one_message(llama: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(ToolError, match=r"GPU's memory does not suffice for .* --device-map"):
            _ = [HFModel.load(llama) for _ in range(300)]  # 75 MB
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
