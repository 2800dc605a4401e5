"""docs/architectures.md from the lines that ``sweep.py`` wrote."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_RIGHT = 1e-4

_HEAD = """# Architectures

Written by `tests/architectures/page.py` from a sweep (`nox -s architectures`); nobody edits it by
hand. Every text-generation type of the installed transformers is built small, with random weights,
and taken through bake, `qc --level files`, export to F16 and quantization to Q8_0.

* **error**: largest difference of the baked model's logits from those of the gated model, as a
  share of what the gates change. Both are transformers' own float64 logits; the gates are pre-hooks
  x ↦ R·x on its projections. A right bake stores float32, and stays below {limit:g}.
* **unbaked found**: whether `qc --level files` fails the base model in place of the baked one.
* **faults**: conversion faults planted in the exported file (transposed, exchanged, unscaled,
  unpermuted, one expert left out), and how many of them the proof found.
* A FAIL of `export.logits` alone says that libllama computes other logits of this small model than
  transformers does, though every tensor is what the converter makes of its source; or that it
  cannot load it. Where the reason is established, the table of counts says it.
* A refusal names what the pinned converter cannot do. Models have a sentencepiece tokenizer, or
  that of SmolLM2 where the converter takes no other. Where a refusal is about the tokenizer, it
  is about these two: a model of that type with its own may well be converted.

{snapshot}

"""

_SCALE = (
    "transformers' class that sees does not apply the text model's `logit_scale`, libllama does "
    "(`findings/vision_wrappers_forget_the_logit_scale.sh`)"
)

NOT_ALIKE = {
    "aya_vision": _SCALE,
    "bamba": "the converter reorders the rows of whole heads where only half of a head turns; with "
    "the rows of that half alone reordered the file has transformers' logits",
    "cohere2_vision": _SCALE,
    "qwen3_vl_moe": "transformers 5 saves its experts as [out, in], the converter reads [in, out]",
}
"""Type → why its file gives other logits, as established in the sources of the converter, libllama
and transformers; of bamba also by rewriting its file: mean KL 2.1e-6 in place of 0.027."""


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    """The last line of each type."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["kind"]] = row
    return [rows[kind] for kind in sorted(rows)]


def counts(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the sweep found, in numbers."""
    baked = [r for r in rows if r["bake"] == "pass"]
    right = [r for r in baked if r["error"] is not None and r["error"] <= _RIGHT]
    compared = [r for r in baked if r["error"] is not None]
    exports = Counter(r["export"].split(" ")[0].rstrip(":") or "none" for r in baked)
    faults = [found for r in rows for found in r["faults"].values()]
    wrong = [r["kind"] for r in baked if "FAIL" in r["export"] and r["kind"] in NOT_ALIKE]
    unknown = exports["FAIL"] - len(wrong)
    internal = sum("exit 70" in str(v) for r in rows for v in r.values())
    return [
        ("types swept", str(len(rows))),
        ("baked", f"{len(baked)}; refused or not built: {len(rows) - len(baked)}"),
        ("right, of those with an oracle", f"{len(right)} of {len(compared)}"),
        ("unbaked models found", f"{sum('FAIL' in r['unbaked'] for r in baked)} of {len(baked)}"),
        ("exports", f"{exports['pass']} pass, {exports['FAIL']} FAIL, {exports['exit']} refused"),
        (
            "right files that pass",
            f"{exports['pass']} of {exports['pass'] + unknown}"
            + "".join(f"; {kind} is not: {NOT_ALIKE[kind]}" for kind in wrong),
        ),
        *[
            (f"nearest to the limit of `{check}`, of right files", _nearest(rows, check))
            for check in ("export.logits", "export.logits_max")
        ],
        ("planted conversion faults found", f"{sum(faults)} of {len(faults)}"),
        (
            "quantized",
            f"{sum(r['quantize'] == 'pass' for r in baked)} pass, "
            f"{sum(r['quantize'].startswith(('FAIL', 'exit')) for r in baked)} do not",
        ),
        ("internal errors (exit 70)", str(internal)),
    ]


def _nearest(rows: list[dict[str, Any]], check: str) -> str:
    """The passing file that uses most of a check's limit."""
    shares = [
        (r["export_checks"][check][0] / r["export_checks"][check][1], r["kind"])
        for r in rows
        if r["export"] == "pass" and check in r["export_checks"]
    ]
    share, kind = max(shares)
    return f"{share:.0%} of it ({kind})"


def _snapshot(rows: list[dict[str, Any]]) -> str:
    """Which rows are of which runs."""
    runs = Counter(r["run"] for r in rows)
    (largest, count), *others = runs.most_common()
    minutes = sum(r["seconds"] for r in rows if r["run"] == largest) / 60
    told = (
        f"{count} of {len(rows)} rows are of one run of {minutes:.0f} minutes in one process, "
        f"begun {largest} UTC"
    )
    for run, _ in others:
        kinds = ", ".join(r["kind"] for r in rows if r["run"] == run)
        told += f"; made again {run}: {kinds}"
    return told + "."


def _cell(text: str) -> str:
    """A reason, short enough for a table, and without the paths of one run."""
    words = [w for w in text.replace("|", "/").split() if not w.startswith(("/", "DIR"))]
    short = " ".join(words).replace("Its whole output is in", "").strip()
    return short[:160]


def page(rows: list[dict[str, Any]]) -> str:
    """The whole page."""
    lines = [_HEAD.format(limit=_RIGHT, snapshot=_snapshot(rows)), "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in counts(rows)]
    lines += [
        "",
        "| type | attention output | width | layers | bake | error | unbaked found | export "
        "| faults | quantize |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        error = "–" if r["error"] is None else f"{r['error']:.1e}"
        found = "–" if not r["unbaked"] else ("yes" if "FAIL" in r["unbaked"] else "**no**")
        faults = f"{sum(r['faults'].values())}/{len(r['faults'])}" if r["faults"] else "–"
        projection = f"`{r['projection']}`" if r["projection"] else "–"
        lines.append(
            f"| {r['kind']} | {projection} | {r['width'] or '–'} | {r['layers'] or '–'} "
            f"| {_cell(r['bake'])} | {error} | {found} | {_cell(r['export']) or '–'} | {faults} "
            f"| {_cell(r['quantize']) or '–'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(read(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)), "utf-8")
