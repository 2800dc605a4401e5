"""What is evaluated once: one more candidate, and another limit, beside running it all.

    python benchmarks/run.py [--model MODEL --rotations GATES] [--max-tokens N]

Bakes the model, then judges it by commands in processes of their own, from an empty cache:

* *first*: the bake, all evaluated;
* *one more*: the bake and a second candidate (the same weights in another directory, one more file
  in it), of which the first is in the cache;
* *alone*: reference and second candidate without the cache, with all that belongs to a reference
  (base, both folds);
* *bare*: the forward passes of reference and second candidate alone, loaded and compared, nothing
  judged;
* *another limit*: both candidates by another profile, seed and number of resamples.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = [sys.executable, "-m", "so8tqc"]


def main() -> None:
    """Prints times and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--rotations", default="builtin:smollm2-135m-pet")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare is not None:
        bare(Path(given.model), Path(given.rotations), given.bare, given.max_tokens)
        return
    from so8tqc.sources.inputs.builtin import resolve_model, resolve_rotations

    model, gates = resolve_model(given.model), resolve_rotations(given.rotations)
    with tempfile.TemporaryDirectory(prefix="so8tqc-once-") as root:
        measure(model, gates, Path(root), given.max_tokens)


def measure(model: Path, gates: Path, root: Path, tokens: int) -> None:
    """The five commands, one after another."""
    one, two = root / "baked", root / "second"
    timed([*RUN, "bake", str(model), str(gates), "--out", str(one)])
    shutil.copytree(one, two)
    (two / "notes.json").write_text('"the same weights, another digest"\n')

    def qc(out: str, candidates: list[Path], *options: str) -> float:
        command = [*RUN, "qc", "--reference", str(model), "--rotations", str(gates)]
        for candidate in candidates:
            command += ["--candidate", str(candidate)]
        return timed(
            [
                *command, "--max-tokens", str(tokens), "--out", str(root / out),
                "--set", f"evaluation_folder={root / 'cache'}", *options,
            ]
        )  # fmt: skip

    qc("warm", [one], "--no-evaluation-cache", "--max-tokens", "8")  # kernels are compiled
    first = qc("first", [one])
    more = qc("more", [one, two])
    alone = qc("alone", [two], "--no-evaluation-cache")
    passes = timed(
        [
            sys.executable, __file__, "--model", str(model), "--rotations", str(gates),
            "--max-tokens", str(tokens), "--bare", str(two),
        ]
    )  # fmt: skip
    again = qc("again", [one, two], "--profile", "strict", "--set", "seed=1", "--set",
               "resamples=4000")  # fmt: skip
    record = json.loads((root / "again" / "record.json").read_text())
    fresh = json.loads((root / "more" / "record.json").read_text())
    if (
        record["metrics"]["candidates"]["second"]["kl_mean"]
        != (fresh["metrics"]["candidates"]["second"]["kl_mean"])
    ):
        raise SystemExit("the cache says something else than the run")
    if "reference → second" in fresh["metrics"]["kept"]:
        raise SystemExit("the second candidate was not run")
    told = {"first": first, "one more": more, "alone": alone, "bare": passes,
            "another limit": again}  # fmt: skip
    for name, seconds in told.items():
        print(f"{name}: {seconds:.1f} s")
    print(f"not run in the last: {len(record['metrics']['kept'])} comparisons, all of them")
    print(f"one more / alone: {more / alone:.2f} (limit 1.15)")
    print(f"one more / bare: {more / passes:.2f}")
    print(f"another limit / first: {again / first:.2f}")


def bare(model: Path, gates: Path, candidate: Path, tokens: int) -> None:
    """Reference and candidate over the same texts, loaded and compared."""
    from so8tqc.rotations.read import read_rotations
    from so8tqc.sources.compare import compare
    from so8tqc.sources.gated import GatedSource
    from so8tqc.sources.hf import HFModel, HFSource
    from so8tqc.sources.inputs.prepared import prepare
    from so8tqc.sources.inputs.texts import load_tokenizer

    texts = prepare(["builtin:validation"], load_tokenizer(model), tokens).texts
    reference = GatedSource(HFModel.load(model), read_rotations(gates), "reference")
    other = HFSource(HFModel.load(candidate), "candidate")
    compare([reference, other], [("reference", "candidate")], texts)


def timed(command: list[str]) -> float:
    """Seconds of a command; a verdict that is no pass is none of ours.

    Raises:
        SystemExit: it did not come to a verdict.
    """
    began = time.perf_counter()
    done = subprocess.run(
        command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)}: {done.returncode}\n{done.stderr}")
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
