"""What must hold after a command was killed, or refused by the disk, at any of its operations.

An output is absent, as it was before, or as an undisturbed command leaves it; the same command,
run again, then ends as if nothing had been. What an undisturbed command leaves is the oracle, so
nothing here knows how a file is written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from disk_bench import Bench, Fault, Operation, Outcome

from so8tqc.disk.digests import file_ref
from so8tqc.disk.locks import LOCK_NAME
from so8tqc.record_files import read_record
from so8tqc.services.run.directory import Manifest

Tree = dict[str, str]
"""Path under the root → SHA-256 of the file; temporaries and locks (hidden) are left out."""

LOGS = (".gguf.log", "so8tqc.log")
"""Logs are written as things happen."""

MOST = 0.8
"""Of the signals that are sent, these must have ended a command."""

_RANDOM = re.compile(r"\.[0-9a-f]{16}\.so8tqc-partial")
_OF_RUNS = ("run", "seconds", "reused")
_REMOVALS = ("unlink", "rmdir")


@dataclass(frozen=True)
class Case:
    """A command, and what lies there before it.

    Attributes:
        name: of the command.
        arguments: of ``so8tqc``.
        start: directory to begin from; None: an empty one.
        whole: directories that appear complete or not at all.
    """

    name: str
    arguments: tuple[str, ...]
    start: Path | None = None
    whole: tuple[str, ...] = ()


@dataclass
class Trial:
    """A case, what it leaves when undisturbed, and which states it was already continued from."""

    bench: Bench
    case: Case
    before: Tree
    after: Tree
    trace: tuple[Operation, ...]
    status: int
    continued: set[str] = field(default_factory=set)

    @property
    def points(self) -> range:
        """Numbers of the operations."""
        return range(1, len(self.trace) + 1)


def begin(bench: Bench, case: Case) -> Trial:
    """Run a case undisturbed; all it wrote must be on the disk before it is published."""
    bench.clear(case.start)
    before = tree(bench.root)
    outcome = bench.run(case.arguments, afresh=True)
    assert outcome.status in (0, 1), outcome.said  # a verdict on random weights may be anything
    assert hidden(bench.root) == []
    after = tree(bench.root)
    undurable = list(published_too_early(outcome.trace))
    assert not undurable, undurable
    bench.clear(case.start)
    again = bench.run(case.arguments)
    assert again.status == outcome.status
    assert (other := differing(after, tree(bench.root))) == [], f"not reproducible: {other}"
    # the second is the one whose like is disturbed: it logs less, as it runs no models
    return Trial(bench, case, before, after, again.trace, outcome.status)


def duration(trial: Trial) -> float:
    """Seconds of an undisturbed run that knows nothing; llama.cpp's converter has run before."""
    trial.bench.clear(trial.case.start)
    started = time.monotonic()
    trial.bench.run(trial.case.arguments, afresh=True)
    return time.monotonic() - started


def kill_at(trial: Trial, points: Sequence[int], signal_: int) -> None:
    """:func:`kill` at each of these operations; nearly all must end the command."""
    ended = sum(kill(trial, at, signal_=signal_) for at in points)
    assert ended > MOST * len(points), f"only {ended} of {len(points)} were ended"


def kill(trial: Trial, at: int, *, signal_: int = signal.SIGKILL) -> bool:
    """Kill at an operation: within it, if it is a write and the signal cannot be caught.

    Returns:
        Whether that ended the command; the last operations may come after all is done.
    """
    torn = signal_ == signal.SIGKILL and trial.trace[at - 1].what == "write"
    fault = Fault("tear", at) if torn else Fault("signal", at, signal_)
    trial.bench.clear(trial.case.start)
    outcome = trial.bench.run(trial.case.arguments, fault)
    # another thread may have been there before; after the last operation there is no fault
    if outcome.hit == 0 or outcome.status == trial.status:
        assert outcome.status == trial.status, (fault, outcome.said)
    else:
        _ended_by(outcome, signal_, trial.bench.root, f"{fault} {outcome.said}")
    nothing_half(trial, f"{fault} {trial.trace[at - 1]}")
    continues(trial, f"{fault} {trial.trace[at - 1]}")
    return outcome.status != trial.status


def _ended_by(outcome: Outcome, signal_: int, root: Path, what: str) -> None:
    """By a signal; one that can be caught leaves a message, its exit code and nothing else."""
    if signal_ == signal.SIGKILL:
        assert outcome.status == -signal_, (outcome.status, what)
        return
    assert outcome.status == 128 + signal_, (outcome.status, what)
    assert "run the same command again" in " ".join(outcome.said.split()), what
    assert "Traceback" not in outcome.said, what
    assert no_temporaries(root), (hidden(root), what)


def kill_at_moment(trial: Trial, seconds: float, signal_: signal.Signals) -> bool:
    """Begin anew, models run afresh, and send a signal after a time; then go on to the end.

    Returns:
        Whether the signal came before the end.
    """
    trial.bench.clear(trial.case.start)
    outcome = trial.bench.run(trial.case.arguments, after=(seconds, signal_), afresh=True)
    what = f"{signal_.name} after {seconds:.2f} s: status {outcome.status}\n{outcome.said}"
    if outcome.status != trial.status:  # it had not ended before
        _ended_by(outcome, signal_, trial.bench.root, what)
    nothing_half(trial, what)
    continues(trial, what)
    return outcome.status != trial.status


def fail(trial: Trial, at: int, number: int, *, lasting: bool) -> Outcome:
    """Have an operation fail; the command says so in one paragraph, and cleans up."""
    fault = Fault("fail", at, number, lasting)
    trial.bench.clear(trial.case.start)
    outcome = trial.bench.run(trial.case.arguments, fault)
    hit = outcome.trace[at - 1] if outcome.hit else None
    what = f"{errno.errorcode[number]} {fault} {hit}\n{outcome.said}"
    assert outcome.status in {trial.status, *([4] if outcome.hit else [])}, what
    if outcome.status == 4:
        assert "Traceback" not in outcome.said, what
        assert outcome.said.count("error ") >= 1, what
        assert os.strerror(number) in " ".join(outcome.said.split()), what
    if number == errno.EIO and hit is not None and not _may_be_left_out(hit):
        assert outcome.status == 4, f"went on after {what}"
    removable = number == errno.ENOSPC or not lasting  # else nothing can be deleted, either
    if removable and trial.trace[at - 1].what not in _REMOVALS:
        assert no_temporaries(trial.bench.root), what
    nothing_half(trial, what)
    if outcome.status == trial.status:
        assert (other := differing(trial.after, tree(trial.bench.root))) == [], f"{other} {what}"
    continues(trial, what)
    return outcome


def _may_be_left_out(operation: Operation) -> bool:
    """Whether a command may go on without an operation.

    Logs, locks and what is to be deleted serve nobody's result. A write that fails may be tried
    again in another way, and if it is not, the bytes differ; a directory may be there already.
    """
    name = operation.path.name
    serves_nobody = name.endswith((*LOGS, LOCK_NAME))
    return serves_nobody or operation.what in ("write", "mkdir", *_REMOVALS)


def nothing_half(trial: Trial, what: str) -> None:
    """Whatever is there is what it was before, or what it is to become."""
    found = tree(trial.bench.root)
    for path, digest in found.items():
        assert digest in (trial.before.get(path), trial.after.get(path)), f"{path} after {what}"
    for folder in trial.case.whole:
        part = _below(found, folder)
        assert part in ({}, _below(trial.before, folder), _below(trial.after, folder)), (
            f"{folder} after {what}"
        )
    for manifest in trial.bench.root.rglob("manifest.json"):
        _holds(manifest, what)
    for path, digest in found.items():
        if path.endswith("record.json") and digest != trial.before.get(path):
            _has_its_outputs(trial.bench.root / path, what)


def continues(trial: Trial, what: str) -> None:
    """The same command comes to the same end; from equal states that is tried once."""
    root = trial.bench.root
    state = repr((sorted(tree(root).items()), [_RANDOM.sub(".*", p) for p in hidden(root)]))
    if state in trial.continued:
        return
    outcome = trial.bench.run(trial.case.arguments)
    assert outcome.status == trial.status, f"{outcome.said} after {what}"
    assert (other := differing(trial.after, tree(root))) == [], f"{other} after {what}"
    assert hidden(root) == [], f"after {what}"
    trial.continued.add(state)


def tree(root: Path) -> Tree:
    """Digest of every file that a user sees, manifests and logs left out (see :func:`_holds`)."""
    return {
        str(path.relative_to(root)): hashlib.sha256(_content(path)).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and not _is_hidden(path.relative_to(root))
        and path.name != "manifest.json"
        and not path.name.endswith(LOGS)
    }


def _content(path: Path) -> bytes:
    """A file's bytes; of records and reports in JSON those without ``Record.run``."""
    content = path.read_bytes()
    if path.name.endswith(("record.json", "report.json")):
        with suppress(ValueError):  # half a record is compared as it is
            return json.dumps(_without_run(json.loads(content))).encode()
    return content


def _without_run(value: object) -> object:
    """The record of a run repeats its stages' seconds, and whether they were reused."""
    if isinstance(value, dict):
        told = {key: part for key, part in value.items() if key not in _OF_RUNS}
        return {key: _without_run(part) for key, part in told.items()}
    return [_without_run(part) for part in value] if isinstance(value, list) else value


def hidden(root: Path) -> list[str]:
    """Temporaries and locks, by their path under the root; what lies in them is left out."""
    found = []
    for folder, names, files in os.walk(root):
        found += [str(Path(folder, n).relative_to(root)) for n in (*names, *files) if n[0] == "."]
        names[:] = [name for name in names if name[0] != "."]
    return sorted(found)


def no_temporaries(root: Path) -> bool:
    """Whether nothing is left; a lock whose deletion failed means nothing."""
    return not [path for path in hidden(root) if path.endswith("-partial")]


def differing(expected: Tree, found: Tree) -> list[str]:
    """Paths whose files are not the same."""
    return sorted(p for p in {*expected, *found} if expected.get(p) != found.get(p))


def published_too_early(trace: Sequence[Operation]) -> Iterable[str]:
    """Files and directories that get their name before all of them is on the disk.

    After every rename to a name that a user sees: was each file of it fsynced after its last write,
    each directory after the last name it got, and, later, the directory of the new name?
    """
    dirty: dict[Path, str] = {}
    awaiting: dict[Path, str] = {}
    for operation in trace:
        path = operation.path
        if operation.what in ("write", "truncate"):
            dirty[path] = operation.what
        elif operation.what in ("open", "mkdir"):
            dirty[path] = dirty[path.parent] = operation.what
        elif operation.what == "fsync":
            dirty.pop(path, None)
            awaiting.pop(path, None)
        elif operation.what == "rename" and not _is_hidden(Path(operation.other)):
            target = Path(operation.other)
            yield from (
                f"{changed} ({how}) before {target}"
                for changed, how in dirty.items()
                if changed == path or path in changed.parents
            )
            awaiting[target.parent] = f"the directory of {target}"
    yield from awaiting.values()


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _below(files: Tree, folder: str) -> Tree:
    return {path: digest for path, digest in files.items() if path.startswith(folder + "/")}


def _has_its_outputs(record: Path, what: str) -> None:
    """A record appears after all that it names."""
    for ref in read_record(record).outputs.values():
        path = Path(ref.path)
        whole = path.is_dir() or (path.is_file() and file_ref(path).sha256 == ref.sha256)
        assert whole, f"{path} of {record} after {what}"


def _holds(manifest: Path, what: str) -> None:
    """A manifest can be read, and what it says is done is there as it says."""
    for stage in Manifest.model_validate_json(manifest.read_bytes()).stages.values():
        for path, ref in stage.outputs.items():
            assert file_ref(Path(path)).sha256 == ref.sha256, f"{path} after {what}"
