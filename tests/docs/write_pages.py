"""docs/commands.md and docs/checks.md from the code: ``python tests/docs/write_pages.py``."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

from so8tqc.check_guide import GUIDE
from so8tqc.cli.app import app

DOCS = Path(__file__).parents[2] / "docs"

_COMMANDS_HEAD = """\
<!-- written by python tests/docs/write_pages.py -->

# Commands

Options may also come from a file (`--config`), from `--set KEY=VALUE` and from the environment: see
[configuration](configuration.md). A model may be a directory or a name on a hub: see
[models and data](models-and-data.md).

"""

_CHECKS_HEAD = """\
<!-- written by python tests/docs/write_pages.py -->

# Checks

Each check has an id, a measured value, a limit, a verdict (`pass`, `fail`, or `skip` with the
reason) and a sentence. A report that advises takes the remedies from here. In a terminal,
`so8tqc explain ID` prints the same, with the limits of the profiles, in English or Japanese.
`--fail-on` and `--allow` choose by id which checks count for the verdict. Limits of `logits.*`,
`kl.*` and `calibration.*` in `qc` are those of a profile; `so8tqc qc --help` says how to give your
own. Which check finds which fault: [the fault matrix](fault-matrix.md).
"""

_GROUPS = {
    "structure": "What the files are made of",
    "rotation": "The rotations themselves",
    "algebra": "The fold, from the files alone",
    "logits": "Logits",
    "kl": "Divergence",
    "images": "After pictures",
    "effect": "What the gate does",
    "floor": "The noise floor",
    "chat": "Conversations",
    "calibration": "Probabilities",
    "export": "The exported file",
    "quantize": "The quantized file",
    "choose": "The chosen file",
    "budget": "The budget",
    "derivation": "The file made again",
    "statement": "A statement and its files",
    "attest": "Attesting a run",
    "file": "A file by itself, and beside its record",
    "files": "The files of a run, hashed again",
    "comparison": "Two runs compared",
    "phase": "Attention over long text",
    "oscillation": "Oscillation and repetition",
    "pet": "Hidden states",
    "identify": "Which reading was trained",
    "tensors": "The tensors of a GGUF file",
    "locate": "Where two models part",
    "profile": "The verdict itself",
}


def commands_page() -> str:
    """Every command with its options, by Typer's own writer."""
    command = get_command(app)
    context = typer.Context(command, info_name="so8tqc")
    text = get_docs_for_click(obj=command, ctx=context, name="so8tqc", indent=1)
    return _COMMANDS_HEAD + text.strip() + "\n"


def checks_page() -> str:
    """Every check with what it measures, what a failure means, and the remedy."""
    parts = [_CHECKS_HEAD]
    for group, title in _GROUPS.items():
        parts.append(f"\n## {title}\n")
        for check_id, guide in GUIDE.items():
            if check_id.split(".")[0] == group:
                parts.append(
                    f"\n### `{check_id}`\n\n"
                    f"*{guide.title}.* {_plain(guide.meaning)}\n\n"
                    f"*If it fails:* {_plain(guide.failure)}.\n\n"
                    f"*Then:* {_plain(guide.remedy)}\n"
                )
    return "".join(parts)


def _plain(text: str) -> str:
    """Text with its Markdown characters escaped."""
    return text.replace("*", r"\*").replace("_", r"\_").replace("|", r"\|")


PAGES = {"commands.md": commands_page, "checks.md": checks_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
