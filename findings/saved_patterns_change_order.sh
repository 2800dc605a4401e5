#!/usr/bin/env bash
# PEFT: alpha_pattern's first match wins while training, and saving sorts the patterns.
#
# {"v_proj": 64, ".*_proj": 8} trains v_proj with alpha 64. save_pretrained writes the mapping with
# its keys sorted, ".*_proj" comes first, and the loaded adapter runs v_proj with alpha 8: another
# model than was trained, without a word. The file no longer tells which of the two it was.
# Seen with peft 0.21.2.
. "$(dirname "$0")/environment.sh"
in_an_environment_of torch==2.13.0 transformers==5.23.0 peft==0.21.2 <<'PY'
import json
import sys
import tempfile

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = dict(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2,
)
IDS = torch.arange(8)[None]


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def scaling(model):
    return model.base_model.model.model.layers[0].self_attn.v_proj.scaling["default"]


def drift(patterns):
    """Scale of v_proj when trained and when loaded, the order on disk, and the largest change."""
    torch.manual_seed(1)
    model = get_peft_model(
        base(), LoraConfig(r=8, lora_alpha=16, target_modules=["v_proj", "q_proj"],
                           alpha_pattern=patterns)
    ).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.3)
        trained = model(IDS).logits
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            order = list(json.load(open(f"{folder}/adapter_config.json"))["alpha_pattern"])
            loaded = PeftModel.from_pretrained(base(), folder).eval()
        change = (loaded(IDS).logits - trained).abs().max().item()
    return scaling(model), scaling(loaded), order, change


print(f"peft {peft.__version__}")
overlapping = drift({"v_proj": 64, ".*_proj": 8})
apart = drift({"v_proj": 64, "q_proj": 8})
print(f"overlapping: scale {overlapping[0]} trained, {overlapping[1]} loaded; on disk {overlapping[2]}; "
      f"logits change by {overlapping[3]:.3f}")
print(f"apart:       scale {apart[0]} trained, {apart[1]} loaded; on disk {apart[2]}; "
      f"logits change by {apart[3]:.3f}")
as_seen = (
    overlapping[:3] == (8.0, 1.0, [".*_proj", "v_proj"]) and overlapping[3] > 1e-2
    and apart[:2] == (8.0, 8.0) and apart[3] < 1e-5
)
sys.exit(0 if as_seen else 1)
PY
