"""Encoders of the same files, by the KL that they leave: libllama's, with and without importance,
and this project's by stage.

python benchmarks/quantizers.py WORK [TOKENS [TYPE …]]

The model is that of examples/off_grid_model.py. All encoders write the same types and bytes, but
for the last, which chooses the types of single matrices within these bytes; importance is the
diagonal of the second moments of what enters each matrix, over the very TOKENS tokens of
builtin:calibration that the solver has. The texts that judge are builtin:validation, at most 256
tokens each. KL is the mean per token from the unquantized model, in nats: once of the weights, run
by transformers in float32, once as libllama runs the file. Intervals are 95 %, of the ratio to
importance, paired by text (bootstrap over texts). WORK keeps what was made, so that a second call
goes on.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from off_grid_model import off_grid
from so8tqc.config import ExportConfig, QuantizeConfig
from so8tqc.gguf.file import open_gguf
from so8tqc.llama.imatrix import write_imatrix
from so8tqc.metrics.bootstrap import paired_bootstrap, ratio_of_sums
from so8tqc.quantizers.hessians import MomentsFile, square
from so8tqc.quantizers.solve import solve
from so8tqc.services.export.service import write_gguf
from so8tqc.services.quantize import solver
from so8tqc.services.quantize.hessians import Calibration, compute_moments
from so8tqc.services.quantize.service import quantize
from so8tqc.sources.compare import compare
from so8tqc.sources.gguf import GGUFSource
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.inputs.texts import encode, load_texts, load_tokenizer
from so8tqc.sources.protocol import EncodedText, LogitSource

TOKENS = "40960"
LENGTH = 256
RESAMPLES = 2000


class Encoder(NamedTuple):
    """How a file is made: its name, what changes in ``quantize``, and whether types are chosen."""

    name: str
    options: dict[str, Any]
    passes: int | None = None
    chooses: bool = False


class Judged(NamedTuple):
    """Per-text sums of KL, [texts], of one file; tokens of each; top tokens kept."""

    kl: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.float64]
    top: float

    @property
    def mean(self) -> float:
        return float(self.kl.sum() / self.tokens.sum())


def encoders(work: Path, hessians: Path) -> tuple[Encoder, ...]:
    solved = {"solver": "hessian", "hessians": hessians}
    return (
        Encoder("libllama", {}),
        Encoder("libllama + importance", {"imatrix": work / "importance.gguf"}),
        Encoder("sweep alone", solved, passes=0),
        Encoder("sweep and descent", solved),
        Encoder("types by curvature", {**solved, "model": work / "model"}, chooses=True),
    )


@contextmanager
def staged(encoder: Encoder) -> Iterator[None]:
    """The solver cut down to a stage."""
    before = solver.solve
    if encoder.passes is not None:
        solver.solve = cut_down(encoder.passes)
    try:
        yield
    finally:
        solver.solve = before


def cut_down(passes: int) -> Callable[..., Any]:
    @functools.wraps(solve)
    def call(*arguments: Any, **named: Any) -> Any:
        return solve(*arguments, **{**named, "passes": passes})

    return call


def write_importance(moments: MomentsFile, path: Path, tokens: int) -> None:
    """What ``llama-imatrix`` sums: squares of each token's inputs, for k and v those of q."""
    sums, counts = {}, {}
    own = {name: group for group in moments.manifest.groups for name in group.tensors}
    for name in own:
        group = own[name.replace(".attn_k.", ".attn_q.").replace(".attn_v.", ".attn_q.")]
        part = moments.part(group)
        diagonal = np.diagonal(square(part.kept, group.columns))
        diagonal = diagonal + np.diagonal(square(part.held, group.columns))
        sums[name] = diagonal[None]
        counts[name] = np.array([group.tokens + group.held])
    write_imatrix(path, sums, counts, datasets=["builtin:calibration"], chunks=1, chunk_size=tokens)


def weights_source(gguf: Path) -> HFSource:
    """A GGUF's weights, dequantized and run by transformers in float32."""
    module = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    return HFSource(HFModel(module, gguf), "candidate")


def judge(reference: LogitSource, source: LogitSource, texts: Sequence[EncodedText]) -> Judged:
    pair = (reference.name, source.name)
    table = compare([reference, source], [pair], texts)[pair]
    source.close()
    text, kl = np.asarray(table.text), np.asarray(table.columns["kl"], dtype=np.float64)
    count = len(texts)
    return Judged(
        np.bincount(text, kl, minlength=count),
        np.bincount(text, minlength=count).astype(np.float64),
        float(np.mean(table.columns["same_top"])),
    )


def against(ours: Judged, peer: Judged) -> str:
    """Ratio of mean KL with its 95 % interval, and that of the worst text."""
    low, high = paired_bootstrap(
        np.stack([ours.kl, peer.kl], axis=1), ratio_of_sums, resamples=RESAMPLES, seed=0
    )
    return (
        f"{ours.mean / peer.mean:.3f} [{low:.3f}, {high:.3f}] | "
        f"{float((ours.kl / peer.kl).max()):.2f}"
    )


def make(
    encoder: Encoder, type_: str, gguf: Path, work: Path, size: int | None
) -> tuple[Path, float]:
    """The file, and the seconds that it took (0 if it was there).

    Args:
        encoder: who makes it.
        type_: the recipe.
        gguf: the unquantized file.
        work: where files are kept.
        size: bytes of the files of the recipe's types, for an encoder that chooses others.
    """
    folder = work / encoder.name.replace(" ", "_").replace(",", "")
    path = folder / f"model-{type_}{'-mixed' if encoder.chooses else ''}.gguf"
    if path.is_file():
        return path, 0.0
    options = {**encoder.options, **({"max_size": size} if encoder.chooses else {})}
    start = time.perf_counter()
    with staged(encoder):
        quantize(QuantizeConfig(gguf=gguf, out=folder, types=(type_,), **options))
    return path, time.perf_counter() - start


def main() -> None:
    work = Path(sys.argv[1])
    tokens = int((sys.argv[2:] or [TOKENS])[0])
    types = sys.argv[3:] or ["Q4_K_M"]
    model, gguf, hessians = work / "model", work / "model-F16.gguf", work / "hessians.npz"
    if not model.is_dir():
        off_grid(model)
    if not gguf.is_file():
        write_gguf(ExportConfig(model=model, out=gguf))
    if not hessians.is_file():
        start = time.perf_counter()
        compute_moments(
            Calibration(model, ("builtin:calibration",), tokens), open_gguf(gguf), hessians
        )
        print(f"second moments of {tokens} tokens: {time.perf_counter() - start:.0f} s")
    write_importance(MomentsFile(hessians), work / "importance.gguf", tokens)
    reference = HFSource(HFModel.load(model), "reference")
    texts = encode(load_texts(["builtin:validation"]), load_tokenizer(model), LENGTH)
    print(f"{sum(t.tokens.size - 1 for t in texts)} tokens of {len(texts)} texts")
    for type_ in types:
        table(type_, encoders(work, hessians), gguf, work, reference, texts)


def table(
    type_: str,
    known: Sequence[Encoder],
    gguf: Path,
    work: Path,
    reference: LogitSource,
    texts: Sequence[EncodedText],
) -> None:
    judgement = "× importance | worst text"
    run = f"KL, libllama | {judgement} | same top | s"
    head = f"| {type_} | bytes | KL, weights | {judgement} | {run}"
    print(f"\n{head} |\n{'|---' * (head.count('|'))}|")
    judged: dict[str, tuple[Judged, Judged]] = {}
    rows: list[tuple[str, int, float]] = []
    for encoder in known:
        path, seconds = make(encoder, type_, gguf, work, rows[0][1] if rows else None)
        judged[encoder.name] = (
            judge(reference, weights_source(path), texts),
            judge(reference, GGUFSource(path, "candidate"), texts),
        )
        rows.append((encoder.name, path.stat().st_size, seconds))
    peer = judged["libllama + importance"]
    for name, size, seconds in rows:
        weights, run = judged[name]
        print(
            f"| {name} | {size:,} | {weights.mean:.4f} | {against(weights, peer[0])} | "
            f"{run.mean:.4f} | {against(run, peer[1])} | {run.top:.3f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
