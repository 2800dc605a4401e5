"""PEFT's OFT: the flag that "only" chooses an approximation also turns the rotation around.

``use_cayley_neumann`` is described as an efficient approximation of the Cayley parametrization. The
exact branch computes (I + Q)⁻¹(I − Q), the series (I + Q)(I − Q)⁻¹: the transposed rotation. An
adapter that is trained with one and loaded with the other rotates every feature the wrong way.
"""

from __future__ import annotations

from environment import main

PACKAGES = ("torch==2.13.0", "peft==0.21.2", "transformers==5.23.0")


def look() -> bool:
    """Compare both branches, and the transposed one, for one small set of parameters."""
    import peft
    import torch
    from peft.tuners.oft.layer import OFTRotationModule

    torch.manual_seed(0)
    block, terms = 8, 20  # as many terms as make the series as good as exact
    weight = torch.randn(1, block * (block - 1) // 2, dtype=torch.float64) * 0.02
    module = OFTRotationModule(1, weight.shape[1], block, block, use_cayley_neumann=False)
    exact = module._cayley_batch(weight, block, False, terms)[0].double()
    series = module._cayley_batch(weight, block, True, terms)[0].double()
    same = float((series - exact).norm())
    turned = float((series - exact.T).norm())
    print(f"peft {peft.__version__}")
    print(f"distance of the series from the exact branch: {same:.3e}")
    print(f"distance of the series from its transpose:    {turned:.3e}")
    return turned < 1e-9 < same


if __name__ == "__main__":
    main(__file__, PACKAGES, look)
