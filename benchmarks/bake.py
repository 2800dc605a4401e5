"""Bake against its peers, in one run: copying the directory, and PEFT's merge.

    python benchmarks/bake.py

Prints ratios: wall time of a bake over `cp -r` plus sync of the same model (SmolLM2-135M), and of
PEFT's `merge_and_unload` + `save_pretrained` of the same rotation over the bake.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from so8tqc.config import BakeConfig
from so8tqc.services.bake import bake
from so8tqc.services.builtin import DEMO_MODEL, resolve_model


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    os.sync()
    return time.perf_counter() - started


def make_adapter(base: Path, directory: Path) -> None:
    """An OFT adapter on every o_proj, exact Cayley, small random rotations."""
    from peft import OFTConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    config = OFTConfig(r=0, oft_block_size=8, target_modules=["o_proj"], use_cayley_neumann=False)
    live = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in live.named_parameters():
        if "oft_R" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    live.save_pretrained(str(directory))


def peft_merge(base: Path, adapter: Path, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(str(out))


def main() -> None:
    base = resolve_model(DEMO_MODEL)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_adapter(base, root / "adapter")
        config = BakeConfig(base=base, rotations=root / "adapter", out=root / "baked")
        copies, bakes = [], []
        for i in range(5):
            copies.append(seconds(lambda i=i: shutil.copytree(base, root / f"copy{i}")))
            bakes.append(seconds(lambda: bake(config)))
        merge = seconds(lambda: peft_merge(base, root / "adapter", root / "merged"))
    copy, baked = float(np.median(copies)), float(np.median(bakes))
    print(f"copy + sync        {copy:6.2f} s")
    print(f"bake, verified     {baked:6.2f} s   {baked / copy:5.2f} × the copy")
    print(f"PEFT merge + save  {merge:6.2f} s   {merge / baked:5.2f} × the bake")


if __name__ == "__main__":
    main()
