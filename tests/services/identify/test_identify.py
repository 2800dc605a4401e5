"""identify: readings of a gate file against logits and texts of a training that knows no so8tqc."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trained_cases import (
    LAYERS,
    ROTATIONS,
    WIDTH,
    Case,
    gated,
    make_base,
    nll,
    record_capture,
    tokens,
    topics,
    train_case,
)

from so8tqc.cli.main import run as run_main
from so8tqc.config import IdentifyConfig
from so8tqc.errors import ConfigError, InputError
from so8tqc.record_files import read_record
from so8tqc.records import Record, Verdict
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.read import open_raw, read_rotations
from so8tqc.rotations.rotation_set import HEAD, Target
from so8tqc.services.identify.service import identify

Theta = list[torch.Tensor]


@pytest.fixture(scope="module")
def base(tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that was trained on English prose."""
    return make_base(tmp_path_factory.mktemp("identify") / "base", tokenizer_files, 200)


@pytest.fixture(scope="module")
def raw_base(tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights."""
    return make_base(tmp_path_factory.mktemp("identify") / "base", tokenizer_files, 0)


def asked(base: Path, rotations: Path, **options: object) -> Record:
    return identify(
        IdentifyConfig(
            base=base, rotations=rotations, ctx=64, resamples=500, **{"windows": 32, **options}
        )  # type: ignore[arg-type]
    )


def random_theta(scale: float, seed: int = 0) -> Theta:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(WIDTH // 8, 8, 8, generator=draw) * scale for _ in range(LAYERS)]


def checkpoint(path: Path, theta: Theta) -> Path:
    torch.save({f"model.layers.{i}.rotation_gate.theta": t for i, t in enumerate(theta)}, path)
    return path


def truth_of(path: Path, text: Path, reading: str) -> Case:
    parametrization, convention, site = reading.split(", ")
    return Case(path, text, parametrization, convention, site, 0, 0.0, 0.0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(topics())[:12_000], encoding="utf-8")
    return path


READINGS = [
    f"{p}, {c}, {s}" for p in ROTATIONS for c in ("column", "row") for s in ("input", "output")
]


@pytest.mark.parametrize("reading", READINGS)
def test_a_capture_names_every_reading(
    reading: str, raw_base: Path, text: Path, tmp_path: Path
) -> None:
    file = checkpoint(tmp_path / "gates.pt", random_theta(0.12))
    capture = record_capture(
        raw_base, truth_of(file, text, reading), tmp_path / "c.safetensors", texts=6
    )
    record = asked(raw_base, file, capture=capture)
    assert record.verdict is Verdict.PASS
    assert record.metrics["identified"] == reading
    rows = record.metrics["readings"]
    assert set(rows) == {*READINGS, "none"}
    assert rows[reading]["kl"] < 1e-10
    assert all(row["kl"] > 1e-7 for name, row in rows.items() if name != reading)
    assert {row["state"] for name, row in rows.items() if name not in (reading, "none")} == {
        "refuted"
    }


@pytest.mark.parametrize(("dtype", "texts"), [(torch.float16, 6), (torch.float32, 1)])
def test_a_capture_may_be_small_or_in_16_bits(
    dtype: torch.dtype, texts: int, raw_base: Path, text: Path, tmp_path: Path
) -> None:
    file, path = checkpoint(tmp_path / "gates.pt", random_theta(0.2)), tmp_path / "c.safetensors"
    record_capture(raw_base, truth_of(file, text, "cayley, row, output"), path, texts=texts)
    stored = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in load_file(str(path)).items()
    }
    save_file(stored, str(path), metadata={"so8t.capture_version": "1"})
    record = asked(raw_base, file, capture=path)
    assert record.metrics["identified"] == "cayley, row, output"


def test_a_capture_in_coarse_arithmetic_is_named_with_what_is_left(
    raw_base: Path, text: Path, tmp_path: Path
) -> None:
    file, path = checkpoint(tmp_path / "gates.pt", random_theta(0.3)), tmp_path / "c.safetensors"
    record_capture(raw_base, truth_of(file, text, "exp, row, input"), path, texts=8)
    draw = torch.Generator().manual_seed(1)
    stored = load_file(str(path))
    for key, value in stored.items():
        if value.is_floating_point():  # as large as a bfloat16 forward's errors
            stored[key] = value + 0.02 * torch.randn(value.shape, generator=draw)
    save_file(stored, str(path), metadata={"so8t.capture_version": "1"})
    record = asked(raw_base, file, capture=path)
    assert record.metrics["identified"] == "exp, row, input"
    assert "16 bits" in record.metrics["sentence"]


def test_a_capture_of_other_gates_agrees_with_none_and_the_nearest_is_told(
    raw_base: Path, text: Path, tmp_path: Path
) -> None:
    file = checkpoint(tmp_path / "gates.pt", random_theta(0.2))
    other = [t + 0.1 * u for t, u in zip(random_theta(0.2), random_theta(1.0, 5), strict=True)]
    of = truth_of(checkpoint(tmp_path / "other.pt", other), text, "exp, row, input")
    capture = record_capture(raw_base, of, tmp_path / "c.safetensors", texts=8)
    record = asked(raw_base, file, capture=capture, out=tmp_path / "out.safetensors")
    assert record.verdict is Verdict.FAIL
    assert record.metrics["identified"] is None
    nearest = min(record.metrics["readings"].items(), key=lambda item: item[1]["kl"])[0]
    assert f"the nearest is {nearest}" in record.metrics["sentence"]
    assert nearest.endswith("row, input")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_capture_of_the_base_says_that_no_gate_was_there(
    raw_base: Path, text: Path, tmp_path: Path
) -> None:
    file = checkpoint(tmp_path / "gates.pt", random_theta(0.2))
    still = checkpoint(tmp_path / "still.pt", random_theta(0.0))
    of = truth_of(still, text, "exp, row, input")
    capture = record_capture(raw_base, of, tmp_path / "c.safetensors", texts=8)
    record = asked(raw_base, file, capture=capture)
    assert record.verdict is Verdict.FAIL
    assert "no gate turned anything" in record.metrics["sentence"]


def a_case(base: Path, folder: Path, wanted: Callable[[Case], bool]) -> Case:
    """The first trained case of a kind."""
    texts = topics()
    found = (train_case(base, folder, seed, texts) for seed in range(200))
    return next(case for case in found if case is not None and wanted(case))


def test_no_wrong_reading_is_named_and_known_parametrizations_lead_to_the_right_one(
    base: Path, raw_base: Path, tmp_path: Path
) -> None:
    """A few of the cases of benchmarks/identify.py, which makes forty."""
    texts, right, made = topics(), 0, 0
    for seed in range(100, 200):
        used = (base, raw_base)[seed % 2]
        if (case := train_case(used, tmp_path, seed, texts)) is None:
            continue
        for told in ({}, {"parametrization": case.parametrization}):
            record = asked(used, case.file, data=(str(case.text),), rotation_options=told)
            named = record.metrics["identified"]
            if named is not None:
                assert case.truth in (named, *record.metrics["readings"][named]["same"]), seed
                right += bool(told)
            else:
                assert record.verdict is Verdict.FAIL
                assert "cannot tell" in record.metrics["sentence"]
        made += 1
        if made == 6:
            break
    assert made == 6
    assert right >= 3


def test_a_larger_turn_that_is_better_is_no_evidence(base: Path, tmp_path: Path) -> None:
    """After few steps, exp lowers the NLL further than the cayley that was trained."""
    theta = [t.requires_grad_() for t in random_theta(0.01)]
    text = tmp_path / "t.txt"
    text.write_text("\n\n".join(topics())[:16_000], encoding="utf-8")
    data = tokens([text.read_text(encoding="utf-8")], base)
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    optimizer = torch.optim.SGD(theta, lr=1.0)
    with gated(model, theta, ROTATIONS["cayley"], False, "input"):
        for _ in range(8):
            loss = nll(model, data)
            optimizer.zero_grad()
            loss.backward()
            for t in theta:
                t.grad *= 0.25 / t.grad.norm()  # type: ignore[operator]
            optimizer.step()
    file = checkpoint(tmp_path / "gates.pt", [t.detach() for t in theta])
    record = asked(base, file, data=(str(text),), windows=64)
    rows = record.metrics["readings"]
    trained, larger = rows["cayley, column, input"], rows["exp, column, input"]
    assert larger["nll"] < trained["nll"]  # the trap
    assert record.metrics["identified"] is None
    assert trained["state"] == larger["state"] == "possible"
    assert "Convention column and site input are certain" in record.metrics["sentence"]
    known = {"parametrization": "cayley"}
    record = asked(base, file, data=(str(text),), windows=64, rotation_options=known)
    assert record.metrics["identified"] == "cayley, column, input"


def native(path: Path, theta: Theta, parametrization: str, convention: str, site: str) -> Path:
    write_native(
        path,
        {Target(i): t.numpy() for i, t in enumerate(theta)},
        parametrization=Parametrization(parametrization),
        convention=Convention(convention),
        site=Site(site),
        pet={"kind": "l2", "strength": 0.5},
    )
    return path


def test_the_files_word_decides_between_readings_of_one_path_alone(
    base: Path, tmp_path: Path
) -> None:
    case = a_case(
        base,
        tmp_path,
        lambda c: c.parametrization == "cayley" and c.steps >= 12 and c.site == "output",
    )
    theta = list(torch.load(case.file, weights_only=True).values())
    right = native(tmp_path / "right.safetensors", theta, "cayley", case.convention, case.site)
    record = asked(base, right, data=(str(case.text),), windows=100)
    assert record.metrics["identified"] == case.truth
    assert record.metrics["by"][-1] == "statement"

    other = {"row": "column", "column": "row"}[case.convention]
    wrong = native(tmp_path / "wrong.safetensors", theta, "cayley", other, case.site)
    record = asked(base, wrong, data=(str(case.text),), windows=100)
    assert record.metrics["identified"] is None
    assert f"Convention {case.convention}" in record.metrics["sentence"]
    told = {"parametrization": "cayley"}
    record = asked(base, wrong, data=(str(case.text),), windows=100, rotation_options=told)
    assert record.metrics["identified"] == case.truth
    assert any("that is not what was trained" in notice for notice in record.notices)


def test_untrained_gates_are_nobodys(base: Path, text: Path, tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "gates.pt", random_theta(0.2, seed=3))
    record = asked(base, file, data=(str(text),))
    assert record.verdict is Verdict.FAIL
    assert record.metrics["identified"] is None


def test_what_is_written_states_the_facts_and_keeps_every_bit(
    raw_base: Path, text: Path, tmp_path: Path
) -> None:
    theta = random_theta(0.2)
    file = native(tmp_path / "gates.safetensors", theta, "exp", "column", "input")
    out = tmp_path / "out.safetensors"
    of = truth_of(checkpoint(tmp_path / "g.pt", theta), text, "cayley, row, output")
    capture = record_capture(raw_base, of, tmp_path / "c.safetensors")
    record = asked(raw_base, file, capture=capture, out=out)
    assert any("The file states exp, column, input" in notice for notice in record.notices)
    written = open_raw(out)
    assert (written.parametrization, written.convention, written.site) == (
        "cayley",
        "row",
        "output",
    )
    assert json.loads(written.metadata["pet"]) == {"kind": "l2", "strength": 0.5}
    assert json.loads(written.metadata["identified"])["by"] == ["capture"]
    stored = load_file(str(out))
    assert {value.dtype for value in stored.values()} == {torch.float32}
    for target, value in written.theta.items():
        np.testing.assert_array_equal(value, theta[target.layer].double().numpy())
    assert read_rotations(out).site is Site.OUTPUT
    assert record.outputs["rotations"].path == str(out)


def test_readings_with_the_same_rotations_are_run_once(
    raw_base: Path, text: Path, tmp_path: Path
) -> None:
    """Below a norm of 1 the scaled series is the exponential."""
    file = checkpoint(tmp_path / "gates.pt", random_theta(0.05))
    of = truth_of(file, text, "scaled-taylor, row, output")
    capture = record_capture(raw_base, of, tmp_path / "c.safetensors", texts=6)
    record = asked(raw_base, file, capture=capture)
    assert record.metrics["identified"] == "exp, row, output"
    assert record.metrics["readings"]["exp, row, output"]["same"] == ["scaled-taylor, row, output"]
    assert any("exp, row, output gives the same rotations as" in n for n in record.notices)


def test_the_site_is_limited_by_what_fits(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """o_proj of this Qwen3 takes 128 features and gives 64."""
    model = make_model("qwen3")
    draw = torch.Generator().manual_seed(0)
    theta = [torch.randn(16, 8, 8, generator=draw) * 0.1 for _ in range(LAYERS)]
    file, text = checkpoint(tmp_path / "gates.pt", theta), tmp_path / "t.txt"
    text.write_text("\n\n".join(topics())[:3000], encoding="utf-8")
    record = asked(model, file, data=(str(text),))
    sites = {row["site"] for name, row in record.metrics["readings"].items() if name != "none"}
    assert sites == {"input"}


def test_too_few_texts_tell_nothing(base: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("One short passage, and no more than that.", encoding="utf-8")
    file = checkpoint(tmp_path / "gates.pt", random_theta(0.2))
    record = asked(base, file, data=(str(text),))
    assert record.verdict is Verdict.FAIL
    assert "Fewer than 5 texts" in record.metrics["sentence"]


def test_what_cannot_be_identified_is_refused(base: Path, text: Path, tmp_path: Path) -> None:
    still = checkpoint(tmp_path / "still.pt", random_theta(0.0))
    with pytest.raises(InputError, match="turn nothing"):
        asked(base, still, data=(str(text),))
    gates = checkpoint(tmp_path / "gates.pt", random_theta(0.1))
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        asked(base, gates, data=(str(text),), out=tmp_path / "gates.bin")
    with pytest.raises(ConfigError, match="as they were trained"):
        asked(base, gates, rotation_options={"orthogonalize": "polar"})


def test_the_command_exits_by_the_answer_and_leaves_table_plot_and_record(
    raw_base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkpoint(tmp_path / "gates.pt", random_theta(0.15))
    of = truth_of(file, text, "cayley, row, input")
    capture = record_capture(raw_base, of, tmp_path / "c.safetensors", texts=6)
    out, report = tmp_path / "found.safetensors", tmp_path / "report"
    command = ["identify", str(raw_base), str(file)]
    files = ["--capture", str(capture), "--out", str(out), "--report", str(report)]
    code = run_main([*command, *files])
    shown = capsys.readouterr().out
    assert code == 0
    assert "→ cayley, row, input" in shown
    assert "The gates are cayley, row, input" in shown
    assert f"so8tqcbake{raw_base}{out}" in "".join(shown.split())
    assert out.is_file()
    assert read_record(report / "record.json").kind == "identify"
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "cayley, row, input" in page
    assert "plot-1" in page
    assert "cayley, row, input" in (report / "report.md").read_text(encoding="utf-8")

    text.write_text("\n\n".join(topics())[:4000], encoding="utf-8")
    assert run_main([*command, "--data", str(text), "--windows", "8", "--ctx", "64", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["metrics"]["identified"] is None


def test_the_function_does_what_the_command_does(
    raw_base: Path, text: Path, tmp_path: Path
) -> None:
    import so8tqc

    file = checkpoint(tmp_path / "gates.pt", random_theta(0.15))
    of = truth_of(file, text, "exp, row, output")
    capture = record_capture(raw_base, of, tmp_path / "c.safetensors", texts=6)
    out, report = tmp_path / "found.safetensors", tmp_path / "report"
    record = so8tqc.identify(raw_base, file, out, capture=capture, report=report)
    assert record.metrics["identified"] == "exp, row, output"
    beside = tmp_path / "found.safetensors.record.json"
    assert read_record(beside) == record == read_record(report / "record.json")
    assert (report / "report.html").is_file()
    again = so8tqc.bake(raw_base, out, tmp_path / "baked")
    assert again.verdict is Verdict.PASS


def test_lora_beside_the_gates_is_run_and_not_forgotten(
    raw_base: Path, text: Path, tmp_path: Path
) -> None:
    """What was trained is W + s·B·A with gates: a gate file alone would lose the first."""
    from transformers import LlamaForCausalLM

    draw = torch.Generator().manual_seed(2)
    theta = random_theta(0.15)
    tensors = {f"model.layers.{i}.rotation_gate.theta": t for i, t in enumerate(theta)}
    model = LlamaForCausalLM.from_pretrained(str(raw_base), dtype=torch.float32)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        weight = model.model.layers[0].get_submodule(name).weight.data
        a = torch.randn(4, weight.shape[1], generator=draw) * 0.2
        b = torch.randn(weight.shape[0], 4, generator=draw) * 0.2
        weight += 2.0 * b @ a  # α = 8, r = 4
        tensors[f"model.layers.0.{name}.lora_A.default.weight"] = a
        tensors[f"model.layers.0.{name}.lora_B.default.weight"] = b
    file = tmp_path / "gates.pt"
    torch.save(tensors, file)
    model.save_pretrained(str(tmp_path / "merged"))
    for other in raw_base.glob("token*"):
        (tmp_path / "merged" / other.name).write_bytes(other.read_bytes())
    of = truth_of(checkpoint(tmp_path / "g.pt", theta), text, "exp, row, output")
    capture = record_capture(tmp_path / "merged", of, tmp_path / "c.safetensors", texts=3)
    out = tmp_path / "out.safetensors"
    told = {"lora_alpha": 8.0}
    record = asked(raw_base, file, capture=capture, out=out, rotation_options=told)
    assert record.metrics["identified"] == "exp, row, output"
    assert record.metrics["readings"]["exp, row, output"]["kl"] < 1e-10
    typed = next(n for n in record.notices if n.startswith("To bake it: "))
    assert f"bake {raw_base} {file} " in typed
    assert "--lora-alpha 8.0" in typed
    assert any("holds the gates alone" in notice for notice in record.notices)


def test_a_rotation_before_the_output_head(raw_base: Path, text: Path, tmp_path: Path) -> None:
    """lm_head(h + s·R·h), the row convention, in torch alone."""
    from transformers import LlamaForCausalLM

    theta, strength = random_theta(0.2)[0], 0.5
    file, out = tmp_path / "head.safetensors", tmp_path / "out.safetensors"
    write_native(
        file,
        {HEAD: theta.numpy()},
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.HEAD,
        pet=None,
        strength=strength,
    )
    model = LlamaForCausalLM.from_pretrained(str(raw_base), dtype=torch.float32).eval()
    r = torch.block_diag(*ROTATIONS["cayley"](theta))
    model.lm_head.register_forward_pre_hook(lambda _m, x: (x[0] + strength * x[0] @ r,))
    tensors = {}
    with torch.inference_mode():
        for i, ids in enumerate(tokens([text.read_text(encoding="utf-8")], raw_base)[:6]):
            tensors |= {
                f"tokens.{i}": ids.clone(),
                f"logits.{i}": model(ids[None]).logits[0].clone(),
            }
    capture = tmp_path / "c.safetensors"
    save_file(tensors, str(capture), metadata={"so8t.capture_version": "1"})
    record = asked(raw_base, file, capture=capture, out=out)
    assert record.metrics["identified"] == "cayley, row, head"
    written = open_raw(out)
    assert (written.site, dict(written.strength)) == (Site.HEAD, {HEAD: strength})
