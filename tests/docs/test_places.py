"""Pages that say where something stands: every file, folder and name that they give is there."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from blocks import ROOT

PAGES = ("docs/extending.md", "docs/architecture.md")
_CODE = re.compile(r"`([^`\n]+)`")
_PLACE = re.compile(r"^(?:src|tests|docs|configs|examples|benchmarks)/[\w./-]+(?:::\w+)?$")
_MODULE = re.compile(r"^(?:[a-z_]+\.)+\w+$")
SOURCE = ROOT / "src" / "so8tqc"


@cache
def names(path: str) -> set[str]:
    """What a module defines at its top."""
    found: set[str] = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                found |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found


def lost(text: str) -> list[str]:
    """Places in a page that are not there: ``path``, ``path::name``, and ``room.module[.name]``."""
    return [code for code in _CODE.findall(text) if not _is_there(code)]


def _is_there(code: str) -> bool:
    if _PLACE.match(code):
        path, _, name = code.partition("::")
        return (ROOT / path).exists() and (not name or name in names(path))
    if _MODULE.match(code) and (SOURCE / code.split(".", maxsplit=1)[0]).is_dir():
        parts = code.split(".")
        if SOURCE.joinpath(*parts).with_suffix(".py").is_file() or SOURCE.joinpath(*parts).is_dir():
            return True
        module = SOURCE.joinpath(*parts[:-1]).with_suffix(".py")
        return module.is_file() and parts[-1] in names(str(module.relative_to(ROOT)))
    return True


@pytest.mark.parametrize("page", PAGES)
def test_every_place_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert sum(bool(_PLACE.match(c) or _MODULE.match(c)) for c in _CODE.findall(text)) > 20
    assert lost(text) == []


def test_a_lost_place_is_seen() -> None:
    for code in (
        "src/so8tqc/nowhere.py",
        "src/so8tqc/records.py::nobody",
        "docs/nothing.md",
        "services.qc.nobody",
        "metrics.columns.Nobody",
    ):
        assert lost(f"see `{code}`") == [code]
    kept = "`src/so8tqc/records.py::judge` `metrics.columns.COLUMNS` `services.qc` `kl.mean` `x.y`"
    assert lost(kept) == []
