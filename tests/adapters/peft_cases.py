"""Adapters of every method, trained-looking, on tiny models, and what PEFT's own forward makes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "Lora", "r": 4, "lora_alpha": 12},
    "lora-patterns": {
        "kind": "Lora", "r": 4, "lora_alpha": 12, "use_rslora": True,
        "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.o_proj": 3},
    },
    "dora": {"kind": "Lora", "r": 4, "lora_alpha": 12, "use_dora": True},
    "oft": {"kind": "OFT", "r": 0, "oft_block_size": 8},
    "oft-exact": {"kind": "OFT", "r": 0, "oft_block_size": 8, "use_cayley_neumann": False},
    "boft": {"kind": "BOFT", "boft_block_size": 4},
    "hra": {"kind": "HRA", "r": 4},
    "hra-gs": {"kind": "HRA", "r": 3, "apply_GS": True},
    "psoft": {"kind": "Psoft", "r": 4, "psoft_alpha": 8},
    "psoft-series": {
        "kind": "Psoft", "r": 4, "psoft_alpha": 8, "use_cayley_neumann": True,
        "ab_svd_init": "pissa_init", "cayley_neumann_eps": 0.5,
    },
    "road": {"kind": "Road", "group_size": 8},
    "road-4": {"kind": "Road", "group_size": 16, "variant": "road_4"},
    "vera": {"kind": "Vera", "r": 6},
    "vera-drawn": {"kind": "Vera", "r": 6, "save_projection": False},
    "pvera": {"kind": "Pvera", "r": 6},
    "adalora": {"kind": "AdaLora", "init_r": 5, "target_r": 3, "lora_alpha": 700, "total_step": 10},
    "ia3": {"kind": "IA3"},
    "loha": {"kind": "LoHa", "r": 3, "alpha": 5, "rank_pattern": {"down_proj": 2}},
    "lokr": {"kind": "LoKr", "r": 2, "alpha": 5, "alpha_pattern": {"o_proj": 3}},
    "lokr-both": {"kind": "LoKr", "r": 2, "alpha": 5, "decompose_both": True,
                  "decompose_factor": 8},
    "miss": {"kind": "Miss", "r": 6},
    "miss-mini": {"kind": "Miss", "r": 8, "mini_r": 4, "init_weights": "mini"},
    "miss-bat": {"kind": "Miss", "r": 8, "init_weights": "bat"},
    "shira": {"kind": "Shira", "r": 2, "random_seed": 3},
    "c3a": {"kind": "C3A", "block_size": 8},
    "delora": {"kind": "Delora", "r": 3, "rank_pattern": {"down_proj": 2}},
    "hira": {"kind": "Hira", "r": 3},
    "gralora": {"kind": "Gralora", "r": 6, "alpha": 9},
    "gralora-hybrid": {"kind": "Gralora", "r": 8, "gralora_k": 4, "hybrid_r": 3, "alpha": 9},
    "randlora": {"kind": "RandLora", "r": 5, "randlora_alpha": 20},
    "vblora": {"kind": "VBLoRA", "r": 3, "num_vectors": 9, "vector_length": 8, "topk": 3},
    "vblora-topk": {"kind": "VBLoRA", "r": 3, "num_vectors": 9, "vector_length": 8, "topk": 2,
                    "save_only_topk_weights": True},
    "fourierft": {"kind": "FourierFT", "n_frequency": 40, "scaling": 2000.0},
    "waveft": {"kind": "WaveFT", "n_frequency": 300, "scaling": 5.0},
    "waveft-direct": {"kind": "WaveFT", "n_frequency": 300, "scaling": 5.0, "use_idwt": False},
}  # fmt: skip

TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
}
_USUAL = ["q_proj", "o_proj", "down_proj"]
_TRAINED = (
    "lora_",
    "oft_R",
    "boft_",
    "hra_u",
    "psoft_R",
    "road_",
    "vera_lambda",
    "pvera_lambda",
    "ia3_l",
    "hada_w",
    "lokr_w",
    "miss_block",
    "shira_weight",
    "c3a_kernel",
    "delora_A",
    "delora_B",
    "delora_lambda",
    "hira_",
    "gralora_",
    "randlora_lambda",
    "randlora_gamma",
    "vblora_",
    "spectrum",
    "beft_bias",
    "ln_tuning_layers",
    "modules_to_save",
)


_CACHES = (
    "_psoft_A_cache",
    "_psoft_B_cache",
    "vera_A",
    "vera_B",
    "pvera_A",
    "pvera_B",
    "randlora_A",
    "randlora_B",
    "delora_w_norm",
    "vblora_vector_bank",
)
"""Tensors that PEFT keeps apart from modules."""


def load(model: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(str(model))
    vision = hasattr(config, "vision_config")
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    # transformers' other implementations of experts know no float64
    return auto.from_pretrained(str(model), dtype=dtype, experts_implementation="eager").eval()


def text_only(names: list[str], model: Any) -> str | list[str]:
    """target_modules that leave vision towers alone."""
    if not hasattr(model.config, "vision_config"):
        return names
    return rf".*language_model.*\.({'|'.join(names)})"


def adapter(model: Path, directory: Path, method: str, *, seed: int = 0, **options: Any) -> Path:
    """Make and save an adapter whose every part has moved from its start."""
    import peft

    base = load(model)
    settings = METHODS[method] | options
    kind = settings.pop("kind")
    targets = TARGETS.get(base.config.model_type, _USUAL)
    if method.startswith("lora") and base.config.model_type == "mixtral":
        settings["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings.setdefault("target_modules", text_only(targets, base))
    if settings.get("target_modules") and kind == "IA3":
        settings.setdefault("feedforward_modules", text_only(targets[-1:], base))
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        live = peft.get_peft_model(base, getattr(peft, f"{kind}Config")(**settings))
        shake(live, seed)
        live.save_pretrained(str(directory))
    return directory


def shake(live: Any, seed: int, size: float = 0.05) -> None:
    """Move every trained parameter; float32, as PEFT keeps them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in live.named_parameters():
        if parameter.requires_grad or any(part in name for part in _TRAINED):
            noise = torch.randn(parameter.shape, generator=generator) * size
            parameter.data = (parameter.data.float() + noise).to(parameter.dtype)


def unmerged(model: Path, adapters: list[Path], load_dtype: torch.dtype) -> Any:
    """Base and adapters, unmerged, run by PEFT in float64.

    The base is loaded in the dtype that PEFT accepts (PSOFT takes its SVD then), and all parameters
    become float64 afterwards, which changes none of them.
    """
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = load(model, load_dtype)
        live = peft.PeftModel.from_pretrained(base, str(adapters[0]), adapter_name="a0")
        for i, path in enumerate(adapters[1:], start=1):
            live.load_adapter(str(path), adapter_name=f"a{i}")
        if len(adapters) > 1:
            live.base_model.set_adapter([f"a{i}" for i in range(len(adapters))])
    return in_float64(live)


def in_float64(live: Any) -> Any:
    """The same module with all that it holds in float64."""
    live = live.double().eval()
    for module in live.modules():  # buffers that PEFT keeps apart
        for cache in _CACHES:
            held = getattr(module, cache, None)
            if held is not None:
                for key in list(held.keys()):
                    held[key] = held[key].double()
    return live


@contextmanager
def widened() -> Iterator[None]:
    """PEFT's FFTs in float64: C3A names float32, FourierFT calls float() and takes the default."""
    from peft.tuners.c3a import layer

    class Wide:
        float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    usual, held = torch.get_default_dtype(), layer.torch
    torch.set_default_dtype(torch.float64)
    layer.torch = Wide()
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        torch.set_default_dtype(usual)
        layer.torch = held


def logits(live: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = live(input_ids=ids).logits
    return result


def effective(module: Any, width: int) -> torch.Tensor:
    """[out, in] float64: what an unmerged module multiplies its input by."""
    from peft.tuners.c3a.layer import C3ALayer
    from peft.tuners.fourierft.layer import FourierFTLayer

    by_fft = isinstance(module, (C3ALayer, FourierFTLayer))
    with torch.no_grad(), widened() if by_fft else nullcontext():
        one = torch.eye(width, dtype=torch.float64)
        none = torch.zeros(1, width, dtype=torch.float64)
        result: torch.Tensor = (module(one) - module(none)).T
    return result


Maker = Callable[..., Path]
