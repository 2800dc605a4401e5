"""What a module leans on: the modules of ours and the libraries that its sources name, and theirs.

Sources are read, nothing is imported. An import counts wherever it stands, in a function too, but
not under ``TYPE_CHECKING``, where none is executed. So do a module that is started as a child
(``"-m", "so8tqc.…"``) and one that is asked for by its name (``import_module``, ``find_spec``).
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TypeGuard

from so8tqc.records import ABSENT, versions
from so8tqc.resources import package_file

PACKAGE = "so8tqc"

DISTRIBUTIONS = {"PIL": "pillow", "llama_cpp": "llama-cpp-python", "yaml": "pyyaml"}
"""Import name → distribution, where more than - and _ differ."""

_BY_NAME = ("import_module", "find_spec")
_CHILD = "-m"


@dataclass(frozen=True)
class Closure:
    """All that some modules lean on, themselves included.

    Attributes:
        modules: of this package, sorted.
        digest: SHA-256 of their sources, and of a package's other files, hex.
        distributions: of the libraries that they name, sorted.
    """

    modules: tuple[str, ...]
    digest: str
    distributions: tuple[str, ...]


@dataclass(frozen=True)
class _Module:
    digest: str
    imports: frozenset[str]


class Sources:
    """The sources of this package; each file is read once.

    Args:
        root: the package's directory.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._modules: dict[str, _Module | None] = {}

    def closure(self, *names: str, without: Iterable[str] = ()) -> Closure:
        """The closure of modules over their imports.

        A package stands for all that is in it, other files than modules (templates, languages)
        included. A module's parents are part of it, since an import runs them.

        Args:
            names: of the modules.
            without: modules and packages that are imported and have no part in what is made.

        Raises:
            ModuleNotFoundError: a name is not that of a module of this package.
        """
        found: dict[str, _Module] = {}
        left = {inner for name in without for inner in self._inside(name)}
        libraries: set[str] = set()
        waiting = [inner for name in names for inner in self._inside(name)]
        while waiting:
            name = waiting.pop()
            if name in found or name in left or (module := self._module(name)) is None:
                continue
            found[name] = module
            waiting += [*self._parents(name), *(n for n in module.imports if _is_ours(n))]
            libraries |= {n.partition(".")[0] for n in module.imports if not _is_ours(n)}
        digest = hashlib.sha256()
        for name in sorted(found):
            digest.update(f"{name} {found[name].digest}\n".encode())
        for file in (file for name in names for file in self._others(name)):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(self._root).as_posix()} {content}\n".encode())
        return Closure(tuple(sorted(found)), digest.hexdigest(), _distributions(libraries))

    def _inside(self, name: str) -> list[str]:
        """A module, or a package with all of its modules."""
        if self._file(name) is None:
            raise ModuleNotFoundError(name)
        folder = self._folder(name)
        return [name, *(self._name(file) for file in sorted(folder.rglob("*.py")))]

    def _others(self, name: str) -> list[Path]:
        """What lies in a package and is no module."""
        files = sorted(self._folder(name).rglob("*"))
        return [f for f in files if f.is_file() and f.suffix not in (".py", ".pyc")]

    def _parents(self, name: str) -> Iterator[str]:
        while "." in name:
            name = name.rpartition(".")[0]
            yield name

    def _folder(self, name: str) -> Path:
        return self._root.joinpath(*name.split(".")[1:])

    def _name(self, file: Path) -> str:
        parts = file.relative_to(self._root).with_suffix("").parts
        return ".".join((PACKAGE, *(part for part in parts if part != "__init__")))

    def _file(self, name: str) -> Path | None:
        folder = self._folder(name)
        places = [folder / "__init__.py"]
        if folder != self._root:
            places.append(folder.with_name(f"{folder.name}.py"))
        return next((place for place in places if place.is_file()), None)

    def _module(self, name: str) -> _Module | None:
        """A module's digest and imports; None for a name that an import takes from a module."""
        if name not in self._modules:
            file = self._file(name)
            self._modules[name] = None if file is None else _read(file, name)
        return self._modules[name]


def _read(file: Path, name: str) -> _Module:
    source = file.read_bytes()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(source)
    named = {n for node in _executed(tree.body) for n in _imported(node, package)}
    if any(word.encode() in source for word in (_CHILD, *_BY_NAME)):
        named |= {n for node in ast.walk(tree) for n in _named(node)}
    return _Module(hashlib.sha256(source).hexdigest(), frozenset(named))


def _executed(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Statements at any depth, but those under ``TYPE_CHECKING``; no expression holds an import."""
    for node in body:
        yield node
        parts = [node.orelse] if _is_for_types(node) else _bodies(node)
        for part in parts:
            yield from _executed(part)


def _bodies(node: ast.AST) -> list[Sequence[ast.AST]]:
    fields = ("body", "orelse", "finalbody", "handlers", "cases")
    return [getattr(node, field) for field in fields if isinstance(getattr(node, field, 0), list)]


def _is_for_types(node: ast.AST) -> TypeGuard[ast.If]:
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return (test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")) == (
        "TYPE_CHECKING"
    )


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    """What an import statement names; of ``from a import b`` both, as b may be a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: 1 - node.level or None] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        yield base
        if _is_ours(base):
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _named(node: ast.AST) -> Iterator[str]:
    """A module that is started as a child, or asked for by its name."""
    if isinstance(node, ast.List | ast.Tuple):
        words = [e.value if isinstance(e, ast.Constant) else None for e in node.elts]
        children = (str(after) for word, after in pairwise(words) if word == _CHILD)
        yield from filter(_is_ours, children)
    elif isinstance(node, ast.Call) and node.args:
        function, first = node.func, node.args[0]
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in _BY_NAME and isinstance(first, ast.Constant):
            yield str(first.value)


def _is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def _distributions(libraries: Iterable[str]) -> tuple[str, ...]:
    foreign = set(libraries) - sys.stdlib_module_names
    return tuple(sorted({DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in foreign}))


@cache
def own_sources() -> Sources:
    """The sources that this process runs."""
    return Sources(package_file(""))


def versions_of(*modules: str) -> dict[str, str]:
    """Versions of this package and of the libraries that modules of it lean on.

    Those that are not installed had no part in what was made, and are left out.
    """
    found = versions(*own_sources().closure(*modules).distributions)
    return {name: version for name, version in found.items() if version != ABSENT}
