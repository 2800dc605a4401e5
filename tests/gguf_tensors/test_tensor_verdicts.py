"""Every tensor of a GGUF: honest files are not accused; planted faults are found and located."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from planted import Bench, Change, bench_of, decoded, file_of, save_model, stored

from so8tqc.gguf.file import GGUFFile
from so8tqc.llama.vendor import is_vendored
from so8tqc.quantizers.grids import GRIDS
from so8tqc.quantizers.packing import unpack
from so8tqc.quantizers.solve import damped, solve
from so8tqc.quantizers.steps import RULES, groups_of
from so8tqc.record_kinds.tensors import TensorRow
from so8tqc.records import Verdict
from so8tqc.services.tensors.expected import Expected
from so8tqc.services.tensors.measure import ROUNDINGS, measure
from so8tqc.services.tensors.service import (
    diagnose_tensors,
    judge_tensors,
    tensor_checks,
    wrong_of,
)

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]

ARCHITECTURES = ("llama", "qwen2", "mixtral", "gemma2")
TYPES = ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_1", "Q4_0", "IQ4_XS",
         "IQ3_S")  # fmt: skip

Benches = Callable[[str], Bench]


@pytest.fixture(scope="session")
def benches(tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Benches:
    made: dict[str, Bench] = {}

    def make(architecture: str) -> Bench:
        if architecture not in made:
            folder = tmp_path_factory.mktemp("tensors") / architecture
            made[architecture] = bench_of(save_model(folder, architecture, tokenizer_files))
        return made[architecture]

    return make


@pytest.mark.parametrize("type_", sorted(GRIDS))
def test_a_group_has_the_scale_that_its_block_unpacks_to(type_: str) -> None:
    grid, rule = GRIDS[type_], RULES[type_]
    raw = np.random.default_rng(1).integers(0, 256, (500, grid.bytes), dtype=np.uint8)
    blocks, groups = unpack(raw, grid), groups_of(raw, rule)
    scale = blocks.d.astype(np.float32)[:, None] * blocks.scales
    least = blocks.dmin.astype(np.float32)[:, None] * blocks.mins
    np.testing.assert_array_equal(groups.scale, scale)
    np.testing.assert_array_equal(groups.least, least)


@pytest.mark.parametrize("type_", ["Q8_0", "Q4_K", "IQ4_XS"])
def test_weights_outside_are_those_that_another_level_is_nearer_to(type_: str) -> None:
    """Against every level of the grid, tried one by one in float64."""
    grid = GRIDS[type_]
    x = np.random.default_rng(2).standard_t(4, (8, 256)).astype(np.float32)
    data = stored(x * np.float32(1.3), type_)
    blocks = unpack(data.reshape(-1, grid.bytes), grid)
    scale = blocks.d.astype(float)[:, None, None] * blocks.scales[:, :, None]
    least = blocks.dmin.astype(float)[:, None, None] * blocks.mins[:, :, None]
    weights = x.astype(float).reshape(len(blocks.d), -1, grid.group)
    levels = scale * grid.values[grid.lowest_code :, None, None, None] - least
    nearest = np.abs(levels - weights).min(axis=0)
    off = np.abs(decoded(data, type_, 256).astype(float).reshape(weights.shape) - weights)
    step = np.abs(scale) + 0 * weights
    slack = 1e-3 * (np.abs(weights) + step) if RULES[type_].rounded_after else 1e-5 * step
    tensor = file_of_one("a", x, type_, data).tensors["a"]
    found = measure(tensor, x, ROUNDINGS[0])
    assert int((off > nearest + 2 * slack).sum()) <= found.outside <= int((off > nearest).sum())
    assert found.outside > 100


def file_of_one(name: str, weights: np.ndarray, type_: str, data: np.ndarray) -> GGUFFile:
    from so8tqc.gguf.file import GGUFTensor

    tensor = GGUFTensor(name, type_, weights.shape, data.nbytes, 0, data)
    return GGUFFile(Path("made.gguf"), {"general.architecture": "llama"}, {name: tensor})


@pytest.mark.parametrize("importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_honest_file_is_accused(benches: Benches, architecture: str, importance: bool) -> None:
    bench = benches(architecture)
    for type_ in TYPES:
        file = file_of(bench, type_, importance=importance)
        rows = judge_tensors(file, bench.expected)
        assert [(type_, r.name, r.verdict, r.detail) for r in rows if not r.honest] == []
        assert len(rows) == len(bench.weights)
        if type_ not in ("F16", "BF16") and not importance:
            assert {r.verdict for r in rows} == {"exact", "plain"}
        checks = tensor_checks(rows, file, bench.expected)
        assert {check.verdict for check in checks} == {Verdict.PASS}


@pytest.mark.parametrize("through", ["F16", "BF16"])
def test_a_file_between_that_rounds_is_honest(benches: Benches, through: str) -> None:
    bench = benches("llama")
    name = "blk.0.attn_q.weight"
    rounded = decoded(stored(bench.weights[name], through), through, 256)
    fine = bench.weights[name] + rounded * np.float32(2**-10)  # more bits than bfloat16 has
    expected = replaced(bench, {name: fine})
    file = file_of(Bench(expected, {}, {name: fine}), "Q6_K", through=through)
    assert [row.verdict for row in judge_tensors(file, expected)] == ["plain"]


def replaced(bench: Bench, weights: dict[str, np.ndarray]) -> Expected:
    """The bench's expectation, with other weights."""

    class Other(Expected):
        def values(self, name: str, *, dtype: str = "keep", baked: bool = True) -> np.ndarray:
            return weights[name] if name in weights else super().values(name)

    return Other(**vars(bench.expected) | {"conversion": bench.expected.conversion})


@pytest.mark.parametrize("type_", ["Q4_K", "Q8_0", "Q6_K", "Q4_0"])
def test_a_file_whose_errors_are_made_up_for_is_honest(benches: Benches, type_: str) -> None:
    """Our own solver, on inputs that go together as those of a layer do."""
    bench = benches("llama")
    generator = np.random.default_rng(3)
    hidden = generator.normal(size=(2048, 48)) @ generator.normal(size=(48, 256))
    inputs = hidden + generator.normal(size=hidden.shape)
    curvature = damped(inputs.T @ inputs / len(inputs), 0.01)

    def solved(data: np.ndarray, name: str) -> np.ndarray:
        return solve(bench.weights[name], curvature, type_).stored

    names = [n for n in bench.weights if n.endswith(("attn_q.weight", "ffn_up.weight"))]
    changed = {n: (lambda data, n=n: solved(data, n)) for n in names}
    rows = judge_tensors(file_of(bench, type_, bytes_changed=changed), bench.expected)
    assert {r.verdict for r in rows if r.name in names} == {"compensated"}
    assert wrong_of(rows) == []
    only = {names[0]: changed[names[0]]}
    alone = judge_tensors(file_of(bench, type_, bytes_changed=only), bench.expected)
    assert [(r.name, r.verdict) for r in wrong_of(alone)] == [(names[0], "edited")]


def whole(factor: float) -> Change:
    return lambda x: x * np.float32(factor)


def part(index: object, factor: float) -> Change:
    def change(x: np.ndarray) -> np.ndarray:
        x.reshape(-1, x.shape[-1])[index] *= np.float32(factor)
        return x

    return change


def noisy(share: float) -> Change:
    generator = np.random.default_rng(9)
    return lambda x: (x + share * x.std() * generator.normal(size=x.shape)).astype(np.float32)


FAULTS: dict[str, tuple[Change, int | None, str]] = {
    **{f"times {1 + f}": (whole(1 + f), 0, "") for f in (0.005, 0.02, 0.05, 0.2)},
    "noise of 2 %": (noisy(0.02), 0, ""),
    "a row times 1.05": (part(5, 1.05), 1, "row 5"),
    "a row times 1.2": (part(5, 1.2), 1, "row 5"),
    "a block times 1.05": (part((7, slice(64, 96)), 1.05), 2, "row 7 from column 64"),
    "a block times 1.2": (part((7, slice(64, 96)), 1.2), 2, "row 7 from column 64"),
    "a column times 1.2": (part((slice(None), 9), 1.2), None, "column 9"),
}
"""Fault → the change, which of ``shows`` it is compared with, what is said of its place."""


@pytest.mark.parametrize("type_", ["F16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mixtral"])
def test_planted_faults_are_found_and_located(
    benches: Benches, architecture: str, type_: str
) -> None:
    bench = benches(architecture)
    missed: list[tuple[str, str]] = []
    cases = 0
    for name, weights in bench.weights.items():
        if not name.startswith("blk.1.") and name.startswith("blk."):
            continue
        for fault, (change, against, place) in FAULTS.items():
            if weights.reshape(-1, weights.shape[-1]).shape[0] < 8 and place:
                continue
            one = Bench(bench.expected, {}, {name: weights})
            for importance in (False, True)[: 1 if type_ == "F16" else 2]:
                cases += 1
                file = file_of(one, type_, changes={name: change}, importance=importance)
                (row,) = judge_tensors(file, bench.expected)
                if row.honest:
                    missed.append((name, fault))
                    assert against is not None, (name, fault)
                    assert row.shows is not None
                    assert row.shows[against] > 0.2 * size_of(fault), (name, fault, row)
                    continue
                assert row.verdict == "edited", (name, fault, row)
                assert place in row.detail, (name, fault, row.detail)
    assert len(missed) <= 0.05 * cases, missed


def size_of(fault: str) -> float:
    """The relative change that a fault's name states."""
    return float(fault.rsplit(" ", 1)[1]) - 1


@pytest.mark.parametrize("type_", ["F16", "Q8_0", "Q4_K"])
def test_what_was_stored_instead_is_named(benches: Benches, type_: str) -> None:
    bench = benches("mixtral")
    weights = bench.weights
    q, up = "blk.1.attn_q.weight", "blk.1.ffn_up_exps.weight"

    def judged(name: str, change: Change) -> TensorRow:
        rows = judge_tensors(file_of(bench, type_, changes={name: change}), bench.expected)
        (row,) = wrong_of(rows)
        assert row.name == name
        return row

    row = judged(q, lambda _: weights["blk.2.attn_q.weight"])
    assert (row.verdict, row.detail.split(" (")[0]) == (
        "other tensor", "it holds the weights of blk.2.attn_q.weight",
    )  # fmt: skip
    row = judged(q, lambda x: x.reshape(4, 32, 2, -1).swapaxes(1, 2).reshape(x.shape))
    assert "its rows in another order: 2 in the place of 1" in row.detail
    row = judged(q, lambda x: np.ascontiguousarray(x.T))
    assert "its transpose" in row.detail
    row = judged(up, lambda x: x[[0, 3, 2, 1]])
    assert "expert 1 holds the weights of expert 3" in row.detail
    row = judged(q, lambda x: np.random.default_rng(0).normal(size=x.shape) * x.std())
    assert (row.verdict, "another model" in row.detail) == ("other tensor", True)
    row = judged("output_norm.weight", lambda x: x - np.float32(1))
    assert "the norm's 1 was not added" in row.detail
    row = judged(up, lambda x: x * 0)
    assert row.verdict == "damaged"
    row = judged("blk.0.attn_norm.weight", lambda x: x * np.float32(np.nan))
    assert row.verdict == "damaged"


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize(
    ("type_", "through"),
    [("Q8_0", "Q4_0"), ("Q8_0", "Q4_K"), ("Q8_0", "Q6_K"), ("Q4_K", "Q8_0"), ("Q4_K", "Q4_0"),
     ("F16", "Q8_0"), ("Q6_K", "Q5_K"), ("Q4_0", "Q8_0")],
)  # fmt: skip
def test_a_coarser_source_is_named(
    benches: Benches, type_: str, through: str, importance: bool
) -> None:
    bench = benches("llama")
    file = file_of(bench, type_, through=through, importance=importance and type_ != "F16")
    rows = [r for r in judge_tensors(file, bench.expected) if r.type == type_]
    assert {(r.verdict, r.detail.split(" (")[0]) for r in rows} == {
        ("coarser source", f"made from a file of {through}")
    }
    (told,) = diagnose_tensors(rows, "file")
    assert told.code == "coarser_source"


@pytest.mark.parametrize(("type_", "byte"), [("Q8_0", 1), ("Q4_K", 1), ("Q4_K", 5), ("Q6_K", 209)])
def test_a_bit_of_a_scale_is_found(benches: Benches, type_: str, byte: int) -> None:
    bench = benches("llama")
    name = "blk.1.ffn_up.weight"

    def flip(data: np.ndarray) -> np.ndarray:
        data[3, byte] ^= 2
        return data

    rows = judge_tensors(file_of(bench, type_, bytes_changed={name: flip}), bench.expected)
    (row,) = wrong_of(rows)
    assert (row.name, row.verdict, "row 3" in row.detail) == (name, "edited", True), row.detail


def test_tensors_that_are_lost_or_added_are_named(benches: Benches) -> None:
    bench = benches("qwen2")
    file = file_of(bench, "F16")
    bias = file.tensors.pop("blk.0.attn_q.bias")
    file.tensors["blk.9.attn_q.bias"] = bias
    checks = {
        c.id: c for c in tensor_checks(judge_tensors(file, bench.expected), file, bench.expected)
    }
    assert (checks["tensors.missing"].value, "attn_q.bias" in checks["tensors.missing"].detail) == (
        1,
        True,
    )
    assert (checks["tensors.extra"].value, "blk.9" in checks["tensors.extra"].detail) == (1, True)


def test_without_a_converter_the_known_layouts_are_judged_and_others_are_not(
    tokenizer_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benches: Benches
) -> None:
    from so8tqc.checkpoints.safetensors_index import open_checkpoint
    from so8tqc.errors import MissingToolError
    from so8tqc.services.tensors import expected as module
    from so8tqc.sources.converted import history

    def missing(_: object = None) -> None:
        raise MissingToolError("the GGUF converter is not here yet")

    model = save_model(tmp_path / "llama", "llama", tokenizer_files)
    file = file_of(benches("llama"), "Q4_K")
    monkeypatch.setattr(history, "find_converter", missing)
    expected = module.expected_of(open_checkpoint(model), file)
    rows = judge_tensors(file, expected)
    assert {r.verdict for r in rows} == {"plain", "exact"}
    assert len(rows) == len(file.tensors)
    file.fields["general.architecture"] = "zamba2"
    unknown = module.expected_of(open_checkpoint(model), file)
    checks = tensor_checks(judge_tensors(file, unknown), file, unknown)
    assert {(c.id, c.verdict) for c in checks} == {("tensors.seen", Verdict.SKIP)}
