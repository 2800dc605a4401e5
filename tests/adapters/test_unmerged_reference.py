"""The reference is base and adapter, unmerged, run by PEFT: wherever rotations are accepted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft_cases import METHODS, adapter, logits, unmerged
from test_merges import pefts_merge
from typer.testing import CliRunner

from so8tqc.cli.app import app
from so8tqc.config import BakeConfig, CaptureConfig, LongTextConfig, QCConfig
from so8tqc.errors import MissingToolError
from so8tqc.records import Verdict
from so8tqc.rotations.options import RotationOptions
from so8tqc.services.bake import bake
from so8tqc.services.capture import capture
from so8tqc.services.longtext.service import longtext
from so8tqc.services.qc.service import qc
from so8tqc.sources.gated import GatedSource
from so8tqc.sources.hf import HFSource
from so8tqc.sources.unmerged import load_unmerged

IDS = np.arange(7, 31)


def source_logits(source: HFSource | GatedSource) -> torch.Tensor:
    return torch.cat(list(source.logits(IDS, 8)))


@pytest.mark.parametrize("method", METHODS)
def test_the_source_is_pefts_own_forward(method: str, make_model, tmp_path: Path) -> None:
    model = make_model("llama", "float32")
    directory = adapter(model, tmp_path / "a", method)
    loaded = load_unmerged(model, [directory], dtype="float32")
    got = source_logits(HFSource(loaded, "x")).double()
    expected = logits(unmerged(model, [directory], torch.float32), torch.from_numpy(IDS)[None])[0]
    assert float((got - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_qc_judges_a_bake_against_the_unmerged_forward(
    dtype: str, make_model, texts_file: Path, tmp_path: Path
) -> None:
    model = make_model("llama", dtype)
    directory = adapter(model, tmp_path / "a", "lora")
    bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))
    record = qc(
        QCConfig(
            reference=model,
            rotations=directory,
            candidates=(tmp_path / "m",),
            out=tmp_path / "qc",
            data=(str(texts_file),),
            max_tokens=48,
        )
    )
    assert record.verdict is Verdict.PASS, [c for c in record.checks if c.verdict is Verdict.FAIL]
    ids = {check.id for check in record.checks}
    assert {"effect.kl", "kl.mean", "logits.max_abs", "algebra.exact"} <= ids
    mean = next(check for check in record.checks if check.id == "kl.mean")
    assert mean.noise_floor is not None
    record = qc(
        QCConfig(
            reference=model,
            rotations=directory,
            candidates=(model,),
            out=tmp_path / "q2",
            data=(str(texts_file),),
            max_tokens=48,
        )
    )
    assert record.verdict is Verdict.FAIL
    assert [d.code for d in record.diagnosis] == ["not_baked"]


def test_qc_says_what_a_coarse_merge_costs(make_model, texts_file: Path, tmp_path: Path) -> None:
    model = make_model("llama", "bfloat16")
    directory = adapter(model, tmp_path / "a", "lora")
    candidate = pefts_merge(
        model, [directory], tmp_path / "m", torch.bfloat16, autocast_adapter_dtype=False
    )
    record = qc(
        QCConfig(
            reference=model,
            rotations=directory,
            candidates=(candidate,),
            out=tmp_path / "qc",
            data=(str(texts_file),),
            max_tokens=48,
        )
    )
    assert any("merged in 16-bit arithmetic: mean KL" in notice for notice in record.notices)


def test_gates_in_front_of_base_and_branch(
    make_model, make_gates, texts_file: Path, tmp_path: Path
) -> None:
    model = make_model("qwen3", "float32")
    directory, gates = adapter(model, tmp_path / "a", "lora"), make_gates(model)
    bake(BakeConfig(base=model, rotations=gates, adapters=(directory,), out=tmp_path / "m"))
    options = RotationOptions(adapters=(directory,))
    record = qc(
        QCConfig(
            reference=model,
            rotations=gates,
            rotation_options=options,
            candidates=(tmp_path / "m",),
            out=tmp_path / "qc",
            data=(str(texts_file),),
            max_tokens=48,
            compute_dtype="float64",
        )
    )
    assert record.verdict is Verdict.PASS, [c for c in record.checks if c.verdict is Verdict.FAIL]
    assert {"rotation.orthogonality", "kl.mean"} <= {c.id for c in record.checks}


@pytest.mark.parametrize(
    "kinds",
    [
        ("lora", "lora"),
        ("oft", "oft"),
        ("oft", "lora"),
        ("hra", "hra"),
        ("dora", "dora"),
        ("boft", "boft"),
        ("road", "road"),
    ],
)
def test_several_adapters_in_order(
    kinds: tuple[str, str], make_model, texts_file: Path, tmp_path: Path
) -> None:
    model = make_model("llama", "float32")
    pair = [adapter(model, tmp_path / f"a{i}", k, seed=i) for i, k in enumerate(kinds)]
    bake(BakeConfig(base=model, rotations=pair[0], adapters=(pair[1],), out=tmp_path / "m"))
    record = qc(
        QCConfig(
            reference=model,
            rotations=pair[0],
            rotation_options=RotationOptions(adapters=(pair[1],)),
            candidates=(tmp_path / "m",),
            out=tmp_path / "qc",
            data=(str(texts_file),),
            max_tokens=48,
            compute_dtype="float64",
            allow=("rotation.*",),
        )
    )
    failed = [c for c in record.checks if c.verdict is Verdict.FAIL]
    assert record.verdict is Verdict.PASS, failed


def test_capture_and_longtext(
    make_model, texts_file: Path, long_texts: Path, tmp_path: Path
) -> None:
    model = make_model("llama", "float32")
    directory = adapter(model, tmp_path / "a", "lora")
    out = tmp_path / "ref.safetensors"
    capture(
        CaptureConfig(
            model=model, rotations=directory, data=(str(texts_file),), out=out, max_tokens=48
        )
    )
    bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))
    record = qc(QCConfig(reference=out, candidates=(tmp_path / "m",), out=tmp_path / "qc"))
    kl = next(c for c in record.checks if c.id == "kl.mean")
    assert kl.verdict is Verdict.PASS
    config = LongTextConfig(
        model=tmp_path / "m",
        reference=model,
        rotations=directory,
        data=(str(long_texts),),
        out=tmp_path / "long",
        min_tokens=128,
        max_new_tokens=8,
        png=False,
        resamples=100,
    )
    record = longtext(config)
    (case,) = record.metrics["cases"].values()  # type: ignore[union-attr]
    assert case["kl_mean"] < 1e-6  # type: ignore[index,call-overload,operator]


def test_without_peft_the_command_says_what_to_install(
    make_model, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", "float32")
    directory = adapter(model, tmp_path / "a", "lora")
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a)
    )
    with pytest.raises(MissingToolError, match="so8tqc\\[adapters\\]"):
        load_unmerged(model, [directory])
    result = CliRunner().invoke(
        app,
        [
            "qc",
            "--reference",
            str(model),
            "--rotations",
            str(directory),
            "--candidate",
            str(model),
            "--data",
            str(texts_file),
            "--out",
            str(tmp_path / "qc"),
        ],
    )
    assert isinstance(result.exception, MissingToolError) or result.exit_code == 4
    # a bake reads the files alone
    bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))
