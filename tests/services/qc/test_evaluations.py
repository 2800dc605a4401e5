"""What an earlier call computed is taken where every byte is the same, and only there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from so8tqc.config import BakeConfig, CaptureConfig, ExportConfig, QCConfig, QuantizeConfig
from so8tqc.llama.vendor import is_vendored
from so8tqc.record_files import write_record
from so8tqc.records import Record
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.attest.service import _kept_numbers
from so8tqc.services.bake import bake
from so8tqc.services.capture import capture
from so8tqc.services.export.service import export
from so8tqc.services.qc import evaluations, models
from so8tqc.services.qc.planned import ARITHMETIC, BASE, GATED, REFERENCE
from so8tqc.services.qc.service import qc
from so8tqc.services.qc.token_file import read_tokens, write_tokens
from so8tqc.services.quantize.service import quantize

Passes = list[tuple[set[str], set[tuple[str, str]]]]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """Of each pass over the texts: the models that ran, and the pairs."""
    seen: Passes = []
    compare = models.compare

    def watched(sources: Any, pairs: Any, *rest: Any) -> Any:
        seen.append(({source.name for source in sources}, set(pairs)))
        return compare(sources, pairs, *rest)

    monkeypatch.setattr(models, "compare", watched)
    return seen


class Bench:
    """A tiny model, its gates, and two bakes of it."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.gates, self.texts = folder / "gates.safetensors", folder / "texts.jsonl"
        self.one, self.two = folder / "one", folder / "two"

    def make(self) -> None:
        bake(BakeConfig(base=self.base, rotations=self.gates, out=self.one))
        two = BakeConfig(base=self.base, rotations=self.gates, out=self.two, baked_dtype="float32")
        bake(two)
        rows = [{"id": f"t{i}", "text": f"The {i}th text: rotations, {i}."} for i in "12"]
        self.texts.write_text("\n".join(map(json.dumps, rows)))

    def qc(self, *candidates: Path, **options: Any) -> Record:
        given: dict[str, Any] = {
            "reference": self.base, "rotations": self.gates, "candidates": candidates,
            "data": (str(self.texts),), "resamples": 100, "out": self.folder / "qc",
        }  # fmt: skip
        return qc(QCConfig.model_validate(given | options))


class Earlier(NamedTuple):
    """A bench of which one bake was judged, into ``kept``."""

    bench: Bench
    record: Record
    tokens: bytes


@pytest.fixture(scope="module")
def earlier(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Earlier:
    bench = Bench(make_model("llama"), tmp_path_factory.mktemp("evaluations"))
    write_native(
        bench.gates,
        {Target(i): np.random.default_rng(i).normal(size=(8, 8, 8)) * 0.3 for i in range(3)},
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )
    bench.make()
    record = bench.qc(bench.one, evaluation_folder=bench.folder / "kept")
    return Earlier(bench, record, (bench.folder / "qc" / "tokens.npz").read_bytes())


@pytest.fixture
def bench(earlier: Earlier, tmp_path: Path) -> Bench:
    """A copy at another place: paths do not count."""
    shutil.copytree(earlier.bench.folder, tmp_path / "bench")
    return Bench(earlier.bench.base, tmp_path / "bench")


@pytest.fixture
def first(earlier: Earlier) -> Record:
    """The bench's one bake, when it was judged."""
    return earlier.record


@pytest.fixture
def kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What was kept then."""
    folder = bench.folder / "kept"
    monkeypatch.setattr(evaluations, "default_folder", lambda: folder)
    return folder


def judged(record: Record) -> dict[str, Any]:
    """All that a record says, but when, and what was kept."""
    told: dict[str, Any] = record.model_dump(mode="json", exclude={"run", "outputs"})
    told["metrics"].pop("kept", None)
    for name in ("inputs", "config"):  # they hold paths
        told.pop(name)
    told["notices"] = [n for n in told["notices"] if "by earlier calls" not in n]
    return told


PAIRS = {
    (BASE, REFERENCE), (REFERENCE, ARITHMETIC), (REFERENCE, "noise floor bfloat16"),
    (REFERENCE, "one"),
}  # fmt: skip


def test_the_same_again_runs_nothing_and_says_so(
    bench: Bench, kept: Path, passes: Passes, earlier: Earlier
) -> None:
    again = bench.qc(bench.one)
    assert not passes
    assert judged(again) == judged(earlier.record)
    assert (bench.folder / "qc" / "tokens.npz").read_bytes() == earlier.tokens
    assert not earlier.record.metrics.get("kept")
    assert set(again.metrics["kept"]) == {f"{a} → {b}" for a, b in PAIRS}
    (told,) = [n for n in again.notices if "by earlier calls" in n]
    assert told.startswith("4 of 4 comparisons")


def test_one_candidate_more_runs_the_reference_and_that_candidate(
    bench: Bench, kept: Path, passes: Passes
) -> None:
    both = bench.qc(bench.one, bench.two)
    models_run, pairs = passes[0]
    floor = {"noise floor float32"}  # of another storage dtype than the first's
    assert models_run == {REFERENCE, "two"} | floor
    assert pairs == {(REFERENCE, "two")} | {(REFERENCE, name) for name in floor}
    anew = bench.qc(bench.one, bench.two, evaluation_cache=False)
    assert passes[1][0] > {BASE, ARITHMETIC, "one"}
    assert judged(anew)["checks"] == judged(both)["checks"]
    assert judged(anew)["metrics"] == judged(both)["metrics"]


@pytest.mark.parametrize(
    "options",
    [
        {"resamples": 150},
        {"seed": 5},
        {"fail_on": ("kl.mean",)},
        {"profile": "strict.yaml"},
        {"threads": 1},
    ],
)
def test_what_only_judges_runs_no_model(
    bench: Bench, kept: Path, passes: Passes, options: dict[str, Any]
) -> None:
    if "profile" in options:
        path = bench.folder / str(options["profile"])
        path.write_text("strict:\n  models: {kl.mean: {limit: 1e-30}}\n  gguf: {default: {}}\n")
        options = {"profile": str(path)}
    bench.qc(bench.one, **options)
    assert not passes


def other_bytes(bench: Bench) -> dict[str, Any]:
    """The same path, size and times, one weight changed."""
    file = bench.one / "model.safetensors"
    told = file.stat()
    tensors = load_file(str(file))
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, str(file), {"format": "pt"})
    assert file.stat().st_size == told.st_size
    os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns))
    return {}


def other_gates(bench: Bench) -> dict[str, Any]:
    """Read in the other direction: the file is the same."""
    return {"rotation_options": {"convention": "row", "parametrization": "exp", "site": "input"}}


def other_text(bench: Bench) -> dict[str, Any]:
    bench.texts.write_text(bench.texts.read_text().replace("rotations", "reflections"))
    return {}


def other_id(bench: Bench) -> dict[str, Any]:
    bench.texts.write_text(bench.texts.read_text().replace("t1", "t9"))
    return {}


@pytest.mark.parametrize(
    "change",
    [
        other_bytes,
        other_gates,
        other_text,
        other_id,
        lambda _: {"max_tokens": 8},
        lambda _: {"compute_dtype": "float64"},
        lambda _: {"protocol": "native", "ctx": 8, "stride": 4},
        lambda _: {"stream": True},
        lambda _: {"until": 1.0},
    ],
)
def test_what_changes_a_number_runs_the_models(
    bench: Bench, kept: Path, passes: Passes, change: Callable[[Bench], dict[str, Any]]
) -> None:
    after = bench.qc(bench.one, **change(bench))
    assert (REFERENCE, "one") in passes[0][1]
    assert f"{REFERENCE} → one" not in after.metrics.get("kept", {})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, flip, empty, folder])
def test_a_damaged_one_is_made_again(
    bench: Bench, kept: Path, passes: Passes, first: Record, damage: Callable[[Path], None]
) -> None:
    for path in kept.glob("*.npz"):
        damage(path)
    again = bench.qc(bench.one)
    assert judged(again)["checks"] == judged(first)["checks"]
    # one byte may be of a file's name or date in the archive: its content is whole then
    assert passes[0][1] == PAIRS or (damage is flip and passes[0][1] < PAIRS)


def test_one_that_belongs_to_another_key_is_not_believed(
    bench: Bench, kept: Path, passes: Passes, first: Record
) -> None:
    files = sorted(kept.glob("*.npz"))
    contents = [path.read_bytes() for path in files]
    for path, content in zip(files, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    assert judged(bench.qc(bench.one))["checks"] == judged(first)["checks"]
    assert passes[0][1] == PAIRS


def test_other_values_under_the_right_key_are_not_believed(
    bench: Bench, kept: Path, passes: Passes, first: Record
) -> None:
    for path in kept.glob("*.npz"):
        ((name, table),) = read_tokens(path).items()
        columns = {**table.columns, "kl": table.columns["kl"] / 2}
        write_tokens(path, {name: replace(table, columns=columns)})
    assert judged(bench.qc(bench.one))["checks"] == judged(first)["checks"]
    assert passes[0][1] == PAIRS


def test_models_that_memory_makes_streamed_are_others(
    bench: Bench, kept: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("so8tqc.sources.layerwise.choice.free_memory", lambda: 1)
    bench.qc(bench.one)
    assert passes[0][1] == PAIRS


def test_what_changes_while_it_runs_is_not_kept(
    bench: Bench, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(kept.iterdir())
    real = models._run

    def run(*given: Any) -> Any:
        ran = real(*given)
        with (bench.two / "config.json").open("a") as file:
            file.write(" ")
        return ran

    monkeypatch.setattr(models, "_run", run)
    bench.qc(bench.two)
    assert sorted(kept.iterdir()) == before


def test_of_a_pass_in_which_a_model_failed_nothing_is_kept(
    bench: Bench, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(kept.iterdir())
    real = models._run
    failed = {"broken.gguf": "it does not load"}
    monkeypatch.setattr(models, "_run", lambda *given: real(*given)._replace(failed=failed))
    assert bench.qc(bench.two).check("logits.run").failed
    assert sorted(kept.iterdir()) == before


def test_a_statement_says_that_numbers_are_of_earlier_calls(
    bench: Bench, kept: Path, first: Record
) -> None:
    write_record(bench.folder / "qc" / "record.json", first)
    assert _kept_numbers(bench.folder) == ()
    write_record(bench.folder / "qc" / "record.json", bench.qc(bench.one))
    (told,) = _kept_numbers(bench.folder)
    assert told.startswith("4 comparisons")


def test_the_oldest_goes_where_there_is_too_much(
    bench: Bench, kept: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in kept.glob("*.npz"))
    monkeypatch.setattr(evaluations, "MOST_BYTES", size)
    for path in kept.glob("*.npz"):
        os.utime(path, (1, path.stat().st_mtime))
    bench.qc(bench.one, max_tokens=8)
    left = list(kept.glob("*.npz"))
    assert 0 < sum(path.stat().st_size for path in left) <= size
    bench.qc(bench.one, max_tokens=8)
    assert len(passes) == 1  # the newer ones stayed


def test_it_can_be_left_out_or_lie_elsewhere(bench: Bench, kept: Path, passes: Passes) -> None:
    before = sorted(kept.glob("*"))
    bench.qc(bench.one, evaluation_cache=False)
    bench.qc(bench.one, evaluation_folder=bench.folder / "elsewhere")
    assert len(passes) == 2
    assert sorted(kept.glob("*")) == before
    bench.qc(bench.one, evaluation_folder=bench.folder / "elsewhere")
    assert len(passes) == 2


def test_a_folder_that_takes_nothing_costs_nothing(
    bench: Bench, kept: Path, passes: Passes
) -> None:
    shutil.rmtree(kept)
    kept.write_text("a file where the folder should be")
    record = bench.qc(bench.one)
    assert record.verdict == bench.qc(bench.one).verdict
    assert len(passes) == 2
    assert any("could not be kept" in notice for notice in record.notices)


@pytest.mark.llama
@pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first")
def test_a_quantized_file_brings_its_floor_and_its_readings(
    bench: Bench, kept: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    f16 = bench.folder / "tiny-F16.gguf"
    export(ExportConfig(model=bench.one, out=f16, type="f16"))
    quantize(QuantizeConfig(gguf=f16, types=("Q8_0",), out=bench.folder / "q", threads=1))
    (q8,) = (bench.folder / "q").glob("*Q8_0.gguf")
    options: dict[str, Any] = {"gguf_reading": "both"}
    first = bench.qc(q8, **options)
    name = q8.name
    assert (REFERENCE, f"quantization floor of {name}") in passes[0][1]
    assert {(BASE, name), (REFERENCE, f"{name} (weights)")} < passes[0][1]

    def again(*_: object) -> Path:
        raise AssertionError("the floor is encoded again")

    monkeypatch.setattr("so8tqc.services.qc.quantization_floor.write_honest", again)
    assert judged(bench.qc(q8, **options)) == judged(first)
    assert len(passes) == 1
    more = bench.qc(f16, q8, **options)
    assert passes[1][1] == {
        (BASE, f16.name), (REFERENCE, f16.name), (REFERENCE, f"{f16.name} (weights)"),
        (f"{f16.name} (weights)", f16.name),
    }  # fmt: skip
    assert {c.id for c in more.checks if c.subject == name} == {
        c.id for c in first.checks if c.subject == name
    }
    copy = bench.folder / "renamed.gguf"  # the bytes count, and no name
    shutil.copyfile(q8, copy)
    bench.qc(copy, **options)
    assert len(passes) == 2


def test_a_recorded_reference_is_known_by_its_logits(
    bench: Bench, kept: Path, passes: Passes
) -> None:
    recorded = bench.folder / "recorded.safetensors"
    told: dict[str, Any] = {
        "model": bench.base, "rotations": bench.gates, "data": (str(bench.texts),),
        "out": recorded, "dtype": "float32",
    }  # fmt: skip
    capture(CaptureConfig.model_validate(told))
    options: dict[str, Any] = {"reference": recorded, "base": bench.base}
    first = bench.qc(bench.one, **options)
    assert judged(bench.qc(bench.one, **options)) == judged(first)
    assert [pairs for _, pairs in passes] == [
        {
            (REFERENCE, GATED), (BASE, REFERENCE), (GATED, ARITHMETIC),
            (GATED, "noise floor bfloat16"), (REFERENCE, "one"),
        },
    ]  # fmt: skip
    tensors = load_file(str(recorded))
    changed = {n: t * 1.5 if n.startswith("logits") else t for n, t in tensors.items()}
    with safe_open(str(recorded), framework="pt") as file:
        save_file(changed, str(recorded), file.metadata())
    bench.qc(bench.one, **options)
    assert passes[1][1] == {(REFERENCE, GATED), (BASE, REFERENCE), (REFERENCE, "one")}
