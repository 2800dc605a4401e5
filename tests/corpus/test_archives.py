"""Package files are read in memory, and what does not look like a package is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from so8tqc.corpus import archives
from so8tqc.corpus.archives import members
from so8tqc.errors import DataError
from tiny_packages import debian, tarball, wheel

FILES = {"a/one.txt": b"one", "a/two.md": b"two", "b/three.txt": b"three"}


@pytest.mark.parametrize("pack", [wheel, tarball, debian])
def test_matching_members_of_every_kind_of_package(pack: Callable[..., bytes]) -> None:
    found = list(members(pack(FILES), ("a/*.txt", "b/*"), "x"))
    assert found == [("a/one.txt", b"one"), ("b/three.txt", b"three")]


def test_members_of_a_zip_inside_a_package() -> None:
    package = debian({"lib/help.jar": wheel(FILES)})
    assert list(members(package, ("lib/*.jar!/a/*.md",), "x")) == [
        ("lib/help.jar!/a/two.md", b"two")
    ]


@pytest.mark.parametrize("name", ["../out.txt", "/etc/out.txt", "a/../../out.txt", "a\\..\\b.txt"])
@pytest.mark.parametrize("pack", [wheel, tarball])
def test_a_path_that_leads_out_is_refused(pack: Callable[..., bytes], name: str) -> None:
    with pytest.raises(DataError, match="leads out of the archive"):
        list(members(pack({"a/one.txt": b"one", name: b"x"}), ("a/*",), "x"))


def test_a_link_is_no_member() -> None:
    assert list(members(tarball(FILES, link="a/link.txt"), ("a/*.txt",), "x")) == [
        ("a/one.txt", b"one")
    ]


@pytest.mark.parametrize("pack", [wheel, tarball, debian])
def test_what_unpacks_to_too_much_is_refused(
    pack: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pack({"a.txt": b"0" * 5000, "b.txt": b"0" * 5000})
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 4999)
    with pytest.raises(DataError, match="more than is allowed"):
        list(members(package, ("*",), "x"))
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 5000)
    monkeypatch.setattr(archives, "MAX_TOTAL_BYTES", 9999)
    with pytest.raises(DataError, match="more than is allowed"):
        list(members(package, ("*",), "x"))
    monkeypatch.setattr(archives, "MAX_TOTAL_BYTES", 10000)
    assert len(list(members(package, ("*",), "x"))) == 2


def test_a_zip_cannot_lie_about_a_members_size() -> None:
    """Both headers say 10 bytes; the data is a million."""
    package = wheel({"a.txt": b"0" * 1_000_000})
    true = struct.pack("<I", 1_000_000)
    assert package.count(true) == 2
    with pytest.raises(DataError, match="not a readable archive"):
        list(members(package.replace(true, struct.pack("<I", 10)), ("*",), "x"))


def test_a_large_package_is_refused_before_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_PACKAGE_BYTES", 10)
    with pytest.raises(DataError, match="larger than 10 bytes"):
        list(members(b"0" * 11, ("*",), "x"))


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04nonsense", b"!<arch>\nnonsense", b"nonsense", b"\x1f\x8bnonsense"]
)
def test_nonsense_is_a_data_error(content: bytes) -> None:
    with pytest.raises(DataError):
        list(members(content, ("*",), "x"))


@pytest.mark.parametrize("pack", [wheel, tarball, debian])
def test_a_truncated_package_is_a_data_error(pack: Callable[..., bytes]) -> None:
    package = pack({f"{i}.txt": bytes(range(256)) * i for i in range(1, 20)})
    with pytest.raises(DataError):
        list(members(package[: len(package) // 2], ("*",), "x"))


@pytest.mark.parametrize(
    ("name", "true", "false"),
    [
        ("a.txt", b"\0\0\x08\0", b"\x01\0\x08\0"),  # in both headers: flags, method
        ("a.txt", b"\0\0\x08\0", b"\0\0\x63\0"),
        ("日.txt", "日".encode(), b"\xff\xff\xff"),
    ],
    ids=["encrypted", "unknown method", "name not UTF-8"],
)
def test_a_zip_that_cannot_be_read_is_a_data_error(name: str, true: bytes, false: bytes) -> None:
    package = wheel({name: b"one"})
    assert true in package
    with pytest.raises(DataError, match="not a readable archive"):
        list(members(package.replace(true, false), ("*",), "x"))
