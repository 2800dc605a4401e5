"""The noise floor rounds what fused experts are multiplied with, which is no module's input."""

from __future__ import annotations

import pytest
import torch

from so8tqc.services.export.logits import _rounding_experts, rounded

_E, _OUT, _IN = 3, 16, 32


@pytest.mark.parametrize("type_", ["F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("form", ["linear", "matmul", "bmm"])
def test_the_input_of_an_expert_is_rounded(form: str, type_: str) -> None:
    experts = torch.randn(_E, _OUT, _IN, generator=torch.Generator().manual_seed(0))
    x = torch.randn(6, _IN, generator=torch.Generator().manual_seed(1))

    def product(values: torch.Tensor) -> torch.Tensor:
        if form == "linear":
            return torch.nn.functional.linear(values, experts[1])
        if form == "matmul":
            return values @ experts[1].T
        return torch.bmm(values.expand(_E, *values.shape), experts.transpose(1, 2))

    exact = product(x)
    with _rounding_experts({experts.untyped_storage().data_ptr(): type_}):
        inside = product(x)
        other = torch.nn.functional.linear(x, torch.eye(_IN))
    assert not torch.equal(inside, exact)
    torch.testing.assert_close(inside, product(rounded(x, type_)), rtol=0, atol=0)
    assert torch.equal(other, x)  # a weight of its own is not an expert
