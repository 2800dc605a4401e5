"""`so8tqc calibrate` against the passes of libllama that it cannot do without.

    python benchmarks/calibrate.py [FILE.gguf … --tokenizer DIR] [--reference FILE.gguf]
        [--max-tokens 256] [--rounds 3]

Without files: SmolLM2-135M as F16 and Q5_K_M. For each, over the same 25 texts and in turns:

* *bare*: libllama in this process, each text decoded in one call, the logits left where they are
  (those of the reference, too, where one is given);
* *walk*: the pass of `calibrate` over the file: a process of its own, the partition function at all
  knots;
* *stage*: `calibrate` as a run calls it, from reading the tokenizer to the record's last number,
  in a process that has its libraries already;
* *command*: `so8tqc calibrate` in a new process, with all that it imports, its pages and its PNG.

Each is the least of its rounds. NUMBA_CPU_NAME=haswell with NUMBA_CPU_FEATURES=+avx2,+fma keeps our
kernel from AVX-512; libllama uses what it was built for.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line runs

from so8tqc.config import CalibrateConfig
from so8tqc.llama.libllama import LlamaModel
from so8tqc.services.calibrate.service import calibrate
from so8tqc.sources.gguf import GGUFSource
from so8tqc.sources.inputs.builtin import DEMO_MODEL, resolve_model
from so8tqc.sources.inputs.prepared import prepare
from so8tqc.sources.inputs.texts import load_tokenizer
from so8tqc.sources.protocol import EncodedText
from so8tqc.sources.temperatures import frequent_tokens, walk_temperatures

DATA = "builtin:validation"
BOUNDS = (0.5, 3.0)


def main() -> None:
    """Prints the seconds of each and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if bool(given.files) != (given.tokenizer is not None):
        parser.error("files and their tokenizer, or neither")
    with tempfile.TemporaryDirectory(prefix="so8tqc-calibrate-") as root:
        if not given.files:
            given.tokenizer = resolve_model(DEMO_MODEL)
            given.files = made(given.tokenizer, Path(root))
        measure_all(given, Path(root))


def made(model: Path, root: Path) -> list[Path]:
    """F16 and Q5_K_M of a model."""
    plain = root / "model-F16.gguf"
    so8tqc("export", model, "--out", plain, "--type", "f16")
    so8tqc("quantize", plain, "--type", "Q5_K_M", "--out", root / "quantized")
    return [plain, *(root / "quantized").glob("*.gguf")]


def measure_all(given: argparse.Namespace, root: Path) -> None:
    """Every file, one after another."""
    texts = prepare([DATA], load_tokenizer(given.tokenizer), given.max_tokens).texts
    print(f"{len(texts)} texts, {sum(text.tokens.size for text in texts)} tokens")
    for file in given.files:
        measure(file, given, texts, root / "out")


def measure(file: Path, given: argparse.Namespace, texts: Sequence[EncodedText], out: Path) -> None:
    """All four of one file, in turns."""
    models = [
        LlamaModel(path, context=given.max_tokens)
        for path in (file, given.reference)
        if path is not None
    ]
    source = GGUFSource(file, file.name, context=given.max_tokens)
    config = CalibrateConfig(
        gguf=file,
        tokenizer=given.tokenizer,
        data=(DATA,),
        out=out,
        reference=given.reference,
        max_tokens=given.max_tokens,
    )
    ways: dict[str, Callable[[], object]] = {
        "bare": lambda: [decode(model, texts) for model in models],
        "walk": lambda: walk_temperatures(
            source, texts, BOUNDS, classes=frequent_tokens(texts, config.classes)
        ),
        "stage": lambda: calibrate(config),
        "command": lambda: command(config),
    }
    for warm in ways.values():
        warm()
    taken = [{name: timed(way) for name, way in ways.items()} for _ in range(given.rounds)]
    source.close()
    least = {name: min(one[name] for one in taken) for name in ways}
    print(f"\n{file.name}" + (f" and {given.reference.name}" if given.reference else ""))
    for name, seconds in least.items():
        every = " ".join(f"{one[name]:.2f}" for one in taken)
        print(f"  {name:8} {seconds:6.2f} s   {seconds / least['bare']:5.2f} × bare   ({every})")


def decode(model: LlamaModel, texts: Sequence[EncodedText]) -> None:
    """Logits of every position of every text."""
    for text in texts:
        model.begin(text.tokens.size)
        model.decode(text.tokens, 0)


def command(config: CalibrateConfig) -> None:
    """The same on the command line."""
    reference = [] if config.reference is None else ["--reference", config.reference]
    so8tqc(
        "calibrate", config.gguf, "--tokenizer", config.tokenizer, "--data", DATA,
        "--out", config.out, "--set", f"max_tokens={config.max_tokens}", *reference,
    )  # fmt: skip


def so8tqc(*arguments: str | Path) -> None:
    """Run a command of ours."""
    subprocess.run(
        [sys.executable, "-m", "so8tqc", *map(str, arguments)], check=True, capture_output=True
    )


def timed(way: Callable[[], object]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
