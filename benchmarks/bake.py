"""Bake against its peers, in one run: copying the directory, and PEFT's merge.

    python benchmarks/bake.py [--models smollm2,qwen2-vl-2b] [--scratch DIR] [--repeats 5]

For each model, with one and the same rotation (an OFT adapter, exact Cayley, on every o_proj of the
text layers), each in a process of its own and ended by `sync`:

* `cp -r` of the model directory;
* `so8tqc.services.bake`; with the SHA-256 of the whole base, for the provenance; and with the
  result read back, too;
* PEFT's `merge_and_unload` and `save_pretrained`, in the dtype of the checkpoint and, on machines
  without fast 16-bit matrix products, in float32.

and, with a LoRA of rank 16 on all seven projections of the text layers, the bake and PEFT's merge
again; on SmolLM2 also how far each lies from the exact weights, in ulps, and its KL from the
unmerged model in float64.

The time is that of the work, after imports; memory is the peak of the process above what it holds
after `import torch`. `qwen2-vl-2b` is a synthetic bfloat16 checkpoint with the shapes of
Qwen2-VL-2B (28 text layers of width 1536, the vision tower of 32 blocks; 4.4 GB), filled with
noise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from process_memory import peak_bytes

SHARD_BYTES = 2 << 30
METHODS = (
    "copy", "bake", "bake, base hashed", "bake, verified", "PEFT, stored dtype", "PEFT, float32",
    "LoRA, bake", "LoRA, bake, verified", "LoRA, PEFT, stored dtype", "LoRA, PEFT, float32",
)  # fmt: skip
LORA = "LoRA, "
"""Methods that merge a rank-16 LoRA on all seven projections of every text layer."""


class Run(NamedTuple):
    """What one method took."""

    seconds: float
    bytes: int


# --- the models ---------------------------------------------------------------------------------


def smollm2(_root: Path) -> Path:
    from so8tqc.sources.inputs.builtin import DEMO_MODEL, resolve_model

    return resolve_model(DEMO_MODEL)


def qwen2_vl_2b(root: Path) -> Path:
    """A checkpoint of noise: names, shapes and configuration of Qwen2-VL-2B."""
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    directory = root / "qwen2-vl-2b"
    if directory.is_dir():
        return directory
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
            "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4,
        },
        tie_word_embeddings=True,
    )  # fmt: skip
    with init_empty_weights():
        model = Qwen2VLForConditionalGeneration(config)
    directory.mkdir()
    model.config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = SHARD_BYTES
    for name, empty in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if room < empty.numel() * 2:
            shards.append({})
            room = SHARD_BYTES
        room -= empty.numel() * 2
        shards[-1][name] = (torch.randn(empty.shape, generator=generator) * 0.02).bfloat16()
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, tensors in zip(files, shards, strict=True):
        save_file(tensors, str(directory / file), metadata={"format": "pt"})
    names = {n: f for f, tensors in zip(files, shards, strict=True) for n in tensors}
    index = {"metadata": {}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


MODELS = {"smollm2": smollm2, "qwen2-vl-2b": qwen2_vl_2b}


def write_adapter(base: Path, directory: Path) -> None:
    """An OFT adapter on every o_proj of the text layers: exact Cayley, small random rotations."""
    import re

    import peft
    from safetensors.torch import save_file

    from so8tqc.checkpoints.safetensors_index import open_checkpoint

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, entry in open_checkpoint(base).tensors.items():
        if re.search(r"layers\.\d+\.self_attn\.o_proj\.weight$", name):
            key = f"base_model.model.{name.removesuffix('.weight')}.oft_R.weight"
            tensors[key] = torch.randn(entry.shape[1] // 8, 28, generator=generator) * 0.05
    config = peft.OFTConfig(
        r=0, oft_block_size=8, target_modules=r".*layers\.\d+\.self_attn\.o_proj",
        use_cayley_neumann=False,
    )  # fmt: skip
    config.inference_mode = True
    directory.mkdir()
    config.save_pretrained(str(directory))
    save_file(tensors, str(directory / "adapter_model.safetensors"))


def write_lora(base: Path, directory: Path) -> None:
    """A trained-looking LoRA of rank 16 on all seven projections of the text layers."""
    import re

    import peft
    from safetensors.torch import save_file

    from so8tqc.checkpoints.safetensors_index import open_checkpoint

    generator = torch.Generator().manual_seed(0)
    projections = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    pattern = re.compile(rf"layers\.\d+\.(self_attn|mlp)\.({projections})\.weight$")
    tensors = {}
    for name, entry in open_checkpoint(base).tensors.items():
        if pattern.search(name) and "visual" not in name:
            out, into = entry.shape
            key = f"base_model.model.{name.removesuffix('.weight')}"
            a = torch.randn(16, into, generator=generator) * into**-0.5
            tensors[f"{key}.lora_A.weight"] = a
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, 16, generator=generator) * 0.002
    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules=rf".*layers\.\d+\.(self_attn|mlp)\.({projections})"
    )
    config.inference_mode = True
    directory.mkdir()
    config.save_pretrained(str(directory))
    save_file(tensors, str(directory / "adapter_model.safetensors"))


# --- the methods, each run in a process of its own ----------------------------------------------


def work(method: str, base: Path, adapter: Path, out: Path) -> Run:
    """Import what the method needs, then do it and flush it to disk."""
    idle = resident()
    method = method.removeprefix(LORA)
    if method.startswith("bake"):
        from so8tqc.config import BakeConfig
        from so8tqc.services import bake as service

        if method == "bake, base hashed":
            service._prove = lambda *_: service._Proof()
        config = BakeConfig(base=base, rotations=adapter, out=out, verify=method != "bake")
        started = time.perf_counter()
        service.bake(config)
    elif method.startswith("PEFT"):
        from peft import PeftModel
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        stored = method == "PEFT, stored dtype"
        vision = hasattr(AutoConfig.from_pretrained(str(base)), "vision_config")
        auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        started = time.perf_counter()
        model = auto.from_pretrained(str(base), dtype=torch.bfloat16 if stored else torch.float32)
        live = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=not stored)
        live.merge_and_unload().to(torch.bfloat16).save_pretrained(str(out))
    else:
        started = time.perf_counter()
        subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    os.sync()
    seconds = time.perf_counter() - started
    return Run(seconds, peak_bytes() - idle)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_a_process(method: str, base: Path, adapter: Path, out: Path, *, keep: bool = False) -> Run:
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    command = [sys.executable, __file__, "--work", method, str(base), str(adapter), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    if not keep:
        shutil.rmtree(out, ignore_errors=True)
    return Run(*json.loads(done.stdout.splitlines()[-1]))


# --- what a merge costs -------------------------------------------------------------------------


def accuracy(base: Path, lora: Path, root: Path, count: int = 6, tokens: int = 128) -> None:
    """Largest distance from the exact W' in ulps, and KL from the unmerged float64 forward."""
    from so8tqc.adapters.plan import plan_adapters
    from so8tqc.checkpoints.safetensors_index import open_checkpoint
    from so8tqc.config import QUALITY_TEXTS
    from so8tqc.services.weights.adapters import adapter_algebra
    from so8tqc.sources.hf import HFModel
    from so8tqc.sources.inputs.prepared import prepare
    from so8tqc.sources.inputs.texts import load_tokenizer
    from so8tqc.sources.unmerged import load_unmerged

    plan = plan_adapters(open_checkpoint(base), [lora], None, dtype="keep")
    reference = load_unmerged(base, [lora], dtype="float64")
    texts = prepare((QUALITY_TEXTS,), load_tokenizer(base), tokens).texts[:count]

    def log_probabilities(model: HFModel) -> torch.Tensor:
        rows = [model.head(model.hidden(text.tokens)).double() for text in texts]
        return torch.log_softmax(torch.cat(rows), dim=-1)

    expected = log_probabilities(reference)
    print(f"{'':26}{'ulp':>9}{'not exact':>12}{'KL, nats':>12}")
    for method in ("LoRA, bake", "LoRA, PEFT, stored dtype", "LoRA, PEFT, float32"):
        out = root / "accuracy"
        in_a_process(method, base, lora, out, keep=True)
        results = adapter_algebra(open_checkpoint(out), plan)
        ulp = max(r.comparison.max_ulp for r in results)
        wrong = sum(r.comparison.max_ulp > 0.5 for r in results)
        got = log_probabilities(HFModel.load(out, dtype="float64"))
        kl = float((expected.exp() * (expected - got)).sum(dim=-1).mean())
        print(f"{method:26}{ulp:9.3f}{wrong:8}/{len(results)}{kl:12.3e}")
        shutil.rmtree(out, ignore_errors=True)


# --- the comparison -----------------------------------------------------------------------------


def compare(name: str, root: Path, repeats: int, methods: list[str]) -> None:
    base = MODELS[name](root)
    adapter, lora = root / f"{name}-adapter", root / f"{name}-lora"
    write_adapter(base, adapter)
    write_lora(base, lora)
    runs: dict[str, list[Run]] = {method: [] for method in methods}
    for i in range(repeats):
        for method in methods:
            if i == 0 or "PEFT" not in method:  # once: it is slow, and needs no median
                trained = lora if method.startswith(LORA) else adapter
                runs[method].append(in_a_process(method, base, trained, root / "out"))
    seconds = {m: statistics.median(r.seconds for r in runs[m]) for m in methods}
    memory = {m: max(r.bytes for r in runs[m]) for m in methods}
    size = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 1e9
    against = "bake" if "bake" in methods else "copy"
    print(f"\n{name}: {size:.2f} GB, median of {repeats} (PEFT: 1), {os.cpu_count()} cores")
    print(f"{'':26}{'seconds':>9}{'× copy':>9}{f'× {against}':>9}{'MiB':>9}{f'× {against}':>9}")
    for m in methods:
        print(
            f"{m:26}{seconds[m]:9.2f}{seconds[m] / seconds['copy']:9.2f}"
            f"{seconds[m] / seconds[against]:9.2f}{memory[m] / 2**20:9.0f}"
            f"{memory[m] / memory[against]:9.1f}"
        )
    if name == "smollm2":
        accuracy(base, lora, root)
    if not {"bake", "bake, base hashed", "bake, verified"} <= set(methods):
        return
    hashing = seconds["bake, base hashed"] - seconds["bake"]
    checking = seconds["bake, verified"] - seconds["bake, base hashed"]
    print(f"hashing the base costs {hashing / seconds['bake']:.2f} × the bake, "
          f"reading back {checking / seconds['bake']:.2f} ×")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by ;")
    parser.add_argument("--scratch", type=Path, help="where the models are made (kept)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        method, *paths = arguments.work
        print(json.dumps(work(method, *map(Path, paths))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as own:
        for name in arguments.models.split(","):
            root = arguments.scratch or Path(own)
            for kind in ("adapter", "lora"):
                shutil.rmtree(root / f"{name}-{kind}", ignore_errors=True)
            compare(name, root, arguments.repeats, arguments.methods.split(";"))


if __name__ == "__main__":
    main()
