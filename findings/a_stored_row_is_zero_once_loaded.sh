#!/usr/bin/env bash
# transformers' Youtu: the embedding of the padding token, stored as something else, is loaded as 0.
#
# The class zeroes that row when it initialises its weights, and loading initialises after the
# stored values are there. So model(ids) of the loaded model is not what the file says, for ids
# that hold the padding token; a tool that reads the file (a converter, a merge) sees another model.
# Llama, with the same settings, keeps the stored row.
# Seen with transformers 5.23.0.
. "$(dirname "$0")/environment.sh"
in_an_environment_of torch==2.13.0 transformers==5.23.0 <<'PY'
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
COMMON = dict(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, pad_token_id=3, bos_token_id=1,
    eos_token_id=2, tie_word_embeddings=False,
)
LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16
)


def stored_and_loaded(kind, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, **more))
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = 1.5
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stored = load_file(f"{folder}/model.safetensors")["model.embed_tokens.weight"][3]
        loaded = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight[3]
    return float(stored.abs().max()), float(loaded.abs().max())


youtu, llama = stored_and_loaded("youtu", **LATENT), stored_and_loaded("llama")
print(f"transformers {transformers.__version__}: largest value of the padding row")
print(f"youtu: stored {youtu[0]}, loaded {youtu[1]}")
print(f"llama: stored {llama[0]}, loaded {llama[1]}")
sys.exit(0 if youtu == (1.5, 0.0) and llama == (1.5, 1.5) else 1)
PY
