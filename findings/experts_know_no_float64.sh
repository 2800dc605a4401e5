#!/usr/bin/env bash
# transformers' mixtures of experts in float64: the default way of running experts refuses it.
#
# With experts_implementation unset, transformers takes grouped matrix products, which torch has for
# float32, bfloat16 and float16 only. So a float64 reference of Mixtral ends in an error of a kernel,
# while the same model with experts_implementation="eager" runs.
# Seen with transformers 5.23.0 and torch 2.13.0 on a CPU.
. "$(dirname "$0")/environment.sh"
in_an_environment_of torch==2.13.0 transformers==5.23.0 <<'PY'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.for_model(
    "mixtral", vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
)


def outcome(**more):
    model = AutoModelForCausalLM.from_config(config, **more).double().eval()
    try:
        with torch.no_grad():
            return str(model(torch.tensor([[1, 2, 3]])).logits.dtype)
    except RuntimeError as error:
        return f"RuntimeError: {error}"


default, eager = outcome(), outcome(experts_implementation="eager")
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"as it comes: {default}")
print(f"eager:       {eager}")
sys.exit(0 if default.startswith("RuntimeError") and eager == "torch.float64" else 1)
PY
