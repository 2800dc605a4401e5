#!/usr/bin/env bash
# PEFT's AdaLoRA: after pruning, the update is still divided by the rank that training began with.
#
# LoRA's scale is alpha / r. AdaLoRA prunes ranks while it trains; the stored factors then have
# fewer rows, but the divisor stays init_r (plus 1e-5, which makes a scale of 1 not quite 1). Whoever
# merges alpha / (ranks in the file) gets another model, and so does whoever leaves out the 1e-5
# and compares in float64.
# Seen with peft 0.21.2: init_r 8, 3 ranks left, alpha 8: scale 0.99999875, not 2.667.
. "$(dirname "$0")/environment.sh"
in_an_environment_of torch==2.13.0 peft==0.21.2 transformers==5.23.0 <<'PY'
import sys

import peft
import torch
from peft import AdaLoraConfig, get_peft_model

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False)).double()
config = AdaLoraConfig(
    target_modules=["0"], init_r=8, target_r=3, tinit=1, tfinal=1, total_step=10, lora_alpha=8
)
model = get_peft_model(base, config).double()
for name, parameter in model.named_parameters():
    if "lora_" in name:
        torch.nn.init.normal_(parameter)
kept = [True] * 3 + [False] * 5
model.base_model.resize_modules_by_rank_pattern({"0.lora_E.default": kept}, "default")
layer = model.base_model.model[0]
a, b, e = (part["default"] for part in (layer.lora_A, layer.lora_B, layer.lora_E))
x = torch.randn(4, 16, dtype=torch.float64)
with torch.no_grad():
    update = model(x) - x @ layer.base_layer.weight.T
    scale = float((update / (x @ (a * e).T @ b.T)).median())
print(f"peft {peft.__version__}")
print(f"ranks begun with 8, ranks left {a.shape[0]}, alpha 8")
print(f"scale of the forward pass: {scale:.8f}")
print(f"alpha / (8 + 1e-5):        {8 / (8 + 1e-5):.8f}")
print(f"alpha / ranks left:        {8 / a.shape[0]:.8f}")
sys.exit(0 if abs(scale - 8 / (8 + 1e-5)) < 1e-9 and a.shape[0] == 3 else 1)
PY
