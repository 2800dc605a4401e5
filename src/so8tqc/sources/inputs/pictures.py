"""Pictures in the data: opened as data, within limits, and rendered by the model's own processor.

Nothing is fetched: a picture is a plain file on this machine, or one of the built-in set, which is
drawn when it is asked for.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from so8tqc.disk.foreign import read_whole
from so8tqc.errors import DataError, MissingToolError, ModelError
from so8tqc.sources.inputs.drawn import PREFIX as DRAWN
from so8tqc.sources.inputs.drawn import draw
from so8tqc.sources.inputs.texts import Text
from so8tqc.sources.protocol import EncodedText
from so8tqc.sources.quiet import quiet_transformers
from so8tqc.sources.seen import Images, beginning, with_images

if TYPE_CHECKING:
    from PIL.Image import Image

MARKER = "<image>"
"""Where a picture stands in a text."""

MAX_PIXELS = 64_000_000
"""Of one picture: as many as the largest cameras' have. Decoded it takes 192 MB."""

MAX_BYTES = 128 << 20
"""Of one picture's file."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_INSTALL = "Run: pip install 'so8tqc[vision]'"
_SHOWN = 300  # characters of another library's message


def open_picture(spec: str, where: str) -> Image:
    """A picture in RGB.

    Args:
        spec: a file, or a name of the built-in set.
        where: the row that names it, for messages.

    Raises:
        DataError: no plain file, larger than allowed, empty, or no picture.
        MissingToolError: Pillow is not installed.
    """
    if spec.startswith(DRAWN):
        return draw(spec.removeprefix(DRAWN))
    library = _pillow()
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", spec) or spec.startswith("data:"):
        raise DataError(
            f"{spec[:80]} is no file of this machine, and nothing is fetched",
            where=where,
            remedy="Fetch the picture first, and name the file.",
        )
    try:
        content = read_whole(Path(spec), DataError, MAX_BYTES)
    except DataError as error:
        raise DataError(f"the picture {spec}: {error.what}", where=where) from None
    with _as_data_error(spec, where), library.open(io.BytesIO(content), formats=_FORMATS) as found:
        width, height = found.size  # known before anything is decoded
        if not 0 < width * height <= MAX_PIXELS:
            raise DataError(
                f"the picture {spec} has {width} × {height} pixels; from 1 to "
                f"{MAX_PIXELS:,} are taken",
                where=where,
                remedy="Make it smaller first.",
            )
        picture: Image = found.convert("RGB")
        return picture
    raise AssertionError("either it is returned, or something is raised")


@contextmanager
def _as_data_error(spec: str, where: str) -> Iterator[None]:
    """Any failure inside is that of a file that is no picture: each decoder has its own."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001
        reason = str(error).strip().splitlines()
        told = reason[0][:_SHOWN] if reason else type(error).__name__
        raise DataError(f"the picture {spec} cannot be read: {told}", where=where) from None


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingToolError(
            "pictures are read with Pillow, which is not installed", remedy=_INSTALL
        ) from None
    return Image


Parts = list[str | None]
"""A turn of a conversation: pieces of text, and None where a picture stands."""


def parts_of(turns: Sequence[str], count: int, where: str) -> list[Parts]:
    """Turns cut at their markers.

    Pictures of turns without any marker stand in front of the first.

    Args:
        turns: the texts, in order.
        count: pictures of all of them.
        where: the row, for messages.

    Raises:
        DataError: another number of markers than of pictures.
    """
    markers = sum(turn.count(MARKER) for turn in turns)
    if markers == 0:
        first: Parts = [*[None] * count, turns[0]]
        return [first, *[_cut(turn) for turn in turns[1:]]]
    if markers != count:
        raise DataError(
            f"{markers} markers ({MARKER}) for {count} picture{'s' * (count != 1)}",
            where=where,
            remedy=f"Write {MARKER} where each picture stands, or nowhere: they then come first.",
        )
    return [_cut(turn) for turn in turns]


def _cut(turn: str) -> Parts:
    first, *rest = turn.split(MARKER)
    parts: Parts = [first]
    for piece in rest:
        parts += [None, piece]
    return [part for part in parts if part != ""]


class Renderer:
    """A model's processor, which makes input of texts with pictures.

    Args:
        directory: the model directory.
        where: the first row that needs it, for messages.

    Raises:
        ModelError: the directory has no usable processor.
        MissingToolError: a library that this processor needs is not installed.
    """

    def __init__(self, directory: Path, where: str) -> None:
        self.directory = directory
        self.processor = _processor(directory, where)
        self._own = str(getattr(self.processor, "image_token", "") or MARKER)

    def render(self, text: Text, max_tokens: int | None) -> EncodedText:
        """Token ids of a text, its pictures beside them.

        The processor's chat template makes a conversation of it: the prompt, if there is one, is
        the user's turn and the passage the assistant's; else the passage is the user's. Without a
        template the parts follow one another.

        Raises:
            DataError: pictures that cannot be read, markers that do not match them, or what the
                processor refuses; each with row and reason.
        """
        pictures = [open_picture(spec, text.where) for spec in text.images]
        written = self._written(text)
        bos = self.processor.tokenizer.bos_token
        options = {"add_special_tokens": False} if bos and written.startswith(bos) else {}
        with _refusals(text.where), quiet_transformers():
            made = self.processor(text=[written], images=pictures, return_tensors="pt", **options)
        return self._encoded(text, dict(made), max_tokens)

    def _written(self, text: Text) -> str:
        """The text as the processor takes it."""
        turns = [text.prompt, text.text] if text.prompt else [text.text]
        parts = parts_of(turns, len(text.images), text.where)
        if any(part and self._own in part for turn in parts for part in turn):
            raise DataError(
                f"the text holds {self._own}, this model's own sign for a picture",
                where=text.where,
                remedy=f"Write {MARKER} where a picture stands.",
            )
        if not self.processor.chat_template:
            written = ["".join(self._own if p is None else p for p in turn) for turn in parts]
            return "\n\n".join(written)
        messages = [
            {"role": role, "content": [_part(p) for p in turn]}
            for role, turn in zip(("user", "assistant"), parts, strict=False)
        ]
        with _refusals(text.where):
            return str(self.processor.apply_chat_template(messages, tokenize=False))
        raise AssertionError("either it is returned, or something is raised")

    def _encoded(self, text: Text, made: dict[str, Any], max_tokens: int | None) -> EncodedText:
        ids = made.pop("input_ids")[0].numpy().astype(np.int64)
        made.pop("attention_mask", None)
        signs = [i for i in self.processor.image_token_ids if i is not None]
        mask = np.isin(ids, signs)
        if not mask.any():
            raise DataError(
                "the processor puts no picture into the text: its chat template knows none",
                where=text.where,
            )
        inputs = {name: value for name, value in made.items() if hasattr(value, "shape")}
        whole = with_images(ids, Images(mask, inputs, len(text.images)))
        tokens = beginning(whole, _stop(mask, max_tokens))
        return EncodedText(text.id, tokens, text.language, text.category)


def _stop(mask: Any, max_tokens: int | None) -> int:
    """Where a text is cut: after so many tokens of text, and no sooner than its last picture."""
    if max_tokens is None or int((~mask).sum()) <= max_tokens:
        return int(mask.size)
    written = int(np.searchsorted(np.cumsum(~mask), max_tokens)) + 1
    return max(written, int(np.flatnonzero(mask)[-1]) + 2)


def _part(part: str | None) -> dict[str, str]:
    return {"type": "image"} if part is None else {"type": "text", "text": part}


@contextmanager
def _refusals(where: str) -> Iterator[None]:
    """What a processor refuses is the row's fault: its class checks counts and shapes itself."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  each processor refuses in its own way
        reason = str(error).strip().splitlines()
        told = reason[0][:_SHOWN] if reason else type(error).__name__
        raise DataError(f"the processor refuses it: {told}", where=where) from None


def _loaded(directory: Path) -> Any:
    """The processor of a model directory, without the part for videos, which needs torchvision."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    config = AutoConfig.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=False
    )
    known = PROCESSOR_MAPPING_NAMES.get(config.model_type)
    names = [name for name in (_named(directory), known) if isinstance(name, str) and name]
    found = next((found for name in names if (found := _class(name)) is not None), None)
    if found is None:
        raise ValueError(f"transformers has no processor for {config.model_type!r}")
    parts = [name for name in found.get_attributes() if name != "video_processor"]
    trimmed = type(found.__name__, (found,), {"get_attributes": classmethod(lambda _: parts)})
    with quiet_transformers():
        return trimmed.from_pretrained(  # type: ignore[attr-defined]
            str(directory), local_files_only=True, trust_remote_code=False
        )


def _named(directory: Path) -> str:
    """The class that the directory's own files name; "" if they name none."""
    for name in reversed(_PROCESSORS):
        try:
            content = json.loads((directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and isinstance(content.get("processor_class"), str):
            return str(content["processor_class"])
    return ""


def _class(name: str) -> Any:
    """A processor class of transformers; None where there is none of that name.

    Raises:
        ImportError: it needs a library that is not installed.
    """
    import transformers

    found = getattr(transformers, name, None)
    if found is None or hasattr(found, "get_attributes"):
        return found
    raise ImportError(f"{name} needs {', '.join(getattr(found, '_backends', ())) or 'more'}")


def _processor(directory: Path, where: str) -> Any:
    _pillow()
    if not any((directory / name).is_file() for name in _PROCESSORS):
        raise ModelError(
            f"there is no processor, which the pictures of {where} need: "
            f"{' and '.join(_PROCESSORS)} are missing",
            where=str(directory),
            remedy="Copy them from the base model, or name a directory that has them: --tokenizer "
            "MODEL_DIRECTORY.",
        )
    try:
        return _loaded(directory)
    except ImportError as error:
        told = str(error).strip().splitlines()
        raise MissingToolError(
            f"the processor needs a library that is not installed: {told[0][:_SHOWN]}",
            where=str(directory),
            remedy="Install it for your torch: see https://pytorch.org/get-started (torchvision).",
        ) from None
    except Exception as error:  # noqa: BLE001  each class fails in its own way
        if (broken := _broken_torchvision()) is not None:
            raise MissingToolError(
                f"torchvision is installed, but does not load beside this torch: {broken}",
                where=str(directory),
                remedy="Install its build for this torch, or pip uninstall torchvision.",
            ) from None
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"no usable processor, which the pictures of {where} need: {told[0][:_SHOWN]}",
            where=str(directory),
        ) from None


def _broken_torchvision() -> str | None:
    """Why an installed torchvision cannot be imported; None if it can, or is not installed."""
    if find_spec("torchvision") is None:
        return None
    try:
        import_module("torchvision")
    except Exception as error:  # noqa: BLE001  a build for another torch fails in its own way
        told = str(error).strip().splitlines() or [type(error).__name__]
        return told[0][:_SHOWN]
    return None
