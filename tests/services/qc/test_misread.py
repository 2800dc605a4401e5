"""qc with rotations that are read wrongly, or a bake by a wrong reading: the remedy is one command,
and typing it mends what was found."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from so8tqc.cli.main import run as run_main
from so8tqc.config import BakeConfig, QCConfig
from so8tqc.records import Record, Verdict
from so8tqc.reports.advice import next_steps
from so8tqc.rotations.options import RotationOptions
from so8tqc.services.bake import bake
from so8tqc.services.qc.service import qc

SCALE = 0.15


def reading(parametrization: str, convention: str, site: str) -> dict[str, str]:
    return {"parametrization": parametrization, "convention": convention, "site": site}


TRAINED = reading("cayley", "row", "output")
WRONG = reading("exp", "column", "input")


def flags(facts: dict[str, str]) -> str:
    return " ".join(f"--{fact} {word}" for fact, word in facts.items())


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    """A checkpoint that states nothing."""
    draw = torch.Generator().manual_seed(0)
    path = tmp_path / "gates.pt"
    torch.save(
        {
            f"model.layers.{i}.rotation_gate.theta": torch.randn(8, 8, 8, generator=draw) * SCALE
            for i in range(3)
        },
        path,
    )
    return path


@pytest.fixture
def recording(llama: Path, gates: Path, texts_file: Path, tmp_path: Path) -> Path:
    """Logits of the training: x_row·R after each projection, R by Cayley, in torch alone."""
    model = AutoModelForCausalLM.from_pretrained(str(llama), dtype=torch.float32).eval()
    for layer, theta in zip(
        model.model.layers, torch.load(gates, weights_only=True).values(), strict=True
    ):
        a, one = theta - theta.mT, torch.eye(8)
        r = torch.block_diag(*torch.linalg.solve(one - a / 2, one + a / 2))
        layer.self_attn.o_proj.register_forward_hook(lambda _m, _a, out, r=r: out @ r)
    tokenizer = AutoTokenizer.from_pretrained(str(llama))
    tensors = {}
    with torch.inference_mode():
        for i, line in enumerate(texts_file.read_text(encoding="utf-8").splitlines()):
            ids = torch.tensor(tokenizer(line)["input_ids"][:48])
            tensors[f"tokens.{i}"] = ids
            tensors[f"logits.{i}"] = model(ids[None]).logits[0].clone()
    path = tmp_path / "recorded.safetensors"
    save_file(tensors, str(path), metadata={"so8t.capture_version": "1"})
    return path


def baked(llama: Path, gates: Path, out: Path, facts: dict[str, str]) -> Path:
    bake(BakeConfig(base=llama, rotations=gates, out=out, baked_dtype="float32", **facts))  # type: ignore[arg-type]
    return out


def judged(
    recording: Path, llama: Path, gates: Path, candidate: Path, facts: dict[str, str]
) -> Record:
    return qc(
        QCConfig(
            reference=recording,
            base=llama,
            rotations=gates,
            candidates=(candidate,),
            rotation_options=RotationOptions(**facts),  # type: ignore[arg-type]
            out=candidate.with_suffix(".qc"),
            resamples=100,
        )  # type: ignore[arg-type]
    )


def typed(remedy: str) -> int:
    """Paste the command of a remedy."""
    command = remedy[remedy.index("so8tqc ") :]
    return run_main([*shlex.split(command)[1:], "--quiet"])


def test_a_bake_and_a_reference_by_the_same_wrong_reading(
    recording: Path, llama: Path, gates: Path, tmp_path: Path
) -> None:
    candidate = baked(llama, gates, tmp_path / "baked", WRONG)
    record = judged(recording, llama, gates, candidate, WRONG)
    assert record.verdict is Verdict.FAIL
    first = record.diagnosis[0]
    assert first.code == "misread"
    assert "exp, column, input was used. The gates are cayley, row, output" in first.text
    command = f"so8tqc bake {llama} {gates} --out {candidate}-again {flags(TRAINED)}"
    assert first.remedy.endswith(command)
    assert next_steps({"qc": record})[0].command == command
    assert typed(first.remedy) == 0
    again = judged(recording, llama, gates, Path(f"{candidate}-again"), TRAINED)
    assert again.check("kl.mean").verdict is Verdict.PASS
    assert not again.diagnosis


def test_a_right_bake_judged_by_a_wrong_reading_is_judged_again(
    recording: Path, llama: Path, gates: Path, tmp_path: Path
) -> None:
    candidate = baked(llama, gates, tmp_path / "baked", TRAINED)
    record = judged(recording, llama, gates, candidate, WRONG)
    assert record.verdict is Verdict.FAIL  # the files are no fold of the reading that was stated
    first = record.diagnosis[0]
    assert first.code == "misread"
    assert first.remedy.startswith("Judge again with the reading of the training: so8tqc qc ")
    assert flags(TRAINED) in first.remedy
    for other in record.diagnosis[1:]:
        assert flags(WRONG) not in other.remedy
    assert typed(first.remedy) == 0


def test_rotations_that_no_reading_brings_to_the_capture(
    recording: Path, llama: Path, gates: Path, tmp_path: Path
) -> None:
    draw, other = np.random.default_rng(9), tmp_path / "other.pt"
    theta = [torch.from_numpy(draw.normal(size=(8, 8, 8)) * 0.2) for _ in range(3)]
    torch.save({f"model.layers.{i}.rotation_gate.theta": t for i, t in enumerate(theta)}, other)
    candidate = baked(llama, other, tmp_path / "baked", TRAINED)
    record = judged(recording, llama, other, candidate, TRAINED)
    first = record.diagnosis[0]
    assert first.code == "misread"
    assert first.text.startswith("No reading of the rotations gives the recorded logits: ")
    assert typed(first.remedy) == 1


def test_a_right_reading_has_no_such_diagnosis(
    recording: Path, llama: Path, gates: Path, tmp_path: Path
) -> None:
    candidate = baked(llama, gates, tmp_path / "baked", TRAINED)
    record = judged(recording, llama, gates, candidate, TRAINED)
    assert record.verdict is Verdict.PASS
    assert not record.diagnosis


@pytest.mark.parametrize(
    ("done", "code"),
    [
        (reading("exp", "column", "output"), "wrong_parametrization"),
        (reading("cayley", "column", "output"), "transposed"),
        (reading("cayley", "row", "input"), "wrong_site"),
        (reading("exp", "column", "input"), "wrong_site"),
        (reading("scaled-taylor", "column", "output"), "wrong_parametrization"),
    ],
)
def test_the_remedy_of_a_wrong_bake_states_all_three_facts(
    done: dict[str, str], code: str, llama: Path, gates: Path, texts_file: Path, tmp_path: Path
) -> None:
    candidate = baked(llama, gates, tmp_path / "a model", done)
    config = QCConfig(
        reference=llama,
        rotations=gates,
        candidates=(candidate,),
        level="files",
        rotation_options=RotationOptions(**TRAINED),  # type: ignore[arg-type]
        out=tmp_path / "qc",
    )
    record = qc(config)
    assert [d.code for d in record.diagnosis] == [code]
    remedy = record.diagnosis[0].remedy
    assert remedy.count("so8tqc") == 1
    assert remedy.endswith(flags(TRAINED))
    assert typed(remedy) == 0
    again = Path(f"{candidate}-again")
    judged_again = qc(config.model_copy(update={"candidates": (again,)}))
    assert judged_again.check("algebra.exact").verdict is Verdict.PASS
