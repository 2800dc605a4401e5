"""What QC says about right bakes, and its options; tests/faults has the wrong ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from so8tqc.config import BakeConfig, QCConfig
from so8tqc.errors import ConfigError, DataError, InputError
from so8tqc.records import Record, Verdict
from so8tqc.rotations.enums import Convention
from so8tqc.rotations.options import RotationOptions
from so8tqc.services.bake import bake
from so8tqc.services.qc.service import qc
from so8tqc.services.report import write_stage_reports
from so8tqc.sources.inputs.texts import load_tokenizer


def judged(
    base: Path, gates: Path, candidate: Path, texts: Path, out: Path, **options: object
) -> Record:
    config = QCConfig(
        reference=base,
        rotations=gates,
        candidates=(candidate,),
        data=(str(texts),),
        out=out,
        max_tokens=64,
        resamples=200,
        **options,  # type: ignore[arg-type]
    )
    return qc(config)


def codes(record: Record) -> set[str]:
    return {diagnosis.code for diagnosis in record.diagnosis}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3_text", "qwen2_vl"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_correct_bake_passes(
    architecture: str,
    dtype: str,
    make_model: Callable[..., Path],
    make_gates: Callable[..., Path],
    texts_file: Path,
    tmp_path: Path,
) -> None:
    base = make_model(architecture, dtype)
    gates = make_gates(base, seed=7)
    bake(BakeConfig(base=base, rotations=gates, out=tmp_path / "baked"))
    record = judged(base, gates, tmp_path / "baked", texts_file, tmp_path / "qc")
    failed = [(c.id, c.value, c.limit) for c in record.checks if c.verdict is not Verdict.PASS]
    assert failed == []
    assert record.verdict is Verdict.PASS
    assert record.diagnosis == ()
    kl, nll = record.check("kl.mean"), record.check("calibration.nll")
    statistics = record.metrics["candidates"]["baked"]  # type: ignore[call-overload,index]
    assert nll.value == pytest.approx(statistics["ln_ppl_ratio"], rel=1e-9)  # type: ignore[index]
    assert nll.ci95 is not None
    assert kl.ci95 is not None
    assert kl.ci95[0] <= kl.value <= kl.ci95[1]
    assert kl.noise_floor is not None


def test_gates_without_effect_fail(
    llama: Path, make_gates: Callable[..., Path], texts_file: Path, tmp_path: Path
) -> None:
    gates = make_gates(llama, scale=1e-5)
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked"))
    record = judged(llama, gates, tmp_path / "baked", texts_file, tmp_path / "qc")
    assert record.check("effect.kl").verdict is Verdict.FAIL
    assert codes(record) == {"storage_rounding"}
    assert "cannot hold" in record.diagnosis[0].text
    assert "less than rounding" in record.diagnosis[-1].text


def test_gates_that_are_the_identity_fail_from_the_files_alone(
    llama: Path, make_gates: Callable[..., Path], texts_file: Path, tmp_path: Path
) -> None:
    gates = make_gates(llama, scale=0.0)
    assert (
        bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked")).verdict.value
        == "fail"
    )
    record = judged(llama, gates, llama, texts_file, tmp_path / "qc", level="files")
    assert record.verdict is Verdict.FAIL
    check = record.check("algebra.effect")
    assert (check.verdict, check.value) == (Verdict.FAIL, 0)
    assert "nothing to bake" in check.detail


def test_the_wrong_convention_in_qc_is_a_failed_verdict(
    baked: tuple[Path, Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    base, gates, correct = baked
    record = judged(
        base,
        gates,
        correct,
        texts_file,
        tmp_path / "qc",
        rotation_options=RotationOptions(convention=Convention.ROW),
    )
    assert record.verdict is Verdict.FAIL
    assert codes(record) == {"transposed"}


def test_the_token_table_is_written(
    baked: tuple[Path, Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    base, gates, correct = baked
    record = judged(base, gates, correct, texts_file, tmp_path / "qc")
    with np.load(tmp_path / "qc" / "tokens.npz", allow_pickle=False) as table:
        assert table["baked/kl"].mean() == pytest.approx(record.check("kl.mean").value)
        assert set(table["texts"]) == {f"t{i}" for i in range(6)}
        assert table["position"].max() == 62


def test_strict_enforces_the_absolute_targets(
    baked: tuple[Path, Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    base, gates, correct = baked
    record = judged(base, gates, correct, texts_file, tmp_path / "qc", profile="strict")
    check = record.check("logits.max_abs")
    assert check.verdict is Verdict.FAIL
    assert check.limit == check.target == 1e-5


def test_unusable_inputs(
    baked: tuple[Path, Path, Path],
    make_model: Callable[..., Path],
    texts_file: Path,
    tmp_path: Path,
) -> None:
    base, gates, correct = baked
    short = tmp_path / "short.txt"
    short.write_text("\n")
    with pytest.raises(DataError, match="no text"):
        judged(base, gates, correct, short, tmp_path / "qc")
    with pytest.raises(InputError, match=r"no such|missing"):
        judged(base, gates, tmp_path / "nowhere", texts_file, tmp_path / "qc")
    with pytest.raises(ConfigError, match="no profile 'none'"):
        judged(base, gates, correct, texts_file, tmp_path / "qc", profile="none")


def test_long_texts_in_overlapping_windows(llama: Path, tmp_path: Path) -> None:
    """Every token of every text is scored, and texts stay what is resampled."""
    texts = json.loads((Path(__file__).parents[3] / "data" / "validation_en.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps(texts["texts"][:6]))
    config = QCConfig(
        reference=llama,
        candidates=(llama,),
        out=tmp_path / "qc",
        resamples=200,
        data=(str(tmp_path / "t.json"),),
        ctx=128,
        stride=100,
    )
    record = qc(config)
    tokenizer = load_tokenizer(llama)
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts["texts"][:6]]
    assert min(lengths) > 256
    tokens = np.load(tmp_path / "qc" / "tokens.npz")
    assert [list(tokens["position"][tokens["text"] == i]) for i in range(6)] == [
        list(range(length - 1)) for length in lengths
    ]
    metrics = record.metrics["candidates"][llama.name]  # type: ignore[index,call-overload]
    assert (metrics["texts"], metrics["tokens"]) == (6, sum(lengths) - 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 4}, "longer ctx"),
        ({"ctx": 64, "stride": 64}, "longer ctx"),
        ({"ctx": 64, "stride": 32, "protocol": "llama-perplexity"}, "no stride"),
        ({"ctx": 4}, "greater than or equal to 8"),
    ],
)
def test_windows_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QCConfig(reference=Path("a"), candidates=(Path("b"),), out=Path("c"), **options)


def broken(correct: Path, out: Path) -> Path:
    """A config value changed: fails structure.config and nothing else from the files."""
    shutil.copytree(correct, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"bos_token_id": 3}), encoding="utf-8")
    return out


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        ({}, Verdict.FAIL),
        ({"allow": ("structure.config",)}, Verdict.PASS),
        ({"allow": ("structure.*",)}, Verdict.PASS),
        ({"allow": ("kl.*", "config")}, Verdict.FAIL),
        ({"fail_on": ("algebra.*",)}, Verdict.PASS),
        ({"fail_on": ("algebra.*", "structure.c*")}, Verdict.FAIL),
        ({"fail_on": ("structure.*",), "allow": ("structure.config",)}, Verdict.PASS),
    ],
)
def test_which_checks_count_is_the_users_choice(
    options: dict[str, tuple[str, ...]],
    verdict: Verdict,
    baked: tuple[Path, Path, Path],
    texts_file: Path,
    tmp_path: Path,
) -> None:
    base, gates, correct = baked
    wrong = broken(correct, tmp_path / "wrong")
    record = judged(base, gates, wrong, texts_file, tmp_path / "qc", level="files", **options)
    assert record.verdict is verdict
    check = record.check("structure.config")
    assert check.verdict is Verdict.FAIL  # shown as it is, whatever counts
    assert check.allowed is (verdict is Verdict.PASS)
    assert {c.id for c in record.checks if c.allowed} <= {"structure.config"}
    assert codes(record) == {"foreign_edit"}


def test_patterns_that_match_nothing_are_told(
    baked: tuple[Path, Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    """A mistyped --fail-on must not turn every check off."""
    base, gates, correct = baked
    record = judged(
        base,
        gates,
        correct,
        texts_file,
        tmp_path / "qc",
        level="files",
        fail_on=("algebra.*", "algbra.exact"),
        allow=("kl.maen",),
    )
    assert record.verdict is Verdict.FAIL
    assert "algbra.exact" in record.check("profile.fail_on").detail
    assert any("kl.maen" in notice for notice in record.notices)


def test_two_candidates_are_compared_with_each_other(
    baked: tuple[Path, Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    base, gates, good = baked
    other = tmp_path / "unbaked"
    shutil.copytree(base, other)
    config = QCConfig(
        reference=base,
        rotations=gates,
        candidates=(other, good),
        data=(str(texts_file),),
        out=tmp_path / "qc",
        max_tokens=64,
        resamples=200,
    )
    record = qc(config)
    comparisons: Any = record.metrics["comparisons"]
    (pair,) = comparisons["pairs"]
    assert (pair["a"], pair["b"], pair["winner"]) == ("unbaked", "baked", "baked")
    columns = np.load(tmp_path / "qc" / "tokens.npz")
    difference = columns["unbaked/kl"].mean() - columns["baked/kl"].mean()
    assert pair["kl"]["difference"] == pytest.approx(difference)
    one = judged(base, gates, good, texts_file, tmp_path / "one")
    assert "comparisons" not in one.metrics
    write_stage_reports(record, tmp_path / "qc")
    for report in ("report.html", "report.md"):
        assert "unbaked − baked" in (tmp_path / "qc" / report).read_text()
