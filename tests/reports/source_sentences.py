"""Every sentence with measured values that the package can write, read from its sources.

A sentence becomes a check's detail, a diagnosis' text, a notice or a line of ``check``'s answer.
Its expression is followed through local names, both branches of a condition, functions of the
package and the arguments of their callers; whatever is computed is a hole, ``{0}``, ``{1}`` … in
order. What words can stand in a hole are sentences of their own.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import so8tqc
from so8tqc.reports.measured import BOUNDARY, TRIMMED

PACKAGE = Path(so8tqc.__file__).parent

MOST = 64
"""Alternatives of one expression; more would be a sentence that is better written otherwise."""

SPOKEN = (
    "detail",
    "end",
    "why",
    "cause",
    "reason",
    "told",
    "finding",
    "words",
    "what",
    "said",
    "note",
    "problem",
)
"""Fields of the services' own structures that hold words."""

NOTED = (
    "Finding", "MergeFinding", "Mistake", "Guess", "Says", "Hypothesis", "Thing", "Variant"
)  # fmt: skip
"""Structures of the services whose words enter a diagnosis or an answer."""

TABLES = ("_EFFECTS", "_BESIDE", "_TEXTS", "_REFUSED")
"""Constants of words."""

LONGEST = 40
"""Parts of one sentence."""

Function = ast.FunctionDef | ast.AsyncFunctionDef

Parts = tuple[object, ...]
"""Text and holes of one sentence: str, or None for a hole."""

HOLE: Parts = (None,)


@dataclass
class Sources:
    """Modules, and by name: functions, their calls, constants, fields, what these are given."""

    modules: list[ast.Module]
    functions: dict[str, list[Function]] = field(default_factory=dict)
    calls: dict[str, list[tuple[ast.Call, Function | None]]] = field(default_factory=dict)
    constants: dict[str, list[ast.expr]] = field(default_factory=dict)
    fields: dict[str, list[str]] = field(default_factory=dict)
    given: dict[str, list[tuple[ast.expr, Function | None]]] = field(default_factory=dict)


def of_services() -> dict[str, str]:
    """Module → its text, of all that can write into a record."""
    left_out = ("cli", "reports", "config", "corpus", "services/doctor.py", "monitor.py")
    return {
        name: path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
        if not (name := path.relative_to(PACKAGE).as_posix()).startswith(left_out)
    }


def parsed(texts: Mapping[str, str]) -> Sources:
    """Modules with what stands in them by name."""
    found = Sources([ast.parse(text) for text in texts.values()])
    for module in found.modules:
        for node in module.body:
            if isinstance(node, ast.ClassDef):
                found.fields[node.name] = [
                    item.target.id
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                ]
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found.constants.setdefault(node.targets[0].id, []).append(node.value)
    for module in found.modules:
        for node, around in within(module):
            if isinstance(node, Function):
                found.functions.setdefault(node.name, []).append(node)
            elif isinstance(node, ast.Call) and (name := called(node)):
                found.calls.setdefault(name, []).append((node, around))
                for field_name, value in given_to(node, found):
                    found.given.setdefault(field_name, []).append((value, around))
            elif isinstance(node, ast.Dict):
                for entry, value in zip(node.keys, node.values, strict=True):
                    if isinstance(entry, ast.Constant) and entry.value in SPOKEN:
                        found.given.setdefault(str(entry.value), []).append((value, around))
    return found


def given_to(call: ast.Call, sources: Sources) -> list[tuple[str, ast.expr]]:
    """What a constructor is given, by the names of its fields."""
    name = called(call)
    if not name[:1].isupper():
        return []
    placed = zip(sources.fields.get(name, []), call.args, strict=False)
    return [*placed, *((k.arg or "", k.value) for k in call.keywords)]


def within(
    node: ast.AST, around: Function | None = None
) -> Iterator[tuple[ast.AST, Function | None]]:
    """Every node, and the innermost function that it stands in."""
    for child in ast.iter_child_nodes(node):
        yield child, around
        yield from within(child, child if isinstance(child, Function) else around)


def called(call: ast.Call) -> str:
    """The name of what is called, "" for an expression."""
    if isinstance(call.func, ast.Name):
        return call.func.id
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


class Reader:
    """Follows expressions; collects the sentences that can stand in holes."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.inner: set[Parts] = set()
        self.path: list[ast.AST] = []
        self.known: dict[ast.AST, list[Parts]] = {}

    def read(self, expr: ast.expr | None, around: Function | None) -> list[Parts]:
        """What an expression can be: one entry per alternative."""
        if expr is None or expr in self.path:
            return [HOLE]
        if expr not in self.known:
            self.path.append(expr)
            found = self._read(expr, around)
            self.path.pop()
            self.known[expr] = [p for p in dict.fromkeys(found) if len(p) <= LONGEST][:MOST]
        return self.known[expr]

    def _read(self, expr: ast.expr, around: Function | None) -> list[Parts]:
        match expr:
            case ast.Constant(value=str(text)):
                return [(text,)]
            case ast.JoinedStr(values=values):
                return [tuple(p for v in values for p in self._piece(v, around))]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [
                    (*a, *b)
                    for a, b in itertools.product(self.read(left, around), self.read(right, around))
                ]
            case ast.IfExp(body=body, orelse=orelse):
                return self.read(body, around) + self.read(orelse, around)
            case ast.BoolOp(values=values):
                return [a for v in values for a in self.read(v, around)]
            case ast.Name(id=name):
                return self._name(name, around)
            case ast.Call():
                return self._call(expr, around)
            case ast.Attribute(attr=attr):
                return self._attribute(attr)
            case ast.GeneratorExp(elt=elt) | ast.ListComp(elt=elt):
                return self.read(elt, around)
            case ast.Subscript(value=value) | ast.Starred(value=value):
                return self.read(value, around)
            case ast.Dict(values=values):
                return [a for v in values for a in self.read(v, around)]
            case ast.Tuple(elts=elts) | ast.List(elts=elts):
                return [a for v in elts for a in self.read(v, around)]
            case _:
                return [HOLE]

    def _piece(self, value: ast.expr, around: Function | None) -> Parts:
        """A piece of an f-string: its text, or a hole whose words are sentences of their own."""
        if isinstance(value, ast.Constant):
            return (str(value.value),)
        assert isinstance(value, ast.FormattedValue)
        if value.format_spec is None:
            self.inner |= set(self.read(value.value, around))
        return HOLE

    def _name(self, name: str, around: Function | None) -> list[Parts]:
        if around is not None:
            if local := list(assigned(name, around)):
                return self._assigned(local, around)
            every = [*around.args.posonlyargs, *around.args.args, *around.args.kwonlyargs]
            for i, argument in enumerate(every):
                if argument.arg == name:
                    return self._argument(around, i, name)
        known = self.sources.constants.get(name.removeprefix("_"), []) + self.sources.constants.get(
            name, []
        )
        return [a for expr in known for a in self.read(expr, None)] or [HOLE]

    def _assigned(self, local: list[tuple[ast.expr, bool]], around: Function) -> list[Parts]:
        """What is added to a text is a sentence of its own, or words in one."""
        self.inner |= {a for expr, added in local if added for a in self.read(expr, around)}
        return [a for expr, added in local if not added for a in self.read(expr, around)]

    def _attribute(self, attr: str) -> list[Parts]:
        """A property, or what constructors and ``model_copy`` are given under this name."""
        properties = [
            function
            for function in self.sources.functions.get(attr, [])
            if any(ast.unparse(d).endswith("property") for d in function.decorator_list)
        ]
        if properties:
            return [a for function in properties for a in self._returned(function)] or [HOLE]
        if attr not in SPOKEN:
            return [HOLE]
        given = self.sources.given.get(attr, [])
        return [a for expr, around in given for a in self.read(expr, around)] or [HOLE]

    def _returned(self, function: Function) -> list[Parts]:
        if "str" not in ast.unparse(function.returns or ast.Constant("")):
            return []
        return [
            alternative
            for node, owner in within(function)
            if isinstance(node, ast.Return) and owner is None
            for alternative in self.read(node.value, function)
        ]

    def _argument(self, function: Function, place: int, name: str) -> list[Parts]:
        if len(self.sources.functions.get(function.name, [])) > 3:
            return [HOLE]
        first = function.args.args[0].arg if function.args.args else ""
        offset = 1 if first in ("self", "cls") else 0
        found: list[Parts] = []
        for call, caller in self.sources.calls.get(function.name, []):
            given = next((k.value for k in call.keywords if k.arg == name), None)
            if given is None and place - offset < len(call.args):
                given = call.args[place - offset]
            found += self.read(given, caller) if given is not None else []
        return found or [HOLE]

    def _call(self, call: ast.Call, around: Function | None) -> list[Parts]:
        name = called(call)
        if name == "join" and isinstance(call.func, ast.Attribute):
            self.inner |= set(self.read(call.args[0], around))
            return [HOLE]
        if name == "counted":
            nouns = self.read(call.args[1], around)
            return [(None, " ", *noun, end) for noun in nouns for end in ("", "s")]
        if name == "listed":
            self.inner |= set(self.read(call.args[0], around))
        defined = self.sources.functions.get(name, [])
        if not 1 <= len(defined) <= 2 or name in ("get", "item"):
            return [HOLE]
        return [a for function in defined for a in self._returned(function)] or [HOLE]


def assigned(name: str, function: Function) -> Iterator[tuple[ast.expr, bool]]:
    """What a local name can be, and whether that is added to what it was."""
    for node, _ in within(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == name:
                    yield node.value, False
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for one, value in zip(target.elts, node.value.elts, strict=True):
                        if isinstance(one, ast.Name) and one.id == name:
                            yield value, False
        elif isinstance(node, ast.For | ast.comprehension):
            if any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node.target)):
                yield from ((expr, False) for expr in iterated(node.iter))
        elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.NamedExpr):
            target = node.target
            if isinstance(target, ast.Name) and target.id == name and node.value is not None:
                yield node.value, isinstance(node, ast.AugAssign)


def iterated(expr: ast.expr) -> list[ast.expr]:
    """What a loop goes over, where its values are written out."""
    if isinstance(expr, ast.Call) and called(expr) in ("zip", "enumerate"):
        return expr.args
    if isinstance(expr, ast.Call) and called(expr) in ("items", "values"):
        return [expr.func.value] if isinstance(expr.func, ast.Attribute) else []
    return [expr]


def roots(sources: Sources) -> Iterator[tuple[ast.expr, Function | None]]:
    """The expressions that become a check's detail, a diagnosis, a notice, a line of an answer."""
    for module in sources.modules:
        for node, around in within(module):
            if isinstance(node, ast.Call):
                spoken = [v for name, v in given_to(node, sources) if name in SPOKEN]
                noted = spoken if called(node) in NOTED else []
                yield from ((expr, around) for expr in (*told_by(node), *noted))
            elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.Assign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if node.value is not None and is_told(target):
                    yield node.value, around
            elif isinstance(node, ast.Return) and node.value is not None and is_teller(around):
                yield node.value, around


def is_teller(function: Function | None) -> bool:
    """Whether what it returns is told."""
    return function is not None and ("notice" in function.name or function.name == "trust")


def is_told(target: ast.expr) -> bool:
    """Whether what is assigned here is told in an answer, or as a notice."""
    name = ast.unparse(target)
    return name.endswith((".what", ".problem", ".unseen", "notices"))


def told_by(call: ast.Call) -> Iterator[ast.expr]:
    """Of a call, the sentences in it."""
    name = called(call)
    keyword = {k.arg: k.value for k in call.keywords}
    if name in ("judge", "Check") and "detail" in keyword:
        yield keyword["detail"]
    elif name == "UntraceableError":
        yield call.args[0]
    elif name == "skipped" and len(call.args) > 1:
        yield call.args[1]
    elif name == "Diagnosis":
        yield keyword["text"]
    elif name == "Judged":
        yield from [
            *call.args[:1],
            *[keyword[k] for k in ("what", "problem", "unseen") if k in keyword],
        ]
    elif (
        name == "add"
        and isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "judged"
    ):
        yield from call.args[1:2]
    elif name == "append" and ast.unparse(call.func).endswith(
        (".unseen.append", ".proofs.append", "notices.append", "told.append")
    ):
        yield call.args[0]
    if "notices" in keyword:
        yield keyword["notices"]


WORDS = re.compile(r"[A-Za-z]{2,}")
IDENTIFIER = re.compile(
    r"[^ ]*[_*|$^\\][^ ]*|--[a-z-]+|[\w-]+\.[\w.]+|[\w-]+:[\w-]+"
    r"|[A-Za-z]+\d+|NLL|KL|so8tqc|ls( -l)?"
)
"""Not words: names of keys, options, patterns, commands."""


def units(parts: Parts) -> Iterator[str]:
    """The sentences of a text, each with its holes numbered; neighbouring holes are one."""
    text = re.sub("\0+", "\0", "".join("\0" if p is None else str(p) for p in parts))
    for unit in BOUNDARY.split(text):
        bare = re.sub(r"^\0(?=[A-Za-z])|(?<=[.])\0$", "", unit.strip(TRIMMED)).strip(TRIMMED + ":")
        if WORDS.search(bare) and not IDENTIFIER.fullmatch(bare.replace("\0", "")):
            for number in range(bare.count("\0")):
                bare = bare.replace("\0", f"{{{number}}}", 1)
            yield bare


def sentences(texts: Mapping[str, str]) -> set[str]:
    """Every sentence of these modules, and every group of words that can stand in one."""
    sources = parsed(texts)
    reader = Reader(sources)
    found: set[Parts] = set()
    for table in TABLES:
        for constant in sources.constants.get(table, []):
            found |= set(reader.read(constant, None))
    for expr, around in roots(sources):
        found |= set(reader.read(expr, around))
    return {unit for parts in found | reader.inner for unit in units(parts)}
