#!/usr/bin/env bash
# accelerate's init_empty_weights builds a tied model with two weights; torch's meta device with one.
#
# Each parameter is replaced by a new empty one as it is registered, so the head's reference to the
# embedding is lost until tie_weights() is called again. Whoever counts bytes or plans a layer's
# reading on such a model counts the embedding twice.
# Seen with accelerate 1.15.0 and transformers 5.23.0.
. "$(dirname "$0")/environment.sh"
in_an_environment_of torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 <<'PY'
import sys

import accelerate
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.for_model(
    "llama", vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, tie_word_embeddings=True,
)


def tied(model):
    return model.lm_head.weight is model.model.embed_tokens.weight


with init_empty_weights():
    emptied = AutoModelForCausalLM.from_config(config)
with torch.device("meta"):
    meta = AutoModelForCausalLM.from_config(config)
seen = [tied(emptied), tied(meta)]
emptied.tie_weights()
seen.append(tied(emptied))
print(f"accelerate {accelerate.__version__}: is the head the embedding?")
print(f"init_empty_weights {seen[0]}, torch's meta device {seen[1]}, after tie_weights {seen[2]}")
sys.exit(0 if seen == [False, True, True] else 1)
PY
