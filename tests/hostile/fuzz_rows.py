"""tests/reliability/hostile.json from results of ``fuzz.py``: ``python fuzz_rows.py FILE …``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parents[1] / "reliability" / "hostile.json"

FOUND = {
    "PyTorch gates": "64 numbers that claimed to be 2³⁴, packed data of 1.5 GiB, a `bytearray` of "
    "2⁴⁰ bytes: all were allocated",
    "PyTorch gates, old format": "a text of 2⁶³ bytes, for which memory was asked (in the scan "
    "made against the others)",
    "native gates": "a header of a million tensors: 1.1 GiB of objects, 24 s",
    "PEFT adapter": "`num_cayley_neumann_terms` of 2³¹: a loop of hours",
    "checkpoint": "an index whose name of 5,000 characters was repeated in full",
    "bake": "a NaN whose tensor was named, but not its file",
    "capture": "a header entry of 100,000 characters, repeated in full",
    "GGUF": "planted faults only (below)",
    "GGUF rewritten": "planted faults only (below)",
    "GGUF run by libllama": "the vocabulary was read in the main process, which an abort would end",
    "importance matrix": "a matrix of no numbers: numpy's own error",
    "importance matrix, old format": "planted faults only (below)",
    "config": "`/dev/zero`, read without end",
    "profiles": "only their size was limited; now they are read as every other YAML",
    "texts .json": "half a surrogate pair, an integer of 100,000 digits, 1.5 GiB of empty objects",
    "texts .jsonl": "half a surrogate pair; U+2028 inside a text ended its line",
    "texts .txt": "files of any size were read whole",
    "record": "`/dev/zero` and pipes, read without end",
    "report": "a row that is no list: an assertion",
    "manifest": "a NUL in a path: Python's own error",
    "token table": "columns of different lengths, and what zlib, numpy and tokenize raise",
    "temperature config": "a group that is missing, without the file's name",
    "tokenizer": "a panic of the Rust library, which is no `Exception`",
    "transformers model": "10⁹ layers, built until memory ended",
    "provenance": "planted faults only (below)",
    "package of texts": "planted faults only (below)",
}
"""Reader → the fault that this found in it before it was mended."""


def rows(results: dict[str, dict[str, Any]], planted: int) -> list[dict[str, Any]]:
    """One row for each reader, and one for the watch itself."""
    found = []
    for name, row in results.items():
        if row["faults"]:
            raise SystemExit(f"{name} has faults; mend them first")
        corpus = list(row["corpus"].values())
        read = row["read"] + corpus.count("read")
        refused = row["refused"] + corpus.count("refused")
        found.append(
            {
                "kind": "hostile",
                "tried": f"{name}: {row['inputs']:,} inputs spoilt, {len(corpus)} made by hand",
                "count": read + refused,
                "outcome": f"{read:,} read, {refused:,} refused",
                "planted": FOUND[name],
            }
        )
    found.append(
        {
            "kind": "hostile",
            "tried": "readers that crash, panic, write, delete, start a process, look up a host, "
            "run code, take 2 GiB, name no file or have another exit code",
            "count": planted,
            "outcome": "every one is found",
            "planted": "these are the planted faults (`tests/hostile/test_hostile.py`)",
        }
    )
    return found


def main() -> None:
    """Merge the given files, and write their rows; those of readers not in them stay."""
    from test_hostile import PLANTED

    results: dict[str, dict[str, Any]] = {}
    for file in sys.argv[1:]:
        results |= json.loads(Path(file).read_text("utf-8"))
    ordered = {name: results[name] for name in FOUND if name in results}
    made = {row["tried"].partition(":")[0]: row for row in rows(ordered, len(PLANTED))}
    before = {row["tried"].partition(":")[0]: row for row in json.loads(ROWS.read_text("utf-8"))}
    text = json.dumps(list((before | made).values()), indent=1, ensure_ascii=False)
    ROWS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
