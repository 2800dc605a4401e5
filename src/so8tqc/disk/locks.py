"""One writer at a time: an output belongs to the process that claimed it, until that ends.

The locks are the kernel's (flock): a process that ends in any way has none left, so a crashed run
blocks nobody. What is locked is a small file that holds the process's number, for those who are
refused; it is deleted with the claim. After a crash it stays, and means nothing.

filelock, which says the same on more systems, empties such a file before it knows whether it may,
and locks files of its own making only; temporaries (``disk.atomic``) are their own locks. On a
system without flock (Windows) nothing is locked.
"""

from __future__ import annotations

import functools
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from so8tqc.disk.system import disk_errors, make_folder
from so8tqc.errors import BusyError

LOCK_NAME = ".so8tqc.lock"
_SIGNATURE_BYTES = 300

_held: dict[Path, int] = {}
"""Lock file → the thread of this process that holds it, and may claim it again."""


def claim_folder(folder: Path, *, wait: bool = False) -> AbstractContextManager[None]:
    """Have a directory to write in to oneself. It is made, and deleted if it stays empty.

    Args:
        folder: the directory.
        wait: for whoever has it, instead of an error.

    Raises:
        BusyError: another process, or another thread, has it.
        ToolError: the disk refuses.
    """
    return _claim(folder, LOCK_NAME, folder, wait)


def claim_output(path: Path, *, wait: bool = False) -> AbstractContextManager[None]:
    """As :func:`claim_folder`, for one file, or for a directory that is replaced as a whole."""
    return _claim(path.parent, f".{path.name}{LOCK_NAME}", path, wait)


@contextmanager
def _claim(folder: Path, name: str, claimed: Path, wait: bool) -> Iterator[None]:
    lock = folder.resolve() / name
    if _held.get(lock) == threading.get_ident():
        yield
        return
    with disk_errors(claimed):
        made = make_folder(folder)
        try:
            descriptor = hold(lock, wait=wait)
            if descriptor is None:
                raise BusyError(
                    f"{_holder(lock)} is writing here",
                    where=str(claimed),
                    remedy="Wait until it has ended, or give another --out.",
                )
            try:
                _held[lock] = threading.get_ident()
                _sign(descriptor)
                yield
            finally:
                del _held[lock]
                with suppress(OSError):
                    lock.unlink()
                os.close(descriptor)
        finally:
            with suppress(OSError):  # not empty
                for directory in made:
                    directory.rmdir()


def hold(file: Path, *, wait: bool = False, create: bool = True) -> int | None:
    """Lock a file until the descriptor is closed, or the process ends.

    Whoever deletes a locked file does so while holding it, so a file that is no longer there
    after the lock was granted was another's: then all begins anew.

    Args:
        file: the file.
        wait: for whoever holds it.
        create: make the file if it is not there.

    Returns:
        The descriptor; None if another holds the file.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        try:
            if not lock_descriptor(descriptor, wait=wait):
                os.close(descriptor)
                return None
            if is_at(descriptor, file):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def lock_descriptor(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file; whether that was granted."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that a path names now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    with suppress(OSError):  # on a full disk: the lock holds without it
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {platform.node()}".encode()[:_SIGNATURE_BYTES])


def _holder(lock: Path) -> str:
    """``process 4711``, and its machine if that is another one."""
    text = ""
    with suppress(OSError):
        text = lock.read_bytes()[:_SIGNATURE_BYTES].decode(errors="replace")
    number, _, machine = text.partition(" ")
    if not number:
        return "another process"
    return f"process {number}" + ("" if machine == platform.node() else f" on {machine}")


class _HasOut(Protocol):
    @property
    def out(self) -> Path: ...


_Config = TypeVar("_Config", bound=_HasOut)
_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")
_Service = Callable[Concatenate[_Config, _Rest], _Result]


def exclusive(
    claim: Callable[[Path], AbstractContextManager[None]],
) -> Callable[[_Service[_Config, _Rest, _Result]], _Service[_Config, _Rest, _Result]]:
    """A service that claims its config's ``out`` for as long as it works.

    Args:
        claim: :func:`claim_folder` or :func:`claim_output`.
    """

    def decorate(
        service: _Service[_Config, _Rest, _Result],
    ) -> _Service[_Config, _Rest, _Result]:
        @functools.wraps(service)
        def alone(config: _Config, /, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Result:
            with claim(config.out):
                return service(config, *args, **kwargs)

        return alone

    return decorate
