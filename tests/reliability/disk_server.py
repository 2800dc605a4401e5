"""Runs so8tqc commands, each in a fork of a process that has imported all it needs: milliseconds.

Spoken to by ``disk_bench``: a line of JSON is a command line, the answer is the status it ended
with (negative: the signal that killed it). Nothing is computed before a fork: torch's threads
would not survive it.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MODULES = (
    "so8tqc.services.run.pipeline", "so8tqc.services.capture", "so8tqc.services.choose.service",
    "so8tqc.cli.app", "so8tqc.cli.show", "so8tqc.config.load", "transformers",
    "plotly.graph_objects",
    "so8tqc.reports.kinds.choose", "scipy.special", "scipy.optimize", "scipy.stats", "numpy",
    "gguf",
    "safetensors.numpy", "safetensors.torch", "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama", "transformers.models.auto.tokenization_auto",
    "llama_cpp", "psutil",
    "so8tqc.services.attest.verify_file", "so8tqc.services.attest.service", "so8tqc.cli.log",
    "so8tqc.gguf.reader", "torch.utils.serialization.config", "plotly.subplots", "plotly.io",
    "plotly.graph_objs.layout", "plotly.offline",
)  # fmt: skip
_GRACE_SECONDS = 60.0


def main() -> None:
    for name in MODULES:
        importlib.import_module(name)
    _parse_fast()
    _draw_fast()
    _load_fast()
    _same_times()
    _convert_once(Path(sys.argv[1]))
    _evaluate_once(Path(sys.argv[1]))
    gc.collect()
    gc.freeze()  # no fork looks through, and so copies, what was imported
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(_run_here(job) if job.get("here") else _status(job), flush=True)


def _run_here(job: dict[str, list[str]]) -> int:
    """Without a fork, so that later forks have what it has loaded. Nothing of torch may run."""
    from so8tqc.cli.main import run

    with contextlib.redirect_stdout(sys.stderr):
        return run(job["arguments"])


def _parse_fast() -> None:
    """The command line is built once, not by every fork."""
    import typer

    from so8tqc.cli import app as module

    module.app = typer.main.get_command(module.app)  # type: ignore[assignment]


def _draw_fast() -> None:
    """The templates are compiled, and plotly's validators built, once."""
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    from so8tqc.reports.templating import _environment

    for name in _environment().list_templates():
        _environment().get_template(name)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, subplot_titles=("a", "b"))
    for kind in (graph_objects.Scatter, graph_objects.Scattergl, graph_objects.Bar):
        figure.add_trace(kind(x=[0], y=[0]), row=1, col=1)
    figure.add_trace(graph_objects.Heatmap(z=[[0]]), row=2, col=1)
    figure.update_layout(title="a", legend={"x": 0}, margin={"l": 0}, hoverlabel={"namelength": 1})
    figure.to_html(include_plotlyjs=True)


def _load_fast() -> None:
    """The patterns by which transformers renames tensors are compiled once."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")


def _same_times() -> None:
    """What differs between equal runs, time and speed, does not: reports can be compared, too."""
    from so8tqc.records import RunInfo, Stopwatch
    from so8tqc.services.choose import among as choosing_among

    info = RunInfo(started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.0)
    Stopwatch.info = lambda self: info  # type: ignore[method-assign]
    choosing_among.speeds = lambda *_, **__: {}


def _convert_once(folder: Path) -> None:
    """llama.cpp's converter, which starts for seconds, converts every model once.

    Its own operations are then those of a copy; it does not know of ours, and dies with us.
    """
    import shutil

    from so8tqc.disk.digests import file_ref
    from so8tqc.services.export import service as export

    convert = export.convert

    def copied(
        converter: Any, model: Path, out: Path, type_: str, log: Path, *rest: Any,
        trace: Path | None = None, **given: Any,
    ) -> None:  # fmt: skip
        known = folder / f"{file_ref(model).sha256}-{model.name}-{type_}.gguf"
        history = known.with_suffix(".json")
        if not (known.is_file() and history.is_file()):
            convert(converter, model, known, type_, log, *rest, trace=history, **given)
        log.write_text("converted before", encoding="utf-8")
        shutil.copyfile(known, out)
        if trace is not None:
            shutil.copyfile(history, trace)

    export.convert = copied


_afresh = False
"""Whether this fork runs models even for what is known."""


def _evaluate_once(folder: Path) -> None:
    """What models say of the same files and texts is computed once, unless a job says ``afresh``.

    None of it writes to the watched directory, so that a stage's operations stay what they are.
    """
    from so8tqc.services.calibrate import service as calibrate
    from so8tqc.services.longtext import service as longtext
    from so8tqc.services.qc import service as qc

    def of_calibrate(config: Any, *_: object) -> tuple[Any, ...]:
        return config, config.gguf, config.reference

    def of_qc(config: Any, *_: object) -> tuple[Any, ...]:
        return config, config.reference, *config.candidates, config.rotations

    def of_long(case: Any, _: object, config: Any, *__: object) -> tuple[Any, ...]:
        return config, config.model, config.reference, config.rotations

    def filled(case: Any, *_: object) -> dict[str, Any]:
        return vars(case)

    _remember(folder, calibrate, "_measure", of_calibrate)
    _remember(folder, qc, "run_models", of_qc)
    _remember(folder, longtext, "_measure", of_long, filled)


def _remember(
    folder: Path,
    module: Any,
    name: str,
    inputs: Callable[..., tuple[Any, ...]],
    filled: Callable[..., dict[str, Any]] | None = None,
) -> None:
    """Replace a function by one that keeps its result, or what it fills, in a file.

    Args:
        folder: of the files.
        module: where the function is called by its name.
        name: of the function.
        inputs: its arguments → its config, and the files and directories that it reads.
        filled: its arguments → the attributes that it sets.
    """
    from so8tqc.disk.digests import file_ref

    function = getattr(module, name)

    def known(*arguments: Any) -> Any:
        config, *paths = inputs(*arguments)
        told = [name, config.model_dump_json(), *(file_ref(p).sha256 for p in paths if p)]
        path = folder / f"{hashlib.sha256(repr(told).encode()).hexdigest()}.pickle"
        if path.is_file() and not _afresh:
            result, attributes = pickle.loads(path.read_bytes())
            if filled is not None:
                filled(*arguments).update(attributes)
            return result
        result = function(*arguments)
        attributes = filled(*arguments) if filled is not None else {}
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_bytes(pickle.dumps((result, attributes)))
        beside.rename(path)
        return result

    setattr(module, name, known)


def _status(job: dict[str, object]) -> int:
    child = os.fork()
    if child == 0:
        os._exit(_run(job))
    with contextlib.suppress(OSError):
        os.setpgid(child, child)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _wait_for_group(child)
    return status


def _run(job: dict[str, object]) -> int:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if we run in the background
    said = os.open(str(job["said"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(said, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if "limit" in job:
        import threading

        threading.Timer(float(job["limit"]), os.killpg, (os.getpid(), int(job["signal"]))).start()
    from so8tqc.cli.main import run

    global _afresh
    _afresh = bool(job.get("afresh"))
    arguments: list[str] = job["arguments"]  # type: ignore[assignment]
    return run(arguments)


def _wait_for_group(group: int) -> None:
    """Until the last process of a group has ended: it may still be writing."""
    end = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        if all(_ended(stat, group) for stat in Path("/proc").glob("[0-9]*/stat")):
            return
        time.sleep(0.001)
    raise TimeoutError(f"process group {group} goes on")


def _ended(stat: Path, group: int) -> bool:
    """Whether a process is of another group, or a zombie that nobody has asked about."""
    try:
        state, _, number = stat.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return True
    return int(number) != group or state in "ZX"


if __name__ == "__main__":
    main()
