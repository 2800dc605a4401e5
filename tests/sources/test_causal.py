"""No model is run that sees the tokens that follow: transformers' plain attention is the oracle."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.errors import ModelError
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.layerwise import shell
from so8tqc.sources.own_forward import OwnForward

IDS = np.arange(10, 42)


@pytest.fixture(scope="module")
def paligemma(tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its attention says that it is not causal; a mask of its wrapper makes it so."""
    folder = tmp_path_factory.mktemp("causal") / "paligemma"
    shutil.copytree(tokenizer_files, folder)
    text = {
        "model_type": "gemma", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = AutoConfig.for_model(
        "paligemma",
        text_config=text,
        vision_config=vision,
        projection_dim=64,
        hidden_size=64,
        vocab_size=512,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # livelier than the default 0.02: attention must matter
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def logits_of(source: Any, ids: Any) -> np.ndarray:
    return torch.cat([block.clone() for block in source.logits(ids, 64)]).numpy()


def test_a_model_that_leaves_causality_to_its_mask_is_run_with_that_mask(paligemma: Path) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(paligemma, attn_implementation="eager")
    with torch.inference_mode():
        expected = plain.eval()(input_ids=torch.from_numpy(IDS)[None]).logits[0].numpy()
    source = HFSource(HFModel.load(paligemma), "it")
    found = logits_of(source, IDS)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(logits_of(source, IDS[:12]), found[:12], atol=1e-4)


def test_so_is_one_that_is_run_a_layer_at_a_time(paligemma: Path) -> None:
    built = shell._built(open_checkpoint(paligemma), "float32", None, {})
    assert built.config.get_text_config()._attn_implementation == "eager"


def test_others_keep_the_attention_that_transformers_chooses(llama: Path) -> None:
    assert HFModel.load(llama).module.config._attn_implementation == "sdpa"


def test_a_model_that_sees_what_follows_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HFModel.load(llama)
    run = type(model.module).forward

    def looks_ahead(self: Any, *args: Any, **options: Any) -> Any:
        out = run(self, *args, **options)
        out.logits = out.logits + out.logits.mean(dim=1, keepdim=True)
        return out

    monkeypatch.setattr(type(model.module), "forward", looks_ahead)
    with pytest.raises(ModelError, match="is not causal: the logits of 4 tokens change"):
        OwnForward(model.module, model.module.get_output_embeddings(), torch.device("cpu"), "model")
