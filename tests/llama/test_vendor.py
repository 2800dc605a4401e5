"""Fetching the converter: checked before it is unpacked, and never half-installed."""

from __future__ import annotations

import contextlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from so8tqc.disk.digests import sha256_file
from so8tqc.errors import MissingToolError, ToolError
from so8tqc.llama import vendor
from so8tqc.llama.pin import Pin

ROOT = "llama_cpp_python-1/vendor/llama.cpp"
WANTED = {
    f"{ROOT}/convert_hf_to_gguf.py": b"new script",
    f"{ROOT}/conversion/base.py": b"new base",
    f"{ROOT}/gguf-py/gguf/a.py": b"new gguf",
    f"{ROOT}/LICENSE": b"MIT",
}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vendor directory with its tracked files, in place of the real one."""
    path = tmp_path / "vendor"
    path.mkdir()
    (path / "README.md").write_text("ours")
    (path / "pin.json").write_text("{}")
    monkeypatch.setattr(vendor, "vendor_directory", lambda: path)
    return path


def package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], link: str = ""
) -> Pin:
    """A source package that pip is made to have fetched; its pin."""
    path = tmp_path / "package.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(f"{ROOT}/conversion/link.py")
            info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info)
    monkeypatch.setattr(vendor, "_download", lambda _pin, _scratch: path)
    return Pin(name="llama-cpp-python", version="1", sha256=sha256_file(path))


def names(path: Path) -> set[str]:
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}


def test_only_the_converter_is_unpacked_and_what_is_tracked_stays(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {f"{ROOT}/src/llama.cpp": b"c++", "llama_cpp_python-1/README.md": b"theirs"}
    pin = package(tmp_path, monkeypatch, WANTED | more, link="/etc/passwd")
    converter = vendor.fetch_converter(pin=pin)
    assert names(directory) == {
        "README.md",
        "pin.json",
        "SOURCE",
        "LICENSE",
        "convert_hf_to_gguf.py",
        "conversion/base.py",
        "gguf-py/gguf/a.py",
    }
    assert (directory / "README.md").read_text() == "ours"
    assert converter.revision == f"llama-cpp-python 1 sha256:{pin.sha256}"
    assert converter.python_path == directory / "gguf-py"
    assert vendor.is_vendored(pin)


def test_another_package_than_the_pinned_one_is_not_unpacked(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = replace(package(tmp_path, monkeypatch, WANTED), sha256="0" * 64)
    with pytest.raises(ToolError, match=r"pinned is 0000.*nothing was unpacked"):
        vendor.fetch_converter(pin=pin)
    assert names(directory) == {"README.md", "pin.json"}


@pytest.mark.parametrize(
    "escape", [f"{ROOT}/conversion/../../../../out.py", f"{ROOT}/../../out.py"]
)
def test_nothing_is_written_outside(
    escape: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = package(tmp_path, monkeypatch, WANTED | {escape: b"evil"})
    with contextlib.suppress(ToolError, tarfile.TarError):
        vendor.fetch_converter(pin=pin)
    assert not list(tmp_path.parent.rglob("out.py"))


def test_an_update_that_is_killed_leaves_no_mixture(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vendor.fetch_converter(pin=package(tmp_path, monkeypatch, WANTED))
    newer = {name: content + b" 2" for name, content in WANTED.items()}
    pin = package(tmp_path, monkeypatch, newer)
    real = vendor.shutil.copytree

    def killed(source: Path, *arguments: object, **options: object) -> None:
        if Path(source).name == "gguf-py":
            raise KeyboardInterrupt
        real(source, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(vendor.shutil, "copytree", killed)
    with pytest.raises(KeyboardInterrupt):
        vendor.fetch_converter(pin=pin)
    assert not vendor.is_vendored(pin)
    with pytest.raises(MissingToolError, match="so8tqc vendor"):
        vendor.find_converter()
