"""A quantized file beside its input: errors as numpy takes them, and what fails."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from so8tqc.gguf.file import GGUFFile, GGUFTensor
from so8tqc.llama.quantizer import PlannedTensor
from so8tqc.record_kinds.quantize import Fallback
from so8tqc.records import Verdict
from so8tqc.services.quantize.proof import (
    SquaredError,
    describe,
    fallback_notices,
    fallbacks,
    proof_checks,
    squared_error,
)

pytestmark = pytest.mark.llama


def tensor(values: np.ndarray, kind: str = "F32", name: str = "w") -> GGUFTensor:
    if kind == "F32":
        data: np.ndarray = values.astype(np.float32)
    else:
        data = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType[kind])
    return GGUFTensor(name, kind, values.shape, data.nbytes, 0, data)


def file_of(**tensors: GGUFTensor) -> GGUFFile:
    return GGUFFile(Path("x.gguf"), {}, {n.replace("__", "."): t for n, t in tensors.items()})


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "F32"])
@pytest.mark.parametrize("shape", [(3, 64), (700, 320), (64,)])
def test_the_error_is_that_of_the_dequantized_weights(kind: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=shape)
    before, after = tensor(values), tensor(values, kind)
    found = squared_error(before, after)
    w, q = (t.values().astype(np.float64) for t in (before, after))
    assert found.norm == pytest.approx((w**2).sum(), rel=1e-5)
    assert found.error == pytest.approx(((q - w) ** 2).sum(), rel=1e-5, abs=1e-12)
    relative = np.linalg.norm(q - w) / np.linalg.norm(w)
    assert found.relative == pytest.approx(relative, rel=1e-5, abs=1e-9)


def test_nothing_to_compare_with_has_no_relative_error() -> None:
    zero = tensor(np.zeros((2, 32)))
    assert squared_error(zero, zero).relative is None


def test_layers_add_up_their_tensors() -> None:
    found = {
        "blk.0.a.weight": SquaredError(1.0, 4.0),
        "blk.0.attn_output.weight": SquaredError(3.0, 12.0),
        "blk.1.a.weight": SquaredError(1.0, 100.0),
        "output.weight": SquaredError(9.0, 9.0),
        "blk.2.a.weight": SquaredError(0.0, 0.0),
    }
    one = tensor(np.ones((2, 32)), "Q8_0")
    made = describe("Q8_0", file_of(blk__0__a__weight=one), found, {}, 999)
    assert made.layer_error == {0: 0.5, 1: 0.1}
    assert made.attention_output_error == {0: 0.5}
    assert made.bytes == 999
    assert made.types == {"Q8_0": 1}
    assert made.tensors["blk.0.a.weight"].bits_per_weight == 8.5


def test_a_fallback_is_what_libllama_says_and_what_it_does_not_say_of_the_head() -> None:
    source = file_of(a=tensor(np.ones((2, 64))), output__weight=tensor(np.ones((2, 64))))
    plan = {"a": PlannedTensor("Q5_0", "Q5_K", 256), "output.weight": PlannedTensor("Q8_0")}
    found = fallbacks(plan, source, "Q5_K_M", None)
    assert found["a"] == Fallback(wanted="Q5_K", stored="Q5_0", columns=64, block=256)
    assert found["output.weight"].wanted is None
    assert set(fallbacks(plan, source, "Q5_K_M", "Q8_0")) == {"a"}  # asked for
    assert set(fallbacks(plan, source, "Q8_0", None)) == {"a"}  # the recipe's own
    wide = file_of(a=tensor(np.ones((2, 256))), output__weight=tensor(np.ones((2, 256))))
    assert fallbacks({"output.weight": PlannedTensor("Q8_0")}, wide, "Q5_K_M", None) == {}
    made = describe("Q5_K_M", source, {}, found, 1)
    (notice,) = fallback_notices({"x.gguf": made})
    assert notice.startswith("x.gguf: 2 of 2 tensors fell back to Q5_0, Q8_0, ")
    assert notice.endswith("their columns are no multiple of 256.")


def test_what_is_not_as_planned_fails_by_its_own_check() -> None:
    w = np.ones((2, 32))
    source, right = file_of(a=tensor(w), b=tensor(w)), {"a": tensor(w, "Q8_0"), "b": tensor(w)}
    plan = {"a": PlannedTensor("Q8_0"), "b": PlannedTensor("F32")}
    good = {"a": SquaredError(0.0, 1.0)}

    def failed(result: GGUFFile, found: dict[str, SquaredError] = good) -> list[str]:
        checks = proof_checks(source, result, plan, found, "x.gguf")
        assert len(checks) == 3
        return [check.id for check in checks if check.verdict is Verdict.FAIL]

    assert failed(file_of(**right)) == []
    assert failed(file_of(a=right["a"])) == ["quantize.readable"]
    assert failed(file_of(**right, c=tensor(w))) == ["quantize.readable"]
    assert failed(file_of(**right | {"b": tensor(np.ones((4, 16)))})) == ["quantize.readable"]
    assert failed(file_of(**right | {"b": tensor(w, "F16")})) == ["quantize.types"]
    for bad in (SquaredError(np.nan, 1.0), SquaredError(1.0, np.inf)):
        assert failed(file_of(**right), {"a": bad}) == ["quantize.finite"]
