"""Verify a statement: files against digests, then every link that can be, made again.

Two questions are kept apart. Are the files that are here those of the statement? And does the
statement tell the truth: do its inputs, with its parameters, make its outputs? The second is
answered link by link, in order. An input is taken from the files here if its digest is the stated
one; else what an earlier link made again serves, if that was identical.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from so8tqc.checkpoints.provenance import PROVENANCE_NAME, read_provenance
from so8tqc.closure import versions_of
from so8tqc.config import VerifyConfig
from so8tqc.disk.digests import sha256_file
from so8tqc.errors import InputError, MissingToolError
from so8tqc.gguf.file import open_gguf
from so8tqc.llama.build import library_build
from so8tqc.llama.vendor import find_converter
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.attest import Likeness, VerifyMetrics
from so8tqc.records import (
    Check,
    Record,
    Stopwatch,
    Verdict,
    judge,
    overall,
    skipped,
)
from so8tqc.services.attest.remake import Made, recorded_build, remake
from so8tqc.services.attest.requantize import compare_tensors
from so8tqc.services.attest.statement import (
    BASE,
    HESSIANS,
    IMPORTANCE,
    ROTATIONS,
    WEIGHING,
    Link,
    Resource,
    Statement,
    adapter_name,
    adapter_names,
    applied_inputs,
    from_outside,
    is_adapter,
    read_statement,
)
from so8tqc.services.attest.stored import differing_parts
from so8tqc.wording import listed


@dataclass(frozen=True)
class Outcome:
    """A link's result, with the differing parts or the reason, for people."""

    found: Likeness
    text: str
    differing: int = 0


def verify_statement(config: VerifyConfig, progress: Progress = SILENT) -> Record:
    """Check the files that are here, and make again every link whose inputs are here.

    Record metrics: ``links`` and ``files`` of :class:`so8tqc.record_kinds.attest.VerifyMetrics`.

    Raises:
        InputError: no statement, an edited one, a broken chain, or none of its files is here.
        ToolError: the temporary directory has no room.
    """
    watch = Stopwatch()
    statement = read_statement(config.file)
    bench = _Bench.of(statement, config, progress)
    outcomes: dict[str, Outcome] = {}
    if config.level == "full":
        with tempfile.TemporaryDirectory(prefix="so8tqc-", dir=config.scratch) as scratch:
            for number, link in enumerate(statement.predicate.links):
                outcomes[link.name] = bench.judge(link, Path(scratch) / str(number), progress)
    checks = [
        *_file_checks(bench),
        *_origin(bench),
        _stated_verdicts(statement),
        *(_link_check(name, outcome) for name, outcome in outcomes.items()),
    ]
    return Record(
        kind="verify",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=VerifyMetrics(
            links={name: {"found": o.found, "text": o.text} for name, o in outcomes.items()},
            files={
                name: {"state": bench.state(name), "parts": p} for name, p in bench.parts.items()
            },
        ).as_json(),
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )


@dataclass
class _Bench:
    """What is at hand for making links again.

    Attributes:
        stated: name → file as the statement has it.
        here: name → where that file is, if it is.
        parts: name → what of it differs; None for a file that is absent.
        strangers: files in a directory of the statement that it does not name.
        outside: ``base``, ``rotations``, ``adapter_1`` and so on, ``imatrix``, ``hessians`` → where
            the user says they are.
        directory: where they are looked for.
        unmade: name → digest, of files of which the statement does not say how they were made.
        made: name → a file made again that is identical.
    """

    stated: Mapping[str, Resource]
    here: Mapping[str, Path]
    parts: Mapping[str, list[str] | None]
    strangers: Sequence[str]
    outside: Mapping[str, Path]
    directory: Path
    unmade: Mapping[str, str]
    made: Made = field(default_factory=dict)

    @classmethod
    def of(cls, statement: Statement, config: VerifyConfig, progress: Progress) -> _Bench:
        """Look for the files and hash them."""
        directory = config.files or config.file.parent
        stated = {e.name: e for e in (*statement.outputs, *statement.predicate.records)}
        here = _places(statement, directory)
        if not here and config.base is None:
            raise InputError(
                "none of the statement's files is here",
                where=str(directory),
                remedy="Say where they are with --files DIR, or give --base and --rotations to "
                "make them again.",
            )
        parts: dict[str, list[str] | None] = dict.fromkeys(stated)
        with progress.task("hashing", total=len(here), unit="files") as task:
            for name, path in here.items():
                parts[name] = differing_parts(path, stated[name])
                task.advance(1, item=name)
        given = {
            BASE: config.base,
            ROTATIONS: config.rotations,
            IMPORTANCE: config.imatrix,
            HESSIANS: config.hessians,
        }
        outside = {name: path for name, path in given.items() if path is not None}
        outside |= {adapter_name(i): path for i, path in enumerate(config.adapters, start=1)}
        _require_stated(statement, outside)
        unmade = {
            entry.name: entry.digest.sha256
            for link in statement.predicate.links
            for entry in link.inputs
            if entry.name in from_outside(link)
        }
        strangers = _strangers(statement, directory)
        return cls(stated, here, parts, strangers, outside, directory, unmade)

    def state(self, name: str) -> str:
        """``identical``, ``different`` or ``absent``."""
        parts = self.parts[name]
        return "absent" if parts is None else "different" if parts else "identical"

    def _input(self, name: str) -> Path | None:
        if name in self.outside:
            return self.outside[name]
        if name in self.here and not self.parts[name]:
            return self.here[name]
        return self.made.get(name) or self._from_outside(name)

    def _from_outside(self, name: str) -> Path | None:
        """A file that no link makes, if it lies here with the digest that is stated."""
        path = self.directory / PurePosixPath(name).name
        known = name in self.unmade and path.is_file()
        return path if known and sha256_file(path) == self.unmade[name] else None

    def judge(self, link: Link, scratch: Path, progress: Progress) -> Outcome:
        """Make a link again and compare with what the statement says it made."""
        places = {entry.name: self._input(entry.name) for entry in link.inputs}
        inputs = {name: path for name, path in places.items() if path is not None}
        if missing := [name for name in places if name not in inputs]:
            return Outcome(Likeness.NOT_CHECKED, f"not here: {listed(missing)}{_options(missing)}.")
        if other := _other_inputs(link, inputs):
            return Outcome(Likeness.DIFFERENT, other, 1)
        scratch.mkdir()
        try:
            made = remake(link, inputs, scratch, progress)
        except MissingToolError as error:
            return Outcome(Likeness.NOT_CHECKED, str(error))
        if not made:
            return Outcome(
                Likeness.NOT_CHECKED,
                "a temperature is measured, not derived; so8tqc calibrate measures it again.",
            )
        return self._compared(link, inputs, made)

    def _compared(self, link: Link, inputs: Mapping[str, Path], made: Made) -> Outcome:
        different = {}
        for output in link.outputs:
            if output.name in made and (parts := differing_parts(made[output.name], output)):
                different[output.name] = parts
        added = sorted(made.keys() - {output.name for output in link.outputs})
        lacking = [o.name for o in link.outputs if o.name not in made]
        if link.kind != "calibrate":
            different |= {name: ["not made again"] for name in lacking}
        different |= {name: ["not in the statement"] for name in added}
        self.made |= {name: path for name, path in made.items() if name not in different}
        if not different:
            rest = f", but for {listed(lacking)}, which is measured" if lacking else ""
            return Outcome(
                Likeness.IDENTICAL, f"{len(made)} file(s) made again are identical{rest}."
            )
        text = "; ".join(f"{name}: {listed(parts)}" for name, parts in different.items())
        if link.kind == "bake":
            text += _other_sources(link, made)
        excused = self._excuse(link, inputs, made)
        return excused or Outcome(
            Likeness.DIFFERENT, f"made again, it differs in {text}.", len(different)
        )

    def _excuse(self, link: Link, inputs: Mapping[str, Path], made: Made) -> Outcome | None:
        """What may differ because another build or another converter made it."""
        (output, *_) = link.outputs
        if link.kind == "export":
            stated, converter = link.parameters["converter"], find_converter().revision
            if stated != converter:
                return Outcome(Likeness.NOT_CHECKED, f"converted by {stated}; here is {converter}.")
        if link.kind == "quantize" and recorded_build(link) != library_build():
            if output.name not in self.here:
                return Outcome(
                    Likeness.NOT_CHECKED,
                    "another build of libllama, or CPU, gives other bytes, and the file is not "
                    "here to be compared block by block.",
                )
            return self._within_rounding(output, inputs, made[output.name])
        return None

    def _within_rounding(
        self, output: Resource, inputs: Mapping[str, Path], made: Path
    ) -> Outcome | None:
        digests = {name: tensor.sha256 for name, tensor in output.tensors.items()}
        source = next(path for name, path in inputs.items() if name not in WEIGHING)
        found = compare_tensors(
            open_gguf(self.here[output.name]),
            digests,
            open_gguf(made),
            open_gguf(source),
            digests,
            same_build=False,
        )
        if any(tensor["link"] is Likeness.DIFFERENT for tensor in found.values()):
            return None
        blocks = sum(tensor["blocks"] or 0 for tensor in found.values())
        return Outcome(
            Likeness.WITHIN_ROUNDING,
            f"{blocks} blocks of {len(found)} tensors differ, each about as near to the "
            "unquantized weights; another build of libllama, or CPU, made the file.",
        )


def _require_stated(statement: Statement, outside: Mapping[str, Path]) -> None:
    """See that adapters which are given are ones that the statement names.

    Raises:
        InputError: it names fewer.
    """
    stated = {name for link in statement.predicate.links for name in adapter_names(link)}
    given = [name for name in outside if is_adapter(name)]
    if len(given) > len(stated):
        raise InputError(
            f"{len(given)} adapters are given, the statement names {len(stated)}",
            remedy="Give those beside the rotations alone, in the order in which they apply.",
        )


def _other_inputs(link: Link, inputs: Mapping[str, Path]) -> str | None:
    """Says if what the errors were weighed by is not as stated (base and rotations show later)."""
    for entry in link.inputs:
        if entry.name in WEIGHING and sha256_file(inputs[entry.name]) != entry.digest.sha256:
            return f"{inputs[entry.name]} is not the {WEIGHING[entry.name]} of the statement."
    return None


def _other_sources(link: Link, made: Made) -> str:
    """Whether base, rotations or adapters are others than stated, by fingerprint."""
    places = [
        path.parent for name, path in made.items() if PurePosixPath(name).name == PROVENANCE_NAME
    ]
    provenance = read_provenance(places[0]) if places else None
    if provenance is None:
        return ""
    stated = {entry.name: entry.digest.sha256 for entry in link.inputs}
    applied = applied_inputs(provenance, rotations_given=ROTATIONS in stated)
    found = {BASE: provenance.base_fingerprint, **dict(applied)}
    other = [name for name in stated if found.get(name) != stated[name]]
    return f" ({' and '.join(other)} given here: not the stated one)" if other else ""


def _places(statement: Statement, directory: Path) -> dict[str, Path]:
    """Name → file: under its name, or under the end of its name that no other file shares.

    People upload a model directory and GGUF files each by itself: ``bake/baked_model/config.json``
    is then ``config.json``.
    """
    names = [e.name for e in (*statement.outputs, *statement.predicate.records)]
    ends: dict[PurePosixPath, set[str]] = {}
    for name in names:
        for end in _ends(name):
            ends.setdefault(end, set()).add(name)
    found = {}
    for name in names:
        for end in _ends(name):
            path = directory / end
            if ends[end] == {name} and path.is_file():
                found[name] = path
                break
    return found


def _ends(name: str) -> list[PurePosixPath]:
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or ".." in parts:
        raise InputError(f"the statement names {name!r}, which is outside its directory")
    return [PurePosixPath(*parts[i:]) for i in range(len(parts))]


def _strangers(statement: Statement, directory: Path) -> list[str]:
    """Files in a model directory of the statement that it does not name."""
    stated = {entry.name for entry in statement.outputs}
    folders = {
        str(link.parameters["model"]) for link in statement.predicate.links if link.kind == "bake"
    }
    found = (
        path.relative_to(directory).as_posix()
        for folder in folders
        for path in (directory / folder).rglob("*")
        if path.is_file()
    )
    return sorted(name for name in found if name not in stated)


def _file_checks(bench: _Bench) -> list[Check]:
    different = {name: parts for name, parts in bench.parts.items() if parts}
    absent = [name for name in bench.parts if bench.state(name) == "absent"]
    places = "; ".join(f"{name}: {listed(parts)}" for name, parts in different.items())
    checks = [
        judge(
            "statement.files",
            len(different),
            0,
            detail=f"{len(bench.here)} of {len(bench.stated)} stated files are here; different: "
            f"{places or 'none'}.",
        ),
        judge(
            "statement.strangers",
            len(bench.strangers),
            0,
            detail="Files in the model directory that the statement does not name: "
            f"{listed(bench.strangers)}.",
        ),
    ]
    if absent:
        checks.append(skipped("statement.absent", f"Not here, not checked: {listed(absent)}."))
    return checks


def _origin(bench: _Bench) -> list[Check]:
    """A statement that leads back to no base says so, whatever else passes."""
    if not bench.unmade:
        return []
    names = listed(sorted(bench.unmade))
    reason = f"It leads back to {names}, and says nothing of how that was made: to no base."
    return [skipped("statement.origin", reason)]


def _stated_verdicts(statement: Statement) -> Check:
    failed = [
        link.name for link in statement.predicate.links if Verdict(link.verdict) is Verdict.FAIL
    ]
    return judge(
        "statement.verdicts",
        len(failed),
        0,
        detail=f"Links whose own checks failed when they were made: {listed(failed)}.",
    )


def _link_check(name: str, outcome: Outcome) -> Check:
    text = f"{outcome.found}: {outcome.text}"
    if outcome.found in (Likeness.WITHIN_ROUNDING, Likeness.NOT_CHECKED):
        return skipped("derivation.link", text, subject=name)
    return judge("derivation.link", outcome.differing, 0, subject=name, detail=text)


def _options(missing: Sequence[str]) -> str:
    options = [f"--{name}" for name in (BASE, ROTATIONS, *WEIGHING) if name in missing]
    if any(map(is_adapter, missing)):
        options.append("--adapter, in their order")
    return f" (give {' and '.join(options)})" if options else ""
