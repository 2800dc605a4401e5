"""Writes ``packed.safetensors``: weights quantized and dequantized by the libraries themselves.

Run once, with the packages named in ``PACKAGES`` importable; the file says their versions. What the
tests compare with is then no reading of ours.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PACKAGES = ("bitsandbytes", "compressed-tensors", "auto-gptq", "autoawq")
FILE = Path(__file__).with_name("packed.safetensors")
OUT, IN = 64, 128

Tensors = dict[str, torch.Tensor]


def weight(seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(OUT, IN, generator=generator) * 0.05
    return (w * (1 + 4 * torch.rand(OUT, 1, generator=generator))).to(dtype)


def only(*names: str) -> None:
    """Packages without their ``__init__``, which imports whole frameworks."""
    for name in names:
        found = [Path(p) / name.replace(".", "/") for p in sys.path]
        module = types.ModuleType(name)
        module.__path__ = [str(next(p for p in found if p.is_dir()))]
        sys.modules[name] = module


def bitsandbytes(kind: str, nested: bool, dtype: torch.dtype, rows: int = OUT) -> Tensors:
    from bitsandbytes import functional as F

    w = weight(1, dtype)[:rows]
    packed, state = F.quantize_4bit(w, quant_type=kind, compress_statistics=nested)
    parts = {f"weight.{k}": v.clone() for k, v in state.as_dict(packed=True).items()}
    return {"weight": packed, **parts, "expected": F.dequantize_4bit(packed, state)}


def eight_bits() -> Tensors:
    from bitsandbytes import functional as F

    codes, scales, _ = F.int8_vectorwise_quant(weight(2, torch.float16))
    return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8),
            "expected": F.int8_vectorwise_dequant(codes, scales)}  # fmt: skip


def compressed(
    bits: int, group: int | None, symmetric: bool, dtype: torch.dtype, actorder: bool = False
) -> tuple[Tensors, dict[str, Any]]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    strategy = {"strategy": "channel"} if group is None else {"strategy": "group"}
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, group_size=group, **strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    w = weight(3, dtype)
    blocks = w.reshape(OUT, -1, group or IN)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    held = {"weight": w, "weight_scale": scale.to(dtype), "weight_zero_point": zero.to(torch.int8)}
    parts = PackedQuantizationCompressor.compress(held, scheme)
    expected = PackedQuantizationCompressor.decompress(dict(parts), scheme)["weight"]
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
    }
    return {**parts, "expected": expected}, settings


def gptq(bits: int, group: int, ordered: bool) -> Tensors:
    only("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear")
    linear = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    generator = torch.Generator().manual_seed(4)
    layer = torch.nn.Linear(IN, OUT, bias=False)
    layer.weight.data = weight(4, torch.float32)
    count, top = IN // group, 2**bits - 1
    index = torch.arange(IN) // group
    if ordered:
        index = index[torch.randperm(IN, generator=generator)]
    scales = 0.4 / top * (1 + torch.rand(OUT, count, generator=generator))
    zeros = torch.randint(1, top + 1, (OUT, count), generator=generator).float()
    quantized = linear.QuantLinear(bits, group, IN, OUT, False, weight_dtype=torch.float16)
    steps = ((layer.weight.data + (zeros * scales)[:, index]) / scales[:, index]).round()
    steps = steps.clamp(0, top)
    layer.weight.data = (steps - zeros[:, index]) * scales[:, index]
    layer = layer.half()
    quantized.pack(layer, scales, zeros.clone(), index)
    with torch.no_grad():
        expected = quantized.float()(torch.eye(IN)).T  # exact: one product each, zeros beside it
    return {
        "qweight": quantized.qweight, "qzeros": quantized.qzeros,
        "scales": quantized.scales.half(), "g_idx": quantized.g_idx, "expected": expected.half(),
    }  # fmt: skip


def awq(group: int) -> Tensors:
    only("awq", "awq.utils", "awq.modules", "awq.modules.linear")
    gemm = importlib.import_module("awq.modules.linear.gemm")
    packing = importlib.import_module("awq.utils.packing_utils")
    generator = torch.Generator().manual_seed(5)
    layer = torch.nn.Linear(IN, OUT, bias=False)
    layer.weight.data = weight(5, torch.float16)
    scales = 0.4 / 15 * (1 + torch.rand(IN // group, OUT, generator=generator))
    zeros = torch.randint(0, 16, (IN // group, OUT), generator=generator).float()
    made = gemm.WQLinear_GEMM.from_linear(layer, 4, group, False, scales, zeros)
    expected = packing.dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, group)
    return {"qweight": made.qweight, "qzeros": made.qzeros, "scales": made.scales,
            "expected": expected.T}  # fmt: skip


def cases() -> dict[str, tuple[Tensors, dict[str, Any]]]:
    """Name → the stored parts with ``expected``, and ``quantization_config``."""
    bnb = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    found: dict[str, tuple[Tensors, dict[str, Any]]] = {
        "nf4": (bitsandbytes("nf4", False, torch.bfloat16), bnb),
        "nf4-nested": (bitsandbytes("nf4", True, torch.bfloat16), bnb),
        "fp4-nested": (bitsandbytes("fp4", True, torch.float16), bnb),
        "nf4-float32": (bitsandbytes("nf4", True, torch.float32), bnb),
        "int8": (eight_bits(), {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "compressed": compressed(4, 32, True, torch.bfloat16),
        "compressed-zero": compressed(4, 32, False, torch.float16),
        "compressed-channel": compressed(4, None, True, torch.bfloat16),
        "compressed-8": compressed(8, 64, True, torch.bfloat16),
        "compressed-3": compressed(3, 32, False, torch.bfloat16),
    }
    for bits, group, ordered in ((4, 32, False), (4, 32, True), (8, 64, False), (2, 32, True),
                                 (3, 32, False)):  # fmt: skip
        said = {"quant_method": "gptq", "bits": bits, "group_size": group}
        found[f"gptq-{bits}{'-ordered' if ordered else ''}"] = (gptq(bits, group, ordered), said)
    said = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    found["awq"] = (awq(32), said)
    return found


def main() -> None:
    made = cases()
    tensors = {
        f"{case}:{name}": tensor.detach().contiguous().clone()
        for case, (parts, _) in made.items()
        for name, tensor in parts.items()
    }
    said = {case: json.dumps(settings) for case, (_, settings) in made.items()}
    versions = {name: distribution(name).version for name in PACKAGES}
    save_file(tensors, str(FILE), metadata={**said, "versions": json.dumps(versions)})


if __name__ == "__main__":
    main()
