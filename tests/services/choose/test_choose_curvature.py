"""``choose --solver hessian``: mixtures by what each tensor is predicted to cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from so8tqc.cli.main import run as run_main
from so8tqc.config import ExportConfig, QuantizeConfig
from so8tqc.gguf.file import GGUFFile, GGUFTensor, open_gguf
from so8tqc.llama.vendor import is_vendored
from so8tqc.record_kinds.choose import Row
from so8tqc.record_kinds.quantize import Chosen, Mixture, QuantizedFile, QuantizedTensor
from so8tqc.services.choose.budget import Budget
from so8tqc.services.choose.curvature import (
    MIXTURES,
    Costs,
    Made,
    best_of_size,
    smallest_of_quality,
)
from so8tqc.services.choose.search import Search
from so8tqc.services.export.service import write_gguf
from so8tqc.services.quantize.mixture import TooSmallError, stored_bytes
from so8tqc.services.quantize.service import quantize
from wide_llama import DOCS, write_calibration, write_wide

TYPES = ("Q4_0", "Q5_0", "Q8_0")
COSTS = {"Q4_0": 1.0, "Q5_0": 0.25, "Q8_0": 0.003}
TAKEN = 1000


def _source(count: int = 5) -> GGUFFile:
    tensors = {
        f"blk.{i}.w.weight": GGUFTensor(
            f"blk.{i}.w.weight", "F16", (32 * (i + 1), 64), 0, 0, np.zeros(0, np.uint8)
        )
        for i in range(count)
    }
    return GGUFFile(Path("a.gguf"), {}, tensors)


def _mixture(source: GGUFFile, predicted: float = 0.0) -> Mixture:
    kl = {
        name: {type_: cost * 0.01 * (3 + i) for type_, cost in COSTS.items()}
        for i, name in enumerate(source.tensors)
    }

    def size(type_: str) -> int:
        return TAKEN + sum(stored_bytes(t, type_) for t in source.tensors.values())

    return Mixture(
        max_bytes=0,
        bytes=0,
        smallest=size("Q4_0"),
        largest=size("Q8_0"),
        tokens=0,
        predicted_kl=predicted,
        measured_kl=0.0,
        prediction_error=None,
        evaluations=6,
        families={},
        tensors={name: Chosen(type="Q8_0", kl=of) for name, of in kl.items()},
        given={"output.weight": "Q6_K"},
    )


def _entry(types: Mapping[str, str]) -> QuantizedFile:
    return QuantizedFile(
        type="Q4_K_M",
        path="x",
        bytes=0,
        bits_per_weight=0.0,
        types={},
        fallbacks={},
        tensors={
            name: QuantizedTensor(
                type=type_, bits_per_weight=0.0, relative_error=None, fallback=None
            )
            for name, type_ in types.items()
        },
        layer_error={},
        attention_output_error={},
    )


class _World:
    """Files whose measured KL is 1.4 × the true sum of costs, and 0.01 more."""

    def __init__(self) -> None:
        self.source = _source()
        self.costs = Costs(_mixture(self.source), self.source)
        self.made: list[QuantizedFile] = []

    def row(self, types: Mapping[str, str]) -> Row:
        kl = _mixture(self.source).tensors
        total = 0.01 + 1.4 * sum(of.kl[types[name]] for name, of in kl.items())
        row: Any = {
            "bytes": TAKEN
            + sum(stored_bytes(self.source.tensors[name], types[name]) for name in kl),
            "kl_mean": total,
            "kl_ci95": None,
            "top1": 1 - total,
            "top1_ci95": None,
        }
        return row

    def of_types(self, types: Mapping[str, str]) -> Made:
        self.made.append(_entry(types))
        return Made(Path(str(len(self.made))), self.made[-1], ())

    def first(self, limit: int) -> tuple[Made, Mixture]:
        if limit < self.costs.smallest:
            raise TooSmallError(f"nothing is as small as {limit}")
        types, predicted = self.costs.best(limit)
        return self.of_types(types), _mixture(self.source, predicted)

    def measure(self, made: Made) -> Row:
        return self.row({name: tensor.type for name, tensor in made.entry.tensors.items()})

    def all_files(self) -> list[Row]:
        names = list(self.source.tensors)
        return [self.row(dict(zip(names, some, strict=True))) for some in product(TYPES, repeat=5)]


def _pure(world: _World) -> tuple[dict[str, Row], dict[str, QuantizedFile]]:
    types = {t: dict.fromkeys(world.source.tensors, t) for t in TYPES}
    return {t: world.row(of) for t, of in types.items()}, {t: _entry(of) for t, of in types.items()}


def test_the_sum_of_costs_is_a_files_and_given_types_go_along() -> None:
    world = _World()
    _, files = _pure(world)
    expected = 0.01 * sum(3 + i for i in range(5))
    assert world.costs.predicted(files["Q4_0"]) == pytest.approx(expected)
    assert world.costs.predicted(_entry(dict.fromkeys(world.source.tensors, "Q6_K"))) is None
    types, predicted = world.costs.best(world.costs.largest)
    assert types == {**dict.fromkeys(world.source.tensors, "Q8_0"), "output.weight": "Q6_K"}
    assert predicted == pytest.approx(0.003 * expected)
    for kl in (0.0005, 0.003, 0.02, 0.1, 5.0):
        size = world.costs.smallest_with(kl)
        fits = [
            row["bytes"] for row in world.all_files() if (row["kl_mean"] - 0.01) / 1.4 <= kl + 1e-12
        ]
        assert size == min(fits, default=world.costs.largest)


@pytest.mark.parametrize(
    "budget", [Budget(0.06, None, None, False), Budget(None, 0.92, None, False)]
)
def test_a_few_files_find_the_smallest_that_keeps_a_quality(budget: Budget) -> None:
    world = _World()
    rows, files = _pure(world)
    found = Search()
    best = smallest_of_quality(
        rows, files, budget, world.source, world.first, world.of_types, world.measure, found, 9
    )
    assert best is not None
    assert not budget.missed(best.row)
    assert len(world.made) == len(found.tried) <= MIXTURES
    possible = min(row["bytes"] for row in world.all_files() if not budget.missed(row))
    assert best.row["bytes"] <= 1.03 * possible
    assert best.row["bytes"] < rows["Q8_0"]["bytes"]
    assert "smaller than the smallest type's file" in found.ended


def test_where_no_types_file_has_the_quality_nothing_is_made() -> None:
    world = _World()
    rows, files = _pure(world)
    found = Search()
    budget = Budget(1e-3, None, None, by_interval=False)
    assert (
        smallest_of_quality(
            rows, files, budget, world.source, world.first, world.of_types, world.measure, found, 9
        )
        is None
    )
    assert world.made == []
    assert found.ended == "No type's file has the quality asked for."


def test_below_the_smallest_type_there_is_nothing_to_try() -> None:
    world, found = _World(), Search()
    rows, files = _pure(world)
    budget = Budget(9.0, None, None, by_interval=False)
    best = smallest_of_quality(
        rows, files, budget, world.source, world.first, world.of_types, world.measure, found, 9
    )
    assert best is None
    assert found.ended.startswith("Nothing is as small as")


def test_a_size_takes_one_file_and_one_that_nothing_has_none() -> None:
    world, found = _World(), Search()
    budget = Budget(None, None, world.costs.smallest + 2000, by_interval=False)
    best = best_of_size(world.costs.smallest + 2000, world.first, world.measure, budget, found)
    assert best is not None
    fits = [row for row in world.all_files() if not budget.missed(row)]
    assert best.row["kl_mean"] == pytest.approx(min(row["kl_mean"] for row in fits))
    assert len(found.tried) == 1
    assert found.prediction is not None
    assert best_of_size(TAKEN, world.first, world.measure, budget, found) is None
    assert found.ended == f"Nothing is as small as {TAKEN}."


@pytest.mark.llama
@pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first")
def test_the_command_line_makes_it_of_a_real_file(tokenizer_files: Path, tmp_path: Path) -> None:
    model = write_wide(tmp_path / "model", tokenizer_files)
    text = write_calibration(tmp_path / "calibration.txt")
    exported = tmp_path / "wide-F16.gguf"
    write_gguf(ExportConfig(model=model, out=exported))
    judge = tmp_path / "judge.jsonl"
    words = (DOCS / "architecture.md").read_text(encoding="utf-8")
    parts = [words[start : start + 900] for start in range(0, 7200, 900)]
    judge.write_text("\n".join(json.dumps({"text": part}) for part in parts), encoding="utf-8")
    out = tmp_path / "chosen"
    command = ["choose", str(exported), "--type", "Q4_K_M", "--type", "Q8_0", "--max-size", "235kB"]
    command += ["--solver", "hessian", "--model", str(model), "--hessian-data", str(text)]
    command += ["--hessian-tokens", "2048", "--tokenizer", str(model), "--data", str(judge)]
    command += ["--max-tokens", "100", "--set", "repeats=1", "--set", "resamples=200"]
    code = run_main([*command, "--out", str(out), "--quiet"])
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    found = record["metrics"]
    assert code == 0
    assert found["recommended"] == "Q4_K_M-mixed"
    row = found["rows"]["Q4_K_M-mixed"]
    file = out / "wide-Q4_K_M-mixed.gguf"
    assert row["bytes"] == file.stat().st_size <= 235_000
    assert found["search"]["evaluations"] == 3
    prediction = found["search"]["prediction"]
    assert abs(prediction["prediction_error"]) < 0.4
    stored = {name: tensor.type for name, tensor in open_gguf(file).tensors.items()}
    assert {n: c["type"] for n, c in prediction["tensors"].items()} == {
        name: type_ for name, type_ in stored.items() if type_ != "F32"
    }
    _is_what_its_recipe_makes(found["files"][file.name]["recipe"], file, exported, tmp_path)

    between = (found["rows"]["Q8_0"]["kl_mean"] * row["kl_mean"]) ** 0.5
    asked = ["--max-kl", f"{between:.3g}", "--hessians", str(out / "wide-hessians.npz")]
    start = command.index("--max-size")
    command[start : start + 2] = asked
    code = run_main([*command, "--out", str(tmp_path / "quality"), "--quiet"])
    record = json.loads((tmp_path / "quality" / "record.json").read_text(encoding="utf-8"))
    found = record["metrics"]
    assert code == 0
    assert found["recommended"] == "Q4_K_M-mixed"
    smaller = found["rows"]["Q4_K_M-mixed"]
    assert smaller["kl_mean"] <= between
    assert row["bytes"] < smaller["bytes"] < found["rows"]["Q8_0"]["bytes"]
    assert found["search"]["evaluations"] <= 2 + MIXTURES
    assert any("smaller than the smallest type's file" in notice for notice in record["notices"])


def _is_what_its_recipe_makes(
    recipe: Mapping[str, Any], file: Path, exported: Path, tmp_path: Path
) -> None:
    again = quantize(
        QuantizeConfig(
            gguf=exported,
            out=tmp_path / "again",
            types=(recipe["type"],),
            tensor_types=tuple(recipe["tensor_types"]),
            solver="hessian",
            hessians=file.parent / "wide-hessians.npz",
        )
    )
    assert Path(again.outputs[recipe["type"]].path).read_bytes() == file.read_bytes()


def test_a_model_directory_that_is_none_is_told_before_anything_is_made(
    tokenizer_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["choose", str(tmp_path / "a-F16.gguf"), "--max-size", "1MB", "--solver", "hessian"]
    code = run_main([*command, "--out", str(tmp_path / "out"), "--model", str(tokenizer_files)])
    assert code == 3
    assert str(tokenizer_files) in capsys.readouterr().err
    assert not (tmp_path / "out" / "record.json").exists()
