"""A model that sees, of real shapes, from gates to a judged file: time and memory of each command.

python benchmarks/vision.py [--scratch DIR]

A Qwen2-VL-2B of noise (4.42 GB, bfloat16) with the tests' tokenizer and processor is baked,
exported with its vision tower, quantized and judged on two pictures and ten short texts of 32
tokens. Every command is a process of its own; beside its wall time stands that of a copy of the
checkpoint. The peak is the resident size, mapped pages of the files included. On so few tokens of
noise the verdict of qc is a matter of chance; it is printed. It takes 20 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "architectures")]

SHAPES = {
    "text_config": {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4,
    },
}  # fmt: skip


def build(directory: Path, scratch: Path) -> None:
    """A checkpoint of noise, with tokenizer and processor."""
    from sweep_tokenizer import train
    from transformers import AutoConfig, AutoModelForImageTextToText

    import vision_models

    own = vision_models.KINDS["qwen2_vl"]
    directory.mkdir()
    ids = vision_models._write_tokenizer(own, directory, train(scratch / "tokenizer"))
    settings = {k: ids.get(v, v) if isinstance(v, str) else v for k, v in own.config.items()}
    text = {**settings["text_config"], **SHAPES["text_config"]}
    settings |= {**SHAPES, "text_config": text, "tie_word_embeddings": True}
    config = AutoConfig.for_model("qwen2_vl", **settings)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        for rows in parameter.data.split(4096) if parameter.ndim == 2 else ():
            noise = torch.randn(rows.shape, generator=generator) * rows.shape[1] ** -0.5
            rows.copy_(noise)
    model.save_pretrained(directory)
    vision_models._write_processor(own, directory)


def write_gates(path: Path) -> None:
    """Gates in all layers."""
    from so8tqc.rotations.enums import Convention, Parametrization, Site
    from so8tqc.rotations.files.native import write_native
    from so8tqc.rotations.rotation_set import Target

    generator = np.random.default_rng(0)
    write_native(
        path,
        {Target(i): generator.normal(size=(192, 8, 8)) * 0.1 for i in range(28)},
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )


def commands(scratch: Path) -> dict[str, list[object]]:
    """Name → arguments."""
    base, gates, baked = scratch / "base", scratch / "gates.safetensors", scratch / "baked"
    exported, tower = scratch / "x-BF16.gguf", scratch / "mmproj-x-BF16.gguf"
    return {
        "bake": ["bake", base, gates, "--out", baked],
        "export": ["export", baked, "--out", exported, "--type", "bf16"],
        "quantize": ["quantize", exported, "--type", "Q8_0", "--out", scratch / "q"],
        "qc": [
            "qc", "--reference", base, "--rotations", gates, "--candidate", baked,
            "--candidate", scratch / "q" / "x-Q8_0.gguf", "--mmproj", tower,
            "--data", "builtin:images", "--data", "builtin:validation-quick", "--images", "2",
            "--max-tokens", "32", "--out", scratch / "qc",
        ],
    }  # fmt: skip


def measured(arguments: list[object]) -> tuple[float, float, int]:
    """Wall time, seconds, largest resident size of one child, GiB, and its exit code."""
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, done.returncode)"
    )
    line = [sys.executable, "-m", "so8tqc", *map(str, arguments), "--quiet"]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *line], check=True, capture_output=True, text=True
    )
    wall = time.perf_counter() - started
    peak, exit_code = map(int, done.stdout.splitlines()[-1].split())
    if exit_code > 1:
        raise SystemExit(f"{arguments[0]} ended with {exit_code}:\n{done.stdout}{done.stderr}")
    return wall, peak / 2**20, exit_code  # KiB on Linux


def copied(directory: Path, to: Path) -> float:
    """Seconds that ``cp -r`` and ``sync`` take."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(directory), str(to)], check=True)
    os.sync()
    wall = time.perf_counter() - started
    shutil.rmtree(to)
    return wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        scratch = Path(folder)
        build(scratch / "base", scratch)
        write_gates(scratch / "gates.safetensors")
        copy = copied(scratch / "base", scratch / "copy")
        print(f"cp -r and sync: {copy:.1f} s")
        for name, arguments in commands(scratch).items():
            wall, peak, code = measured(arguments)
            told = "" if code == 0 else ", FAIL"
            print(f"{name}: {wall:.1f} s, {wall / copy:.1f} × cp, {peak:.1f} GiB{told}", flush=True)


if __name__ == "__main__":
    main()
