"""Tiny package files: a wheel, an npm tarball, a Debian package."""

from __future__ import annotations

import io
import tarfile
import zipfile


def wheel(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def tarball(files: dict[str, bytes], mode: str = "w:gz", link: str = "") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    return stream.getvalue()


def debian(files: dict[str, bytes]) -> bytes:
    """An ``ar`` archive as dpkg writes it, with odd-sized members to need padding."""
    data = tarball({f"./{name}": content for name, content in files.items()}, "w:xz")
    out = b"!<arch>\n"
    for name, content in (
        (b"debian-binary", b"2.0\n"),
        (b"control.tar.xz", b"odd"),
        (b"data.tar.xz", data),
    ):
        out += name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) + b"0".ljust(6)
        out += b"100644".ljust(8) + str(len(content)).encode().ljust(10) + b"`\n"
        out += content + b"\n" * (len(content) % 2)
    return out
