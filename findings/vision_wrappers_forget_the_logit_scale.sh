#!/usr/bin/env bash
# transformers' Aya Vision and Cohere 2 Vision: the text model's `logit_scale` is not applied.
#
# CohereForCausalLM multiplies its logits by `logit_scale`; the classes that see put the same text
# model and head together themselves, and do not. So the same weights give logits 16 times as large
# (with the default scale of 1/16): the order of tokens is the same, every probability another. A
# converted text model (llama.cpp applies the scale) differs from model(ids).logits by that factor.
# Seen with transformers 5.23.0.
. "$(dirname "$0")/environment.sh"
in_an_environment_of torch==2.13.0 transformers==5.23.0 <<'PY'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

transformers.logging.set_verbosity_error()
TEXT = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, bos_token_id=1, eos_token_id=2,
)
VISION = dict(
    model_type="siglip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, image_size=28, patch_size=14,
)
IDS = torch.arange(5, 37)[None]


def factor(kind, text):
    config = AutoConfig.for_model(
        kind, text_config=dict(model_type=text, **TEXT), vision_config=dict(VISION)
    )
    seeing = AutoModelForImageTextToText.from_config(config).eval()
    alone = AutoModelForCausalLM.from_config(config.get_text_config()).eval()
    alone.model.load_state_dict(seeing.model.language_model.state_dict())
    alone.lm_head.weight.data = seeing.lm_head.weight.data
    with torch.inference_mode():
        a, b = seeing(input_ids=IDS).logits, alone(input_ids=IDS).logits
    scale = config.get_text_config().logit_scale
    return scale, float((a * scale - b).abs().max()), float((a - b).abs().max())


print(f"transformers {transformers.__version__}")
same = True
for kind, text in (("aya_vision", "cohere"), ("cohere2_vision", "cohere2")):
    scale, scaled, plain = factor(kind, text)
    print(f"{kind}: logit_scale {scale}; without it {plain:.2g} apart, with it {scaled:.1g}")
    same = same and scale == 0.0625 and scaled < 1e-5 and plain > 0.1
sys.exit(0 if same else 1)
PY
