"""The distributions that so8tqc[demo,test] needs, as they are installed here.

``python tests/supply/distributions.py`` writes docs/licences.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "licences.md"
LOCK = ROOT / "requirements.lock"

SPDX = {
    "MIT": "MIT",
    "MIT License": "MIT",
    "The MIT License (MIT)": "MIT",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "ISC License": "ISC",
    "Public Domain": "Public-Domain",
}
"""What distributions call their licence → its SPDX name."""

ALLOWED = frozenset(
    {
        "MIT",
        "MIT-CMU",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "0BSD",
        "ISC",
        "MPL-2.0",
        "PSF-2.0",
        "Zlib",
        "BSL-1.0",
        "CC0-1.0",
        "CNRI-Python",
        "Public-Domain",
    }
)
"""Licences that go with Apache-2.0. MPL-2.0 binds its own files alone; nothing of it is copied."""

_PAGE = """# Licences

What so8tqc needs, with the extras `demo` and `test`, and under which licence. Nothing of it is part
of so8tqc, which is Apache-2.0. A test compares the list with what is installed.

| package | licence |
|---|---|
{rows}
"""


def needed(
    name: str = "so8tqc", extras: Sequence[str] = ("demo", "test")
) -> dict[str, Distribution]:
    """Name → distribution, of all that is installed because ``name`` needs it."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, tuple[str, ...]]] = set()

    def walk(wanted: str, its_extras: Sequence[str]) -> None:
        key = (canonical(wanted), tuple(sorted(its_extras)))
        if key in seen:
            return
        seen.add(key)
        try:
            found[key[0]] = distribution(wanted)
        except PackageNotFoundError:  # of another platform, or of an extra of another extra
            return
        for requirement in map(Requirement, found[key[0]].requires or ()):
            if _applies(requirement, its_extras):
                walk(requirement.name, sorted(requirement.extras))

    walk(name, extras)
    return {name: found[name] for name in sorted(found) if name != "so8tqc"}


def _applies(requirement: Requirement, extras: Sequence[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": e}) for e in (*extras, ""))


def canonical(name: str) -> str:
    """PEP 503's normal form of a name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(dist: Distribution) -> str:
    """SPDX expression of a distribution's licence, from its metadata."""
    metadata = dist.metadata
    classifiers = [
        text.split("::")[-1].strip()
        for text in metadata.get_all("Classifier") or ()
        if text.startswith("License ::")
    ]
    for text in (metadata.get("License-Expression"), metadata.get("License"), *classifiers):
        first = (text or "").strip().split("\n")[0]
        name = SPDX.get(first, first)
        if name and not not_allowed(name):
            return name
    return metadata.get("License-Expression") or metadata.get("License") or "unknown"


def not_allowed(expression: str) -> set[str]:
    """Licences of an SPDX expression that are not allowed; {} if one of its alternatives is.

    An exception (WITH) only permits more, so it is left out. Parentheses are not met, and not read.
    """
    plain = re.sub(r"\s+WITH\s+[\w.-]+", "", expression)
    alternatives = [set(re.split(r"\s+AND\s+", part)) - ALLOWED for part in plain.split(" OR ")]
    return min(alternatives, key=len)


def locked() -> Iterator[tuple[str, str, list[str]]]:
    """Name, version and SHA-256 digests of every line of requirements.lock."""
    text = LOCK.read_text(encoding="utf-8").replace("\\\n", " ")
    for match in re.finditer(r"^([A-Za-z0-9._-]+)==(\S+)(.*)$", text, re.MULTILINE):
        yield canonical(match[1]), match[2], re.findall(r"--hash=sha256:([0-9a-f]{64})", match[3])


def page() -> str:
    """docs/licences.md."""
    rows = (f"| {name} | {licence(dist)} |" for name, dist in needed().items())
    return _PAGE.format(rows="\n".join(rows))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
