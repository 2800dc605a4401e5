"""What ``export --keep-f32 baked`` buys (KL from the gated model) and costs (bytes), in one run.

python benchmarks/keep_f32.py [TEXTS]

Each row is a GGUF file of SmolLM2-135M with the gates of ``data/gates``. *Weights* is the KL of the
baked weights as the file stores them, run by transformers in float32; *libllama* that of the file
as libllama runs it, whose arithmetic rounds activations to a matrix's type, and cached keys and
values to F16. KL is the mean per token, in nats.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from so8tqc.checkpoints.provenance import read_provenance
from so8tqc.config import BakeConfig, ExportConfig
from so8tqc.rotations.read import read_rotations
from so8tqc.services.bake import bake
from so8tqc.services.export.service import export
from so8tqc.sources.compare import compare
from so8tqc.sources.gated import GatedSource
from so8tqc.sources.gguf import GGUFSource
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.inputs.builtin import DEMO_MODEL, resolve_model, resolve_rotations
from so8tqc.sources.inputs.texts import encode, load_texts, load_tokenizer
from so8tqc.sources.protocol import EncodedText, LogitSource


class Row(NamedTuple):
    """A file: how it was baked and exported, and the dtype that its baked tensors end in."""

    baked: str
    type: str
    keep: tuple[str, ...]
    ends: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.baked} bake, {self.type.upper()}" + (" --keep-f32 baked" * bool(self.keep))


ROWS = (
    Row("keep", "f16", (), torch.bfloat16),
    Row("float32", "f16", (), torch.float16),
    Row("float32", "f16", ("baked",), torch.float32),
    Row("float32", "bf16", ("baked",), torch.float32),
    Row("float32", "f32", (), torch.float32),
)


def mean_kl(gated: LogitSource, source: LogitSource, texts: tuple[EncodedText, ...]) -> float:
    pair = (gated.name, source.name)
    table = compare([gated, source], [pair], texts)[pair]
    source.close()
    return float(table.columns["kl"].mean())


def weights_source(directory: Path, ends: torch.dtype) -> HFSource:
    """The baked model, its baked tensors rounded as the file stores them."""
    model = HFModel.load(directory)
    provenance = read_provenance(directory)
    assert provenance is not None
    parameters = dict(model.module.named_parameters())
    with torch.inference_mode():
        for tensor in provenance.tensors:
            parameter = parameters[tensor.name]
            parameter.copy_(parameter.to(ends).float())
    return HFSource(model, "weights")


def main() -> None:
    base, rotations = resolve_model(DEMO_MODEL), resolve_rotations("builtin:smollm2-135m-pet")
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    texts = encode(load_texts(["builtin:validation"])[:count], load_tokenizer(base), 256)
    model = HFModel.load(base)
    gated = GatedSource(model, read_rotations(rotations), "gated")
    print(f"{sum(t.tokens.size - 1 for t in texts)} tokens of {len(texts)} texts")
    print("| file | bytes | KL, weights | KL, libllama |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for row in ROWS:
            baked = Path(scratch) / row.baked
            if not baked.exists():
                bake(BakeConfig(base=base, rotations=rotations, out=baked, baked_dtype=row.baked))
            file = Path(scratch) / "model.gguf"
            export(ExportConfig(model=baked, out=file, type=row.type, keep_f32=row.keep))
            weights = mean_kl(gated, weights_source(baked, row.ends), texts)
            libllama = mean_kl(gated, GGUFSource(file, "libllama"), texts)
            size = file.stat().st_size
            print(f"| {row.name} | {size:,} | {weights:.2e} | {libllama:.2e} |", flush=True)


if __name__ == "__main__":
    main()
