"""``so8tqc.log``: what a command did and when, appended beside its outputs.

Nothing that is fingerprinted or compared lies in it, and it never lies in a directory that is an
output itself.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel

from so8tqc.config import COMMAND_CONFIGS
from so8tqc.disk.system import disk_errors, make_folder
from so8tqc.errors import So8tqcError
from so8tqc.progress import Progress, Task
from so8tqc.records import Record, versions

NAME = "so8tqc.log"
_RECORD = "record.json"
_logger = logging.getLogger("so8tqc")


def log_beside(record: Path) -> Path:
    """Where the log of a command goes: beside its record, under the record's own prefix.

    ``OUT/record.json`` has ``OUT/so8tqc.log``. What writes one thing, a model directory or a file,
    has ``THING.record.json`` and ``THING.so8tqc.log`` beside it, so that a baked model holds
    nothing but the model.
    """
    return record.with_name(record.name.removesuffix(_RECORD) + NAME)


@contextmanager
def logged(path: Path, config: BaseModel | None, progress: Progress) -> Iterator[Progress]:
    """Append to a log while a command works: begin, tasks, messages, errors with traceback, end.

    Args:
        path: the log; its directory is made.
        config: what the command was told, or None.
        progress: told everything as well.

    Raises:
        ToolError: the directory cannot be made.
    """
    with disk_errors(path):
        make_folder(path.parent)
        handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(_formatter())
    level = _logger.level
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    command = _command(config)
    started = time.monotonic()
    try:
        _logger.info("begin %s, process %d", command, os.getpid())
        installed = versions("torch", "transformers", "llama-cpp-python", "gguf", "numpy")
        _logger.info("versions %s", ", ".join(f"{name} {v}" for name, v in installed.items()))
        if config is not None:
            _logger.info("config %s", config.model_dump_json(exclude_defaults=True))
        yield _LoggedProgress(progress)
    except KeyboardInterrupt:
        _logger.warning("interrupted %s, %.1f s", command, time.monotonic() - started)
        raise
    except Exception as error:
        kind = "stopped" if isinstance(error, So8tqcError) else "crashed"
        _logger.exception("%s %s, %.1f s", kind, command, time.monotonic() - started)
        raise
    else:
        _logger.info("end %s, %.1f s", command, time.monotonic() - started)
    finally:
        _logger.removeHandler(handler)
        _logger.setLevel(level)
        with suppress(OSError):
            handler.close()


class _LogFile(logging.FileHandler):
    """A disk that refuses the log refuses the outputs, too; those are what the user is told of."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the library's name
        """Go on, where the library prints a traceback."""


def log_record(record: Record) -> None:
    """What a record says: failed checks, diagnosis, notices, verdict."""
    for check in record.checks:
        if check.failed:
            of = f" of {check.subject}" if check.subject else ""
            _logger.warning("fail %s%s: %s", check.id, of, _line(check.detail))
    for diagnosis in record.diagnosis:
        _logger.warning("diagnosis %s: %s", diagnosis.code, _line(diagnosis.text))
    for notice in record.notices:
        _logger.info("notice %s", _line(notice))
    _logger.info("verdict %s: %s", record.kind, record.verdict)


class _LoggedProgress:
    def __init__(self, shown: Progress) -> None:
        self._shown = shown

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        started = time.monotonic()
        _logger.info("begin %s", _line(description))
        with self._shown.task(description, total, unit) as task:
            yield task
        _logger.info("end %s, %.1f s", _line(description), time.monotonic() - started)

    def message(self, text: str) -> None:
        _logger.info("%s", _line(text))
        self._shown.message(text)


def _command(config: BaseModel | None) -> str:
    """``so8tqc qc``: the command whose config this is; what has none of its own is a run."""
    names = (name for name, model in COMMAND_CONFIGS.items() if type(config) is model)
    return f"so8tqc {next(names, 'run')}"


def _formatter() -> logging.Formatter:
    formatter = logging.Formatter(
        "%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S"
    )
    formatter.converter = time.gmtime
    return formatter


def _line(text: str) -> str:
    """One line, so that every line but a traceback's begins with a time."""
    return " ".join(text.split())
