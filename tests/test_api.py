"""``import so8tqc`` for notebooks: light, complete, and the commands' equal."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import so8tqc
from so8tqc.cli.main import run
from so8tqc.errors import ConfigError
from so8tqc.rotations.read import read_rotations

ROOT = Path(__file__).parent.parent


@pytest.fixture
def here(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A directory with model and gates under the names that documentation uses."""
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copytree(llama, folder / "model")
    shutil.copy(make_gates(llama), folder / "gates.safetensors")
    monkeypatch.chdir(folder)
    return folder


def test_import_is_light_and_every_name_is_there() -> None:
    code = (
        "import sys, so8tqc\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'scipy', 'typer'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "so8tqc.bake, so8tqc.qc\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
    assert set(so8tqc.__all__) <= set(dir(so8tqc))
    for name in so8tqc.__all__:
        assert getattr(so8tqc, name) is not None
    with pytest.raises(AttributeError, match="frobnicate"):
        so8tqc.frobnicate  # noqa: B018


def test_the_notebook_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "api.py"))
    printed = capsys.readouterr().out
    assert "bake: pass" in printed
    assert "qc: pass" in printed
    assert "transposed: The transposed rotation was folded" in printed
    assert "already baked" in printed


def test_python_blocks_of_the_documentation_run(here: Path) -> None:
    for page in ("python.md", "gate-format.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert blocks
        for block in blocks:
            exec(compile(block, page, "exec"), {})
    assert read_rotations(Path("mine.safetensors")).parametrization == "exp"
    assert (here / "qc" / "report.html").is_file()


def test_the_table_lists_what_is_public() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    listed = {
        name
        for line in page.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert listed == set(so8tqc.__all__) - {"__version__"}


def test_a_function_does_what_its_command_does(here: Path) -> None:
    ours = so8tqc.bake(Path("model"), Path("gates.safetensors"), "ours/", baked_dtype="float32")
    command = [
        "bake",
        "model/",
        "gates.safetensors",
        "--out",
        "theirs/",
        "--baked-dtype",
        "float32",
        "--quiet",
    ]
    assert run(command) == 0
    theirs = so8tqc.load_record("theirs.record.json")
    assert so8tqc.load_record("ours.record.json") == ours
    assert ours.checks == theirs.checks
    assert ours.metrics == theirs.metrics
    weights = [Path(name, "model.safetensors").read_bytes() for name in ("ours", "theirs")]
    assert weights[0] == weights[1]
    assert json.loads(Path("ours.record.json").read_text())["kind"] == "bake"


def test_wrong_options_are_named(here: Path) -> None:
    with pytest.raises(ConfigError, match="baked_dtyp"):
        so8tqc.bake("model/", "gates.safetensors", "x/", baked_dtyp="float32")
    with pytest.raises(ConfigError, match="convention"):
        so8tqc.read_rotations("gates.safetensors", convention="diagonal")
    assert so8tqc.read_rotations("gates.safetensors", convention="row").convention == "row"
