"""Models and rotations by the name they have on a hub: ``org/name`` or ``org/name@revision``.

A name is what no file here is called, and what does not look like a path: exactly one slash, no
``.``, ``/`` or ``~`` in front, no ending of a file that is read here, and a first part that is no
folder here. Only a name is ever sent to the hub. What comes back lies in huggingface_hub's own
cache, in a folder that is named after the commit (see ``disk.digests.hub_source``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import BaseModel

from so8tqc.errors import InputError, ModelError, RotationError, So8tqcError, ToolError, first_line
from so8tqc.progress import SILENT, Progress
from so8tqc.rotations.files.pt import TORCH_SUFFIXES

_NAME = re.compile(
    r"^(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(?:@(?P<revision>[\w.-]+))?$"
)
_FILE_ENDINGS = (
    ".safetensors",
    ".gguf",
    ".pt",
    ".pth",
    ".bin",
    ".json",
    ".jsonl",
    ".txt",
    ".yaml",
    ".yml",
)
_MODEL_FIELDS = ("base", "model", "reference", "candidate", "candidates", "tokenizer")
_ROTATION_FIELDS = ("rotations", "adapters")

MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*")
"""Weights, config, tokenizer. No pickles, no code."""

ROTATION_FILES = ("*.safetensors", "*.json", "*.pt", "*.pth", "*.bin")
_NOT_WANTED = ("*/*", "consolidated*")
"""Patterns that are not fetched: other formats of the same weights, kept beside them."""

_Config = TypeVar("_Config", bound=BaseModel)


class HubName(NamedTuple):
    """A repository on a hub, and which of its states; None is the newest."""

    repository: str
    revision: str | None

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")


def hub_name(path: Path) -> HubName | None:
    """What a path names on a hub; None if it is a path, whether it exists or not."""
    text = path.as_posix()
    match = _NAME.match(text)
    if match is None or path.exists() or text.lower().endswith(_FILE_ENDINGS):
        return None
    if Path(path.parts[0]).exists():
        return None
    return HubName(match["repository"], match["revision"])


def with_local_paths(config: _Config, progress: Progress = SILENT) -> _Config:
    """A stage's config with the names of models and rotations replaced by local directories.

    Raises:
        InputError: a name that the hub does not have, or rotations that it does not have one of.
        ToolError: the hub cannot be reached.
    """
    changes: dict[str, object] = {}
    for field in type(config).model_fields:
        value = getattr(config, field)
        find = local_rotations if field in _ROTATION_FIELDS else local_model
        if field not in (*_MODEL_FIELDS, *_ROTATION_FIELDS) or value is None:
            continue
        paths = value if isinstance(value, tuple) else (value,)
        found = tuple(find(path, progress) for path in paths)
        if found != paths:
            changes[field] = found if isinstance(value, tuple) else found[0]
    inner = getattr(config, "rotation_options", None)
    if isinstance(inner, BaseModel) and (told := with_local_paths(inner, progress)) is not inner:
        changes["rotation_options"] = told
    return config.model_copy(update=changes) if changes else config


def local_model(path: Path, progress: Progress = SILENT) -> Path:
    """The path itself, or the directory that a name on the hub was fetched to.

    Raises:
        ModelError: the hub has no such repository or revision, or may not show it.
        ToolError: the hub cannot be reached.
    """
    name = hub_name(path)
    return path if name is None else _fetch(name, MODEL_FILES, ModelError, progress)


def local_rotations(path: Path, progress: Progress = SILENT) -> Path:
    """The path itself, or the adapter directory or only gate file of a repository.

    Raises:
        RotationError: as :func:`local_model`; or the repository holds no gate file, or several.
        ToolError: the hub cannot be reached.
    """
    name = hub_name(path)
    if name is None:
        return path
    directory = _fetch(name, ROTATION_FILES, RotationError, progress)
    if (directory / "adapter_config.json").is_file():
        return directory
    files = sorted(
        file for file in directory.iterdir() if file.suffix in (".safetensors", *TORCH_SUFFIXES)
    )
    if len(files) != 1:
        listed = ", ".join(file.name for file in files) or "none"
        raise RotationError(
            f"rotations come from a repository with one gate file or an adapter; here: {listed}",
            where=str(name),
            remedy=f"Fetch the file and give its path: hf download {name.repository} FILE",
        )
    return files[0]


def _fetch(
    name: HubName, patterns: tuple[str, ...], kind: type[InputError], progress: Progress
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with progress.task(f"fetching {name}") as task:
            directory = snapshot_download(
                name.repository,
                revision=name.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(_NOT_WANTED),
            )
            task.advance(1)
    except RevisionNotFoundError:
        raise kind("the hub has no such revision of it", where=str(name)) from None
    except RepositoryNotFoundError:
        raise _unknown(name, kind) from None
    except LocalEntryNotFoundError as error:
        raise _unreachable(name, kind, error) from None
    except (HfHubHTTPError, OSError) as error:
        raise ToolError(f"the hub does not give it: {first_line(error)}", where=str(name)) from None
    finally:
        if not quiet:
            enable_progress_bars()
    return Path(directory)


def _unknown(name: HubName, kind: type[InputError]) -> InputError:
    return kind(
        "neither a path here nor a repository that the hub shows",
        where=str(name),
        remedy="Check the spelling; a private or gated repository needs: hf auth login. A path "
        "that is meant as one begins with ./",
    )


def _unreachable(name: HubName, kind: type[InputError], error: Exception) -> So8tqcError:
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        return kind(
            "not a path here, not in the cache either, and HF_HUB_OFFLINE forbids to ask the hub",
            where=str(name),
            remedy=f"Fetch it where there is a network (hf download {name.repository}), or unset "
            "HF_HUB_OFFLINE. A path that is meant as one begins with ./",
        )
    return ToolError(
        f"not a path here, and the hub cannot be reached: {first_line(error)}", where=str(name)
    )
