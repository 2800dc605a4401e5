"""What to do next is derived from what failed."""

from __future__ import annotations

import re
import shlex
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.main import get_command

from so8tqc.check_guide import DIAGNOSES, GUIDE
from so8tqc.cli.app import app
from so8tqc.languages import Language
from so8tqc.records import Check, Diagnosis, FileRef, Record, RunInfo, judge, overall
from so8tqc.reports.advice import NextStep, next_steps
from so8tqc.reports.language import spoken


def record(kind: str, *checks: Check, **fields: object) -> Record:
    run = RunInfo(started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.0)
    return Record(kind=kind, verdict=overall(checks), checks=checks, run=run, **fields)  # type: ignore[arg-type]


def run_of(**divergence: float) -> dict[str, Record]:
    """A run whose quantized types have these mean KLs (limit 0.1); the F16 file passes."""
    size = {"Q4_K_M": 40, "Q5_K_M": 50, "Q6_K": 60, "Q8_0": 80, "IQ2_XS": 20}
    names = {kind: f"m-{kind}.gguf" for kind in divergence}
    checks = [judge("kl.mean", v, 0.1, detail="", subject=names[k]) for k, v in divergence.items()]
    files = {name: {"type": kind, "path": f"out/quantize/{name}"} for kind, name in names.items()}
    outputs = {
        kind: FileRef(path=f"out/quantize/{name}", sha256="", bytes=size[kind])
        for kind, name in names.items()
    }
    source = FileRef(path="out/export/m-F16.gguf", sha256="", bytes=160)
    return {
        "export": record("export", outputs={"gguf": source}),
        "quantize": record(
            "quantize", metrics={"files": files}, inputs={"gguf": source}, outputs=outputs
        ),
        "qc": record("qc", judge("kl.mean", 1e-5, 0.1, detail="", subject="m-F16.gguf"), *checks),
    }


COMMAND = "so8tqc quantize out/export/m-F16.gguf --type {} --out out/quantize"


@pytest.mark.parametrize(
    ("divergence", "passed", "command"),
    [
        # a finer type of the run passed; the one between them is worth a try
        ({"Q4_K_M": 0.3, "Q6_K": 0.01}, "m-Q6_K.gguf", COMMAND.format("Q5_K_M")),
        # nothing quantized passed: the unquantized file did
        ({"Q5_K_M": 0.3}, "m-F16.gguf", COMMAND.format("Q6_K")),
        # a type coarser than one that failed is not advised, and none is finer
        ({"Q5_K_M": 0.3, "Q8_0": 0.2}, "m-F16.gguf", ""),
        # a type that is on no ladder
        ({"IQ2_XS": 0.3}, "m-F16.gguf", ""),
    ],
)
def test_a_quantized_file_that_lost_too_much(
    divergence: dict[str, float], passed: str, command: str
) -> None:
    step = next_steps(run_of(**divergence))[0]
    kind = next(iter(divergence))
    assert step.text.startswith(f"kl.mean 0.3 (≤ 0.1) of m-{kind}.gguf failed. {passed} of this")
    assert step.command == command


def qc_of(*checks: Check, **config: object) -> dict[str, Record]:
    given = {"reference": "base", "candidates": ["baked/", "m-Q4_K_M.gguf"], "out": "qc", **config}
    return {"qc": record("qc", *checks, config=given)}


def test_logits_that_fail_while_all_tensors_are_right_are_located() -> None:
    wrong = judge("kl.mean", 0.3, 0.1, detail="", subject="m-Q4_K_M.gguf")
    command = "so8tqc locate base m-Q4_K_M.gguf --out qc-located"
    assert command in [step.command for step in next_steps(qc_of(wrong))]
    options = {"convention": "row", "lora_alpha": 2.0, "adapters": ["one", "two"]}
    steps = next_steps(qc_of(wrong, rotations="g.safetensors", rotation_options=options))
    (found,) = [step.command for step in steps if "locate" in step.command]
    assert found == (
        "so8tqc locate base m-Q4_K_M.gguf --rotations g.safetensors --convention row "
        "--lora-alpha 2.0 --adapter one --adapter two --out qc-located"
    )
    tensor = judge("tensors.honest", 1, 0, detail="", subject="m-Q4_K_M.gguf")
    for records in (qc_of(wrong, tensor), qc_of(tensor), qc_of(wrong, reference="ref.gguf")):
        assert not [step for step in next_steps(records) if "locate" in step.command]


def test_a_run_that_passed_says_what_to_ship_and_how_others_prove_it() -> None:
    (step,) = next_steps(run_of(Q8_0=0.01, Q4_K_M=0.05))
    assert step.text.startswith("Ship m-Q4_K_M.gguf (the smallest file that passed)")
    assert step.command == "so8tqc verify out/quantize/m-Q4_K_M.gguf"
    chosen = {**run_of(Q8_0=0.01, Q4_K_M=0.05)}
    chosen["choose"] = record("choose", metrics={"recommended": "Q8_0"})
    (step,) = next_steps(chosen)
    assert step.text.startswith("Ship m-Q8_0.gguf (recommended)")
    assert next_steps({"bake": record("bake", judge("x.y", 0.0, 1.0, detail=""))}) == []


def test_a_significant_temperature_is_to_be_applied_once() -> None:
    config: dict[str, object] = {"gguf": "q/m-Q4_K_M.gguf", "tokenizer": "baked", "out": "cal"}
    metrics = {"significant": True, "temperature": 1.086}
    (step,) = next_steps({"calibrate": record("calibrate", config=config, metrics=metrics)})
    assert "m-Q4_K_M.gguf at temperature 1.086" in step.text
    assert step.command == (
        "so8tqc calibrate q/m-Q4_K_M.gguf --tokenizer baked --apply metadata --out cal-again"
    )
    applied = {**config, "apply": "norm"}
    (step,) = next_steps({"calibrate": record("calibrate", config=applied, metrics=metrics)})
    assert step.command == ""
    metrics["significant"] = False
    assert next_steps({"calibrate": record("calibrate", config=config, metrics=metrics)}) == []


def test_a_diagnosis_speaks_for_the_checks_it_explains() -> None:
    found = Diagnosis(code="transposed", text="Rᵀ was folded.", remedy="Use --convention row.")
    qc = record(
        "qc", judge("algebra.exact", 9.0, 0.5, detail="", subject="baked"), diagnosis=(found,)
    )
    assert next_steps({"qc": qc}) == [NextStep("Rᵀ was folded. Use --convention row.")]


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("transposed", ""),
        ("storage_rounding", " --baked-dtype float32"),
        ("non_orthogonal", " --orthogonalize polar"),
    ],
)
def test_a_wrong_bake_is_made_again_as_the_reference_was_trained(code: str, extra: str) -> None:
    """The bake was told column; what counts is what the qc believes the rotations to be."""
    found = Diagnosis(code=code, layers=(0, 1), text="Wrong.", remedy="Bake again.")
    told = {"convention": "row", "site": None, "orthogonalize": "as-trained"}
    qc = record(
        "qc",
        judge("algebra.exact", 9.0, 0.5, detail="", subject="baked"),
        diagnosis=(found,),
        config={
            "reference": "my model",
            "rotations": "g.safetensors",
            "rotation_options": told,
            "candidates": ["out/x.gguf", "out/baked/"],
        },
    )
    bake = record("bake", config={"base": "m", "rotations": "g", "convention": "column"})
    (step,) = next_steps({"bake": bake, "qc": qc})
    assert step.command == (
        "so8tqc bake 'my model' g.safetensors --out out/baked-again --convention row" + extra
    )


@pytest.mark.parametrize(
    ("stage", "config", "command"),
    [
        ("bake", {"base": "m", "rotations": "g", "out": "b", "site": "output"},
         "bake m g --out b-again --site output"),
        ("export", {"model": "b", "out": "x/m-F16.gguf", "type": "f16"},
         "export b --out x/m-F16-again.gguf --type f16"),
        ("quantize", {"gguf": "m.gguf", "out": "q", "types": ["Q8_0", "Q4_K_M"]},
         "quantize m.gguf --type Q8_0 --type Q4_K_M --out q-again"),
        ("calibrate", {"gguf": "m.gguf", "tokenizer": "b", "out": "c"},
         "calibrate m.gguf --tokenizer b --data builtin:calibration --out c-again"),
    ],
)  # fmt: skip
def test_the_command_of_a_stage_is_one_that_its_command_line_takes(
    stage: str, config: dict[str, object], command: str
) -> None:
    failed = record(stage, judge("x.y", 2.0, 1.0, detail=""), config=config)
    (step,) = next_steps({stage: failed})
    assert step.command == f"so8tqc {command}"
    line = get_command(app)
    with line.make_context("so8tqc", shlex.split(command), resilient_parsing=False) as context:
        name, sub, rest = line.resolve_command(context, shlex.split(command))
        assert sub is not None
        sub.make_context(name, rest, parent=context)  # raises on any option it does not know


def test_a_failure_that_nothing_explains_names_its_checks() -> None:
    checks = [judge(f"phase.{i}", 2.0, 1.0, detail="") for i in range(6)]
    (step,) = next_steps({"longtext": record("longtext", *checks)})
    assert "phase.3 2 (≤ 1), 2 more failed." in step.text
    assert "Open the plots" in step.text
    (step,) = next_steps({"other": record("other", checks[0])})
    assert step.text == "phase.0 2 (≤ 1) failed. See the failed checks."


def test_each_check_of_long_text_has_its_own_advice_said_once() -> None:
    documented = {
        line.split("`")[1]
        for line in (Path(__file__).parents[2] / "docs" / "longtext.md").read_text().splitlines()
        if line.startswith(("| `phase.", "| `oscillation.", "| `pet."))
    }
    assert len(documented) == 13
    for check_id in documented:
        check = judge(check_id, 2.0, 1.0, detail="")
        (step,) = next_steps({"longtext": record("longtext", check, check)})
        assert "Open the plots" not in step.text
        sentence = step.text.split(" failed. ")[1]
        assert step.text.count(sentence) == 1
        assert len(sentence) > 30


PLACEHOLDER = re.compile(r"\b[A-Z]{3,}(?:\.gguf)?\b|…|--[a-z-]+ [A-Z]\b")
_WORDS_IN_CAPITALS = {"GGUF", "ECE", "NLL", "RAM", "CPU", "GPU", "KL", "RNG", "PET"}


def placeholders(text: str) -> list[str]:
    return [word for word in PLACEHOLDER.findall(text) if word not in _WORDS_IN_CAPITALS]


CONFIGS: dict[str, dict[str, object]] = {
    "bake": {"base": "m", "rotations": "g", "out": "b"},
    "export": {"model": "b", "out": "x/m-f16.gguf", "type": "f16"},
    "quantize": {"gguf": "m.gguf", "out": "q", "types": ["Q8_0"]},
    "calibrate": {"gguf": "m.gguf", "tokenizer": "b", "out": "c"},
}


@pytest.mark.parametrize("language", list(Language))
@pytest.mark.parametrize("stage", CONFIGS)
def test_no_remedy_shows_a_placeholder_beside_the_command_that_is_filled_in(
    stage: str, language: Language
) -> None:
    """Every check of every stage, whatever its remedy says."""
    with spoken(language):
        for check_id in GUIDE:
            failed = judge(check_id, 2.0, 1.0, detail="")
            (step,) = next_steps({stage: record(stage, failed, config=CONFIGS[stage])})
            assert step.command
            assert placeholders(step.text) == [], check_id
            assert step.text[-1] in ".:：。)）", check_id


@pytest.mark.parametrize("code", DIAGNOSES)
def test_no_diagnosis_shows_a_placeholder_beside_a_filled_command(code: str) -> None:
    found = Diagnosis(code=code, layers=(0,), text="Wrong.", remedy=DIAGNOSES[code].remedy)
    config = {"reference": "m", "rotations": "g", "candidates": ["b"]}
    bad = judge("algebra.exact", 9.0, 0.5, detail="", subject="b")
    (step,) = next_steps({"qc": record("qc", bad, diagnosis=(found,), config=config)})
    assert not step.command or placeholders(step.text) == []


def test_no_step_names_in_general_what_another_names_filled_in() -> None:
    export = record("export", judge("export.complete", 2.0, 1.0, detail=""),
                    config=CONFIGS["export"])  # fmt: skip
    found = Diagnosis(code="conversion", text="Wrong.", remedy=DIAGNOSES["conversion"].remedy)
    bad = judge("kl.mean", 9.0, 0.5, detail="", subject="m.gguf")
    steps = next_steps({"export": export, "qc": record("qc", bad, diagnosis=(found,))})
    assert [bool(step.command) for step in steps] == [True, False]
    assert all(placeholders(step.text) == [] for step in steps)
