"""Hidden states between two layers: in memory, or in a file; and how far a pass has come.

After every layer all texts' states are written to one file, and a journal says which layer it
belongs to, by the file's SHA-256. A killed pass goes on there, if weights, texts and lanes are the
same. Beyond a budget a state's memory is given back meanwhile.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from so8tqc.disk.atomic import require_space, write_text
from so8tqc.disk.digests import sha256_file
from so8tqc.disk.system import disk_errors, make_folder

if TYPE_CHECKING:
    import torch

_JOURNAL = "journal.json"
_FILES = 2
"""Files of states at a time: those of the layer before are read while the next are written."""


class Journal(NamedTuple):
    """How far a pass has come.

    Attributes:
        layer: the one that all texts wait at.
        given: of each text, the digest of what the layer is given besides.
        structures: layer → what it returns (``doors.Structure``).
    """

    layer: int
    given: Sequence[str]
    structures: Mapping[int, int | None]


class _Place(NamedTuple):
    start: int
    shape: tuple[int, ...]
    dtype: str


class States:
    """The states of a pass.

    Args:
        folder: where they are kept; made if missing.
        identity: of the pass: weights, texts, lanes.
        budget: bytes of states that may stay in memory.
    """

    def __init__(self, folder: Path, identity: str, budget: int) -> None:
        self._folder = folder
        self._identity = identity
        self._budget = budget
        self._places: list[_Place] = []
        self._file: Path | None = None
        self._released: dict[int, _Place] = {}

    def require_room(self, size: int) -> None:
        """See that the disk has room for the states of all texts.

        Raises:
            ToolError: it has not.
        """
        require_space(self._folder, _FILES * size, "the hidden states between two layers need {}")

    def resume(self) -> tuple[Journal, list[torch.Tensor]] | None:
        """Where an earlier pass stopped, and its states; None where there is none to go on with."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads((self._folder / _JOURNAL).read_text(encoding="utf-8"))
            path = self._folder / Path(str(content["file"])).name
            if content["identity"] != self._identity or sha256_file(path) != content["sha256"]:
                self.remove()
                return None
            self._places = [_Place(a, tuple(b), c) for a, b, c in content["places"]]
            self._file = path
            structures = {int(k): v for k, v in content["structures"].items()}
            journal = Journal(int(content["layer"]), content["given"], structures)
            return journal, [self._read(place) for place in self._places]
        return None

    def keep(self, layer: int, states: Sequence[Any], journal: Journal | None) -> None:
        """Write the states that all texts wait with at a layer; release what is beyond the budget.

        Args:
            layer: that layer.
            states: of each text.
            journal: None: the pass cannot be gone on with from here.

        Raises:
            ToolError: the disk refuses.
        """
        self._released.clear()
        kept = sum(state.numel() * state.element_size() for state in states)
        if journal is None and kept <= self._budget:
            return
        before = self._file
        path = self._folder / f"layer-{layer:04d}.states"
        with disk_errors(path):
            make_folder(self._folder)
            with path.open("wb") as stream:
                digest = self._write(stream, states)
            self._file = path
            if journal is not None:
                self._note(journal, path, digest)
            if before is not None and before != path:
                before.unlink(missing_ok=True)
        self._release(states)

    def restore(self, number: int, state: Any) -> None:
        """Bring a text's state back into its memory, if it was released."""
        place = self._released.pop(number, None)
        if place is None:
            return
        value = self._read(place)
        state.untyped_storage().resize_(value.untyped_storage().nbytes())
        state.copy_(value)

    def remove(self) -> None:
        """Delete all files; the pass is over."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):  # others may have theirs beside it
            for parent in (self._folder.parent, self._folder.parent.parent):
                parent.rmdir()

    def _write(self, stream: BinaryIO, states: Sequence[Any]) -> str:
        hashed, start, places = hashlib.sha256(), 0, []
        for state in states:
            whole = state.contiguous()
            raw = _bytes_of(whole)
            stream.write(raw)
            hashed.update(raw)
            kind = str(state.dtype).removeprefix("torch.")
            places.append(_Place(start, tuple(state.shape), kind))
            start += len(raw)
        self._places = places
        return hashed.hexdigest()

    def _note(self, journal: Journal, path: Path, digest: str) -> None:
        content = {
            "identity": self._identity,
            "layer": journal.layer,
            "file": path.name,
            "sha256": digest,
            "places": self._places,
            "given": list(journal.given),
            "structures": dict(journal.structures),
        }
        write_text(self._folder / _JOURNAL, json.dumps(content))

    def _release(self, states: Sequence[Any]) -> None:
        kept = 0
        for number, (state, place) in enumerate(zip(states, self._places, strict=True)):
            size = state.numel() * state.element_size()
            kept += size
            whole = state.is_contiguous() and state.untyped_storage().nbytes() == size
            if kept > self._budget and whole:
                state.untyped_storage().resize_(0)
                self._released[number] = place

    def _read(self, place: _Place) -> torch.Tensor:
        import torch

        assert self._file is not None
        dtype = getattr(torch, place.dtype)
        value = torch.empty(place.shape, dtype=dtype)
        raw = value.reshape(-1).view(torch.uint8).numpy().data
        with self._file.open("rb", buffering=0) as stream:
            stream.seek(place.start)
            done = 0
            while done < len(raw):
                done += stream.readinto(raw[done:]) or _ended(self._file)
        return value


def _bytes_of(tensor: Any) -> memoryview:
    """A contiguous tensor's memory; numpy would keep its storage from being released."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def _ended(path: Path) -> int:
    raise OSError(f"{path} ended early")
