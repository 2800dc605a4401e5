#!/usr/bin/env bash
# PEFT's OFT with two active adapters: merging multiplies them in the other order than running.
#
# The forward pass turns x by the first adapter, then by the second: W R2' R1'. Merging multiplies
# the weight by the first, then by the second: W R1' R2'. Rotations do not commute.
# Seen with peft 0.21.2.
. "$(dirname "$0")/environment.sh"
in_an_environment_of torch==2.13.0 peft==0.21.2 transformers==5.23.0 <<'PY'
import sys

import peft
import torch
from peft import OFTConfig, get_peft_model

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False)).double()
config = OFTConfig(
    target_modules=["0"], oft_block_size=8, use_cayley_neumann=False, init_weights=False
)
model = get_peft_model(base, config, adapter_name="one").double()
model.add_adapter("two", config)
model.double()
for name, parameter in model.named_parameters():
    if "oft_R" in name:
        torch.nn.init.normal_(parameter, std=0.3)
model.base_model.set_adapter(["one", "two"])
layer = model.base_model.model[0]
weight = layer.base_layer.weight.detach().clone()
x = torch.randn(4, 16, dtype=torch.float64)
with torch.no_grad():
    before = model(x)
    one, two = (layer.oft_R[name].get_weight() for name in ("one", "two"))
    model.merge_adapter(adapter_names=["one", "two"])
    merged = x @ layer.base_layer.weight.T
scale = before.norm()
as_run = float((before - x @ (weight @ two.T @ one.T).T).norm() / scale)
changed = float((before - merged).norm() / scale)
swapped = float((merged - x @ (weight @ one.T @ two.T).T).norm() / scale)
print(f"peft {peft.__version__}")
print(f"forward against W R2' R1': {as_run:.1e}")
print(f"merged  against W R1' R2': {swapped:.1e}")
print(f"forward against merged:    {changed:.1e}")
sys.exit(0 if as_run < 1e-9 and swapped < 1e-9 and changed > 1e-2 else 1)
PY
