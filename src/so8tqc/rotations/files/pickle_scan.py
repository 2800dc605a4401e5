"""What loading a pickle would cost, from its opcodes; nothing is loaded.

torch's reader (``weights_only=True``) runs no code, but it builds what the pickle says: a
``bytearray`` of any length, or sixty tuples, each of the one before twice, whose hash as the key of
a dict takes 2^60 steps. No checkpoint of gates has either.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from typing import IO, Any, cast

_MAX_OPCODES = 2_000_000
_MAX_WALK = 10_000_000
"""Objects met when every reference is followed, those met twice counted twice."""

_LEGACY_PICKLES = 4
"""torch's old format: a magic number, a version, facts of the machine, and then the objects."""

_MAX_TEXT_BYTES = 64 << 20

_FORBIDDEN = ("bytearray", "_codecs")


class CostlyPickleError(ValueError):
    """Loading this pickle would cost more than a checkpoint of gates does."""


def scan_pickle(stream: IO[bytes], pickles: int = 1) -> None:
    """Read the opcodes of so many pickles.

    Raises:
        CostlyPickleError: they would allocate at will, or hold more references than can be walked.
        ValueError: this is no pickle.
    """
    opcodes = 0
    for _ in range(pickles):
        stack = _Stack()
        for opcode, argument in _opcodes(stream):
            opcodes += 1
            if opcodes > _MAX_OPCODES:
                raise CostlyPickleError(f"more than {_MAX_OPCODES:,} opcodes")
            stack.follow(opcode, argument)


def scan_legacy(stream: IO[bytes]) -> None:
    """As :func:`scan_pickle`, of a file in torch's old format."""
    scan_pickle(stream, _LEGACY_PICKLES)


class _Within:
    """A stream of which never more is asked at once than a text may have: Python makes room first
    and reads then."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.readline = stream.readline

    def read(self, count: int) -> bytes:
        return self._stream.read(min(count, _MAX_TEXT_BYTES))


def _opcodes(stream: IO[bytes]) -> Iterator[tuple[Any, Any]]:
    for opcode, argument, _ in pickletools.genops(cast(IO[bytes], _Within(stream))):
        yield opcode, argument


class _Stack:
    """How many objects a walk of each item would meet. Containers that grow later count as begun:
    what matters is tuples, which are hashed, and cannot grow."""

    def __init__(self) -> None:
        self._items: list[int | None] = []  # None is a mark
        self._memo: dict[int, int] = {}

    def follow(self, opcode: Any, argument: Any) -> None:
        """Do to the stack what an opcode does."""
        name = opcode.name
        if isinstance(argument, str) and any(word in argument for word in _FORBIDDEN):
            raise CostlyPickleError(f"it asks for {argument.split()[-1][:40]}")
        if name == "MARK":
            self._items.append(None)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            where = len(self._memo) if argument is None else int(argument)
            self._memo[where] = (self._items[-1] if self._items else None) or 1
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._items.append(self._memo.get(int(argument), 1))
        else:
            self._replace(opcode)

    def _replace(self, opcode: Any) -> None:
        weight = 1
        for kind in reversed(opcode.stack_before):
            if kind is pickletools.stackslice:
                while self._items and (top := self._items.pop()) is not None:
                    weight += top
            elif kind is not pickletools.markobject and self._items:
                weight += self._items.pop() or 0
        if weight > _MAX_WALK:
            raise CostlyPickleError(
                f"its objects refer to each other more than {_MAX_WALK:,} times"
            )
        self._items += [weight] * len(opcode.stack_after)
