#!/usr/bin/env bash
# PEFT's OFT: use_cayley_neumann, said to choose an approximation, also transposes the rotation.
#
# The exact branch computes (I + Q)^-1 (I - Q), the series (I + Q) (I - Q)^-1. An adapter that is
# trained with one and loaded with the other turns every feature the wrong way.
# Seen with peft 0.21.2: 20 terms equal the exact branch's transpose to 7e-16.
. "$(dirname "$0")/environment.sh"
in_an_environment_of torch==2.13.0 peft==0.21.2 transformers==5.23.0 <<'PY'
import sys

import peft
import torch
from peft.tuners.oft.layer import OFTRotationModule

torch.manual_seed(0)
block, terms = 8, 20  # as many terms as make the series as good as exact
weight = torch.randn(1, block * (block - 1) // 2, dtype=torch.float64) * 0.02
module = OFTRotationModule(1, weight.shape[1], block, block, use_cayley_neumann=False)
exact = module._cayley_batch(weight, block, False, terms)[0].double()
series = module._cayley_batch(weight, block, True, terms)[0].double()
same, turned = float((series - exact).norm()), float((series - exact.T).norm())
print(f"peft {peft.__version__}")
print(f"distance of the series from the exact branch: {same:.3e}")
print(f"distance of the series from its transpose:    {turned:.3e}")
sys.exit(0 if turned < 1e-9 < same else 1)
PY
