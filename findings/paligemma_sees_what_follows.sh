#!/usr/bin/env bash
# transformers' PaliGemma on text alone: with its default attention, tokens see those that follow.
#
# Its text model says of its attention that it is not causal (`use_bidirectional_attention`, which
# the configuration sets where nobody did) and leaves causality to a mask. Where that mask is causal
# and nothing else, transformers leaves it out for torch's scaled_dot_product_attention, whose
# kernel then masks nothing. So the logits of a prefix change when tokens are appended; with
# attn_implementation="eager" they do not, and are others than the default's.
# Seen with transformers 5.23.0 and torch 2.13.0.
. "$(dirname "$0")/environment.sh"
in_an_environment_of torch==2.13.0 transformers==5.23.0 <<'PY'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

transformers.logging.set_verbosity_error()
TEXT = dict(
    model_type="gemma", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
)
VISION = dict(
    model_type="siglip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, image_size=28, patch_size=14,
)
IDS = torch.arange(5, 37)[None]


def changes(attention):
    config = AutoConfig.for_model(
        "paligemma", text_config=dict(TEXT), vision_config=dict(VISION), projection_dim=64,
        hidden_size=64,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    with torch.inference_mode():
        whole = model.eval()(input_ids=IDS).logits[:, :12]
        alone = model(input_ids=IDS[:, :12]).logits
    return float((whole - alone).abs().max()), float(alone.abs().max())


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
found = {attention: changes(attention) for attention in ("sdpa", "eager")}
for attention, (change, largest) in found.items():
    print(f"{attention}: logits of 12 tokens change by {change:.2g} of {largest:.2g} with 20 more")
default = AutoModelForImageTextToText.from_config(
    AutoConfig.for_model("paligemma", text_config=TEXT, vision_config=VISION)
)
print(f"default: {default.config.get_text_config()._attn_implementation}")
is_default = default.config.get_text_config()._attn_implementation == "sdpa"
sys.exit(0 if is_default and found["sdpa"][0] > 0.1 and found["eager"][0] < 1e-4 else 1)
PY
