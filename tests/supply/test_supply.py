"""What is installed: under licences that go together, and locked by digest for CI."""

from __future__ import annotations

import os
import re

import pytest
from distributions import LOCK, PAGE, ROOT, canonical, licence, locked, needed, not_allowed


@pytest.fixture(scope="module")
def lock() -> dict[str, tuple[str, list[str]]]:
    return {name: (version, digests) for name, version, digests in locked()}


def test_every_licence_is_known_and_listed() -> None:
    listed = dict(re.findall(r"^\| ([\w.-]+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.M))
    found = {name: licence(dist) for name, dist in needed().items()}
    assert {n: x for n, x in found.items() if not_allowed(x)} == {}
    assert {n: x for n, x in found.items() if listed.get(n) != x} == {}


def test_a_licence_that_does_not_go_with_ours_is_found() -> None:
    assert not_allowed("GPL-3.0-only") == {"GPL-3.0-only"}
    assert not_allowed("MIT AND GPL-3.0-only") == {"GPL-3.0-only"}
    assert not_allowed("MIT OR GPL-3.0-only") == set()


def test_the_lock_holds_all_that_is_needed_by_digest(
    lock: dict[str, tuple[str, list[str]]],
) -> None:
    assert [name for name in needed() if name not in lock and name not in _BASE] == []
    assert [name for name, (_, digests) in lock.items() if not digests] == []


_BASE = {"pip", "setuptools"}
"""Of every virtual environment."""


def test_the_lock_and_the_constraints_pin_the_same(lock: dict[str, tuple[str, list[str]]]) -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = {canonical(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)$", text, re.M)}
    both = pins.keys() & lock.keys()
    assert len(both) > 20
    assert {n for n in both if lock[n][0].split("+")[0] != pins[n]} == set()


@pytest.mark.skipif("NOX_LOCKED" not in os.environ, reason="not installed from the lock")
def test_what_is_installed_is_what_is_locked(lock: dict[str, tuple[str, list[str]]]) -> None:
    found = {n: d.version for n, d in needed().items() if n not in _BASE}
    assert found == {n: lock[n][0] for n in found}


def test_the_lock_is_a_file_of_this_project() -> None:
    text = LOCK.read_text(encoding="utf-8")
    assert "://" not in text
    assert "file:" not in text
