"""Comparing and choosing quantizations of a tiny model, by the real libllama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captured_gguf import (
    LENGTH,
    TEXTS,
    four_bit,
    logits_of,
    token_texts,
    write_capture,
    write_model,
)
from so8tqc.cli.main import run as run_main
from so8tqc.config import ChooseConfig, QuantizeConfig
from so8tqc.errors import InputError
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.mixture import differing_tensors, mix
from so8tqc.record_files import write_record
from so8tqc.records import Record, Verdict
from so8tqc.reports.kinds.choose import tried_table
from so8tqc.services.choose.inversions import four_bit_share, inversions
from so8tqc.services.choose.patterns import quantized_types
from so8tqc.services.choose.service import choose
from so8tqc.services.quantize.patterns import override_patterns
from so8tqc.services.quantize.service import quantize
from so8tqc.services.report import write_stage_reports

pytestmark = pytest.mark.llama

TYPES = ("Q2_K", "Q4_K_M", "Q8_0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny-F16.gguf")


@pytest.fixture(scope="module")
def reference(model: Path) -> Path:
    return write_capture(model.with_name("reference.safetensors"), model)


def chosen(model: Path, reference: Path, out: Path, **options: object) -> Record:
    config = ChooseConfig(
        gguf=model,
        reference=reference,
        out=out,
        types=options.pop("types", TYPES),
        threads=1,
        resamples=200,
        repeats=1,
        **options,  # type: ignore[arg-type]
    )
    return choose(config)


@pytest.fixture(scope="module")
def compared(model: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    return chosen(model, reference, tmp_path_factory.mktemp("compared"))


def rows_of(record: Record) -> dict[str, dict[str, Any]]:
    rows: Any = record.metrics["rows"]
    return rows


def search_of(record: Record) -> dict[str, Any]:
    search: Any = record.metrics["search"]
    return search


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_the_rows_are_what_libllama_and_numpy_say(model: Path, compared: Record) -> None:
    assert compared.metrics["tokens"] == TEXTS * (LENGTH - 1)
    wanted = [log_softmax(logits)[:-1] for logits in logits_of(model)]
    for name in TYPES:
        row = rows_of(compared)[name]
        path = Path(row["path"])
        found = [log_softmax(logits)[:-1] for logits in logits_of(path)]
        kl = np.concatenate(
            [(np.exp(p) * (p - q)).sum(axis=1) for p, q in zip(wanted, found, strict=True)]
        )
        same = [(p.argmax(1) == q.argmax(1)) for p, q in zip(wanted, found, strict=True)]
        ratio = [
            (p - q)[np.arange(LENGTH - 1), tokens[1:]]
            for p, q, tokens in zip(wanted, found, token_texts(), strict=True)
        ]
        assert row["kl_mean"] == pytest.approx(kl.mean(), rel=1e-5)
        assert row["kl_99"] == pytest.approx(np.percentile(kl, 99), rel=1e-5)
        assert row["top1"] == pytest.approx(np.concatenate(same).mean())
        assert row["ppl_ratio"] == pytest.approx(np.exp(np.concatenate(ratio).mean()), rel=1e-5)
        assert row["bytes"] == path.stat().st_size
        for key in ("kl", "kl_99", "top1", "ppl_ratio"):
            low, high = row[f"{key}_ci95"]
            assert low <= row["kl_mean" if key == "kl" else key] <= high
    assert list(rows_of(compared)) == list(TYPES)  # by size


def test_without_a_budget_the_smallest_file_that_keeps_nine_in_ten_is_recommended(
    compared: Record,
) -> None:
    assert compared.verdict is Verdict.PASS
    meeting = [name for name, row in rows_of(compared).items() if row["top1"] >= 0.9]
    assert meeting
    assert meeting != list(TYPES)
    assert compared.metrics["recommended"] == meeting[0]
    assert str(compared.metrics["reason"]).startswith(f"{meeting[0]} is recommended: the smallest")
    assert "search" not in compared.metrics


def test_each_pair_is_judged_and_speed_is_kept_out_of_the_metrics(compared: Record) -> None:
    comparisons: Any = compared.metrics["comparisons"]
    winners = {(pair["a"], pair["b"]): pair["winner"] for pair in comparisons["pairs"]}
    assert winners == {
        ("Q2_K", "Q4_K_M"): "Q4_K_M",
        ("Q2_K", "Q8_0"): "Q8_0",
        ("Q4_K_M", "Q8_0"): "Q8_0",
    }
    speed: Any = compared.run.measured["speed"]
    assert set(speed["files"]) == set(TYPES)
    for rates in speed["files"].values():
        for rate in rates.values():
            assert 0 < rate["low"] <= rate["median"] <= rate["high"]
    assert "speed" not in json.dumps(compared.model_dump(mode="json")["metrics"])


def test_a_reachable_budget_is_met_by_a_mixture_smaller_than_every_type(
    model: Path, reference: Path, compared: Record, tmp_path: Path
) -> None:
    rows = rows_of(compared)
    budget = 0.5 * (rows["Q4_K_M"]["kl_mean"] + rows["Q8_0"]["kl_mean"])
    out = tmp_path / "out"
    record = chosen(model, reference, out, max_kl=budget, max_evaluations=16)
    assert record.verdict is Verdict.PASS
    assert record.metrics["recommended"] == "Q4_K_M-mixed"
    found = rows_of(record)["Q4_K_M-mixed"]
    assert found["kl_mean"] <= budget
    assert rows["Q4_K_M"]["bytes"] < found["bytes"] < rows["Q8_0"]["bytes"]
    # the file is there, is what was evaluated, and says so by libllama's own numbers
    path = out / "tiny-Q4_K_M-mixed.gguf"
    assert record.check("choose.recipe", path.name).value == 0
    kl = [
        (np.exp(log_softmax(p)) * (log_softmax(p) - log_softmax(q))).sum(axis=1)[:-1]
        for p, q in zip(logits_of(model), logits_of(path), strict=True)
    ]
    assert found["kl_mean"] == pytest.approx(np.concatenate(kl).mean(), rel=1e-5)
    # nothing that was tried and met the budget is smaller
    search = search_of(record)
    met = [tried["bytes"] for tried in search["tried"] if not tried["missed"]]
    assert min(met) == found["bytes"]
    assert len(search["tried"]) == search["evaluations"] <= 16
    assert {tried["purpose"] for tried in search["tried"]} == {"type", "sensitivity", "mixture"}
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [path.name, *(f"tiny-{name}.gguf" for name in TYPES)]
    )  # the search leaves nothing behind
    sensitive: Any = search["sensitivity"]
    assert sensitive[0]["kl_cost"] > sensitive[-1]["kl_cost"]
    costs = {row["group"]: row["kl_cost"] for row in sensitive}
    assert costs["ffn_down 0–1"] > 3 * costs["attn_q 0–1"]
    table = tried_table(record)
    assert table is not None
    assert len(table.rows) == len(search["tried"])


def test_an_unreachable_budget_fails_with_the_best_found(
    model: Path, reference: Path, compared: Record, tmp_path: Path
) -> None:
    record = chosen(model, reference, tmp_path / "out", max_kl=1e-9)
    assert record.verdict is Verdict.FAIL
    best = min(rows_of(compared), key=lambda name: rows_of(compared)[name]["kl_mean"])
    assert record.metrics["recommended"] == best
    assert record.check("budget.kl", best).verdict is Verdict.FAIL
    assert f"the nearest is {best}" in str(record.metrics["reason"])
    assert search_of(record)["evaluations"] == len(TYPES)


def test_top_tokens_and_size_are_budgets_too(
    model: Path, reference: Path, compared: Record, tmp_path: Path
) -> None:
    rows = rows_of(compared)
    least = 0.5 * (rows["Q2_K"]["top1"] + rows["Q4_K_M"]["top1"])
    record = chosen(
        model,
        reference,
        tmp_path / "a",
        min_top1=least,
        max_size=rows["Q4_K_M"]["bytes"],
        max_evaluations=12,
    )
    assert record.verdict is Verdict.PASS
    found = rows_of(record)[str(record.metrics["recommended"])]
    assert found["top1"] >= least
    assert found["bytes"] <= rows["Q4_K_M"]["bytes"]
    too_small = chosen(
        model,
        reference,
        tmp_path / "b",
        min_top1=least,
        max_size=rows["Q2_K"]["bytes"],
        max_evaluations=3,
    )
    assert too_small.verdict is Verdict.FAIL


def test_a_size_alone_asks_for_the_best_file_of_that_size(
    model: Path, reference: Path, compared: Record, tmp_path: Path
) -> None:
    rows = rows_of(compared)
    limit = (rows["Q4_K_M"]["bytes"] + rows["Q8_0"]["bytes"]) // 2
    record = chosen(model, reference, tmp_path / "out", max_size=limit)
    assert record.metrics["recommended"] == "Q4_K_M-mixed"
    found = rows_of(record)["Q4_K_M-mixed"]
    assert rows["Q4_K_M"]["bytes"] < found["bytes"] <= limit
    assert found["kl_mean"] < rows["Q4_K_M"]["kl_mean"]


def test_the_whole_interval_can_be_asked_to_keep_the_budget(
    model: Path, reference: Path, compared: Record, tmp_path: Path
) -> None:
    rows = rows_of(compared)
    limit = rows["Q8_0"]["kl_mean"] * 1.0001  # the interval reaches beyond it
    options = {"max_kl": limit, "max_evaluations": 3}
    assert chosen(model, reference, tmp_path / "a", **options).verdict is Verdict.PASS
    strict = chosen(model, reference, tmp_path / "b", judge_by="interval", **options)
    assert strict.verdict is Verdict.FAIL
    assert strict.check("budget.kl").value == rows["Q8_0"]["kl_ci95"][1]


def test_reports_show_rows_speed_pairs_and_plots(compared: Record, tmp_path: Path) -> None:
    write_record(tmp_path / "record.json", compared)
    write_stage_reports(compared, tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    html = (tmp_path / "report.html").read_text()
    for text in (markdown, html):
        assert f"→ {compared.metrics['recommended']}" in text
        assert "Tokens per second on this machine" in text
        assert "Q2_K − Q4_K_M" in text
    assert "Quality against size" in html
    assert "Quality against speed" in html


def test_the_command_line(
    model: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [
        "quantize",
        str(model),
        "--type",
        "Q8_0",
        "--type",
        "Q4_K_M",
        "--threads",
        "1",
        "--set",
        "resamples=200",
        "--set",
        "repeats=1",
    ]
    judged = [*common, "--reference", str(reference)]
    assert run_main([*judged, "--compare", "--out", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "Files compared" in shown
    assert "→ " in shown
    assert (tmp_path / "a" / "report.html").is_file()
    assert json.loads((tmp_path / "a" / "record.json").read_text())["kind"] == "choose"
    assert run_main([*judged, "--max-kl", "1e-9", "--out", str(tmp_path / "b")]) == 1
    assert run_main([*judged, "--max-size", "2KB", "--out", str(tmp_path / "c")]) == 1
    assert run_main([*judged, "--out", str(tmp_path / "d")]) == 2
    assert "Add --compare" in capsys.readouterr().err
    missing = ["--compare", "--reference", str(model), "--out", str(tmp_path / "e")]
    assert run_main([*common, *missing]) == 3  # nothing there has a tokenizer
    few = ["--max-kl", "1", "--max-evaluations", "1", "--out", str(tmp_path / "f")]
    assert run_main([*judged, *few]) == 2


def test_choose_is_a_command_of_its_own(
    model: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        str(model),
        "--type",
        "Q8_0",
        "--reference",
        str(reference),
        "--threads",
        "1",
        "--quiet",
        "--set",
        "resamples=200",
        "--set",
        "repeats=1",
    ]
    assert run_main(["choose", *options, "--out", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().err == ""
    assert run_main(["quantize", *options, "--compare", "--out", str(tmp_path / "b")]) == 0
    assert "quantize --compare is so8tqc choose" in capsys.readouterr().err
    made = [json.loads((tmp_path / name / "record.json").read_text()) for name in ("a", "b")]
    assert made[0]["kind"] == made[1]["kind"] == "choose"
    assert [one["verdict"] for one in made] == ["pass", "pass"]


def test_windows_without_a_length_are_refused(
    model: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(model), "--reference", str(reference), "--out", str(tmp_path / "a")]
    assert run_main(["choose", *options, "--set", "stride=16"]) == 2
    assert "stride needs a longer ctx" in capsys.readouterr().err
    assert run_main(["choose", *options, "--stride", "16", "--ctx", "16"]) == 2


def test_a_reference_of_another_vocabulary_is_refused(
    model: Path, llama: Path, texts_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="vocabulary"):
        chosen(model, llama, tmp_path / "out", data=(str(texts_file),), max_tokens=16)


def test_weights_from_a_4_bit_file_are_recognised(model: Path, tmp_path: Path) -> None:
    grid = open_gguf(write_model(tmp_path / "grid-F16.gguf", four_bit, width=64))
    for name, tensor in grid.tensors.items():
        if len(tensor.shape) > 1:
            assert four_bit_share(tensor) > 0.99, name
            assert four_bit_share(open_gguf(model).tensors[name]) == 0.0


def test_a_ladder_that_is_not_monotone_is_explained_from_what_was_measured(tmp_path: Path) -> None:
    source = write_model(tmp_path / "grid-F16.gguf", four_bit, width=64)
    capture = write_capture(tmp_path / "reference.safetensors", source)
    record = chosen(source, capture, tmp_path / "out", types=("Q4_K_M", "Q5_K_M", "Q8_0"))
    files = {str(f["type"]): f for f in record.metrics["files"].values()}  # type: ignore[union-attr, index]
    # force the order that a real model shows, with this model's own tensors
    rows: Any = json.loads(json.dumps(rows_of(record)))
    rows["Q5_K_M"]["kl_mean"] = 2 * rows["Q4_K_M"]["kl_mean"]
    comparisons: Any = record.metrics["comparisons"]
    (found,) = inversions(rows, files, comparisons, open_gguf(source))
    assert (found["smaller"], found["larger"]) == ("Q4_K_M", "Q5_K_M")

    def error(kind: str, name: str) -> float:
        stored = open_gguf(tmp_path / "out" / f"grid-{kind}.gguf").tensors[name].values()
        before = open_gguf(source).tensors[name].values().astype(np.float64)
        return float(np.linalg.norm(stored - before) / np.linalg.norm(before))

    small, large = files["Q4_K_M"]["tensors"], files["Q5_K_M"]["tensors"]
    differ = [name for name in small if small[name]["type"] != large[name]["type"]]
    worse = [name for name in differ if error("Q5_K_M", name) > error("Q4_K_M", name)]
    assert (found["compared"], found["worse"]) == (len(differ), len(worse))
    assert worse  # steps of 1/31 miss a grid of 1/15
    assert found["error_larger"] == pytest.approx(
        np.mean([error("Q5_K_M", n) for n in worse]), rel=1e-4
    )
    assert found["columns"] == [64]
    assert "no multiple of 256" in found["sentence"]
    assert "the weights come from a 4-bit file" in found["sentence"]
    monotone = {name: {**row, "kl_mean": 1 / row["bytes"]} for name, row in rows.items()}
    assert inversions(monotone, files, comparisons, open_gguf(source)) == []  # type: ignore[arg-type]


def test_a_recipe_gives_the_mixture_though_libllama_counts_tensors(tmp_path: Path) -> None:
    model = write_model(tmp_path / "deep-F16.gguf", layers=9)
    made = quantize(
        QuantizeConfig(gguf=model, out=tmp_path / "q", types=("Q4_K_M", "Q6_K"), threads=1)
    )
    low, high = (open_gguf(Path(made.outputs[name].path)) for name in ("Q4_K_M", "Q6_K"))
    raised = {
        name
        for name, tensor in low.tensors.items()
        if "attn_v" in name and tensor.type != high.tensors[name].type
    }
    assert 0 < len(raised) < 9  # the recipe itself raises some
    mix(low, high, raised, tmp_path / "mixed.gguf")
    patterns = override_patterns(quantized_types(low, high, raised))
    config = QuantizeConfig(
        gguf=model, out=tmp_path / "again", types=("Q4_K_M",), tensor_types=patterns, threads=1
    )
    again = Path(quantize(config).outputs["Q4_K_M"].path)
    assert list(differing_tensors(tmp_path / "mixed.gguf", again)) == []
