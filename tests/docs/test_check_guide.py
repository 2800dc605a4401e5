"""Every check that the code can emit is explained, and nothing else is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from blocks import ROOT

from so8tqc.check_guide import GUIDE

SOURCE = ROOT / "src" / "so8tqc"
_JUDGING = {"judge", "skipped", "_none", "_count", "Check"}
_ID = re.compile(r"^[a-z]+\.(?!weight$)[a-z0-9_]+$")


def test_every_check_is_in_the_guide() -> None:
    assert emitted() == set(GUIDE)


def test_the_page_has_every_check() -> None:
    page = (ROOT / "docs" / "checks.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^### `([\w.]+)`$", page, re.M)) == set(GUIDE)


def test_remedies_say_something() -> None:
    for check_id, guide in GUIDE.items():
        assert min(map(len, guide[1:])) > 10, check_id


def emitted() -> set[str]:
    """Ids in the code: what is judged as a literal; and where a name is judged, which holds an id
    that stands elsewhere in the module, every string of the module that looks like one.
    """
    found: set[str] = set()
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        judged = list(_judged(tree))
        found |= {str(node.value) for node in judged if isinstance(node, ast.Constant)}
        if any(not isinstance(node, ast.Constant) for node in judged):
            found |= {text for text in _strings(tree) if _ID.match(text)}
    return found


def _judged(tree: ast.AST) -> Iterator[ast.expr]:
    """First arguments of all calls that make a check."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in _JUDGING and node.args:
            first = node.args[0]
            assert isinstance(first, (ast.Constant, ast.Name, ast.Subscript)), (
                f"an id that is put together: {ast.unparse(first)}"
            )
            yield first


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
