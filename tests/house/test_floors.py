"""The contracts on imports hold, and each catches an import that breaks it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT = (
    "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
)


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the contracts of ``folder/pyproject.toml`` on ``folder/src``."""
    # the interpreter puts the script's folder first, so that the copy is looked at
    return subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(folder / "src"), "COLUMNS": "200"},
    )


@pytest.fixture
def house(tmp_path: Path) -> Path:
    shutil.copytree(
        ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_floors_hold() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "planted", "contract"),
    [
        ("metrics/paired.py", "from so8tqc.errors import DataError", "metrics are functions"),
        ("rotations/options.py", "import so8tqc.config.stages", "The floors of the house"),
        (
            "sources/inputs/texts.py",
            "from so8tqc.services.bake import bake",
            "The floors of the house",
        ),
        (
            "sources/inputs/texts.py",
            "from so8tqc.reports.format import size",
            "The floors of the house",
        ),
        ("services/weights/examine.py", "import so8tqc.services.qc.judging", "Rooms of services"),
        ("services/export/service.py", "import so8tqc.services.qc.judging", "Rooms of services"),
        ("services/calibrate/service.py", "import so8tqc.reports.png", "What is measured"),
        ("services/longtext/service.py", "import plotly", "What is measured"),
        ("reports/html.py", "from so8tqc.config import STAGES", "Reports are functions"),
        ("sources/gguf.py", "from llama_cpp import llama_cpp", "llama/ is the one place"),
        ("services/doctor.py", "import rich", "Only the command line"),
    ],
)
def test_a_planted_import_is_caught(house: Path, module: str, planted: str, contract: str) -> None:
    """In a function: there it is as bad as at the top, and easier to overlook."""
    path = house / "src" / "so8tqc" / module
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"\n\ndef _planted() -> None:\n    {planted}\n")
    done = lint(house)
    assert done.returncode == 1, done.stdout + done.stderr
    (broken,) = [line for line in done.stdout.splitlines() if line.startswith(contract)][:1]
    assert broken.endswith("BROKEN")


def test_a_new_room_must_be_given_a_floor(house: Path) -> None:
    (house / "src" / "so8tqc" / "attic.py").write_text("", encoding="utf-8")
    assert lint(house).returncode == 1
