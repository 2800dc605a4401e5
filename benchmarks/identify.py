"""No wrong reading is named: gates trained a few steps on tiny models, each by a reading drawn at
random (parametrization, convention, site, length of the training, learning rate, initial scale),
identified from the text that they were trained on, and from logits that the training recorded.

python benchmarks/identify.py [CASES]

Half of the bases have random weights, half were trained on English prose. Gates that do not lower
the NLL of their text are drawn anew. Three questions are asked of each case: with nothing known;
with the parametrization known; and with a capture of eight texts.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "services" / "identify"))

import torch
from trained_cases import Case, make_base, record_capture, topics, train_case

from conftest import train_tokenizer
from so8tqc.config import IdentifyConfig
from so8tqc.records import Record
from so8tqc.services.identify.service import identify

CASES = 40
QUESTIONS = ("nothing known", "parametrization", "capture")
CERTAIN = "nothing known: convention and site"


def asked(base: Path, case: Case, **more: object) -> Record:
    return identify(
        IdentifyConfig(
            base=base, rotations=case.file, ctx=64, windows=48, resamples=1000, **more
        )  # type: ignore[arg-type]
    )  # fmt: skip


def outcome(record: Record, case: Case) -> str:
    found = record.metrics["identified"]
    if found is None:
        return "undecided"
    readings = record.metrics["readings"]
    return "right" if case.truth in (found, *readings[found]["same"]) else "WRONG"


def certain(record: Record, case: Case) -> str:
    """Whether convention and site are certain, which needs no parametrization."""
    facts = record.metrics["certain"]
    if not {"convention", "site"} <= facts.keys():
        return "undecided"
    right = (facts["convention"], facts["site"]) == (case.convention, case.site)
    return "right" if right else "WRONG"


def main() -> None:
    wanted = int(sys.argv[1]) if sys.argv[1:] else CASES
    torch.set_num_threads(1)
    texts = topics()
    counts = {question: Counter() for question in (*QUESTIONS, CERTAIN)}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer = train_tokenizer(work / "tokenizer")
        bases = [make_base(work / f"base-{steps}", tokenizer, steps) for steps in (0, 300)]
        made, seed = 0, 0
        while made < wanted:
            base, seed = bases[made % 2], seed + 1
            case = train_case(base, work / "cases", seed, texts)
            if case is None:
                continue
            made += 1
            told = {"parametrization": case.parametrization}
            text = (str(case.text),)
            capture = record_capture(base, case, work / f"capture-{seed}.safetensors")
            found = {
                "nothing known": asked(base, case, data=text),
                "parametrization": asked(base, case, data=text, rotation_options=told),
                "capture": asked(base, case, capture=capture),
            }
            line = []
            for question, record in found.items():
                counts[question][outcome(record, case)] += 1
                line.append(f"{question}: {outcome(record, case)}")
            counts[CERTAIN][certain(found["nothing known"], case)] += 1
            line.append(f"convention and site: {certain(found['nothing known'], case)}")
            gain = case.before - case.after
            print(f"{made:3d} {base.name:8s} {case.truth:32s} {case.steps:3d} steps, gain "
                  f"{gain:.4f}   {', '.join(line)}", flush=True)  # fmt: skip
            if "--sentences" in sys.argv or "WRONG" in " ".join(line):
                print(*(r.metrics["sentence"] for r in found.values()), sep="\n", flush=True)
    for question, count in counts.items():
        print(f"{question}: {dict(count)}")


if __name__ == "__main__":
    main()
