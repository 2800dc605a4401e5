"""Attest: from the records of a run to one statement about the files that ship."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue

from so8tqc.checkpoints.provenance import PROVENANCE_NAME, Provenance, read_provenance
from so8tqc.closure import versions_of
from so8tqc.config import AttestConfig
from so8tqc.disk.digests import file_ref
from so8tqc.errors import InputError
from so8tqc.progress import SILENT, Progress
from so8tqc.record_files import read_record
from so8tqc.record_kinds.attest import AttestMetrics
from so8tqc.record_kinds.calibrate import CalibrateMetrics
from so8tqc.record_kinds.export import ExportMetrics
from so8tqc.record_kinds.qc import QCMetrics
from so8tqc.record_kinds.quantize import QuantizeMetrics
from so8tqc.records import Check, Record, Stopwatch, Verdict, judge, overall, versions
from so8tqc.services.attest.loose import laid_out
from so8tqc.services.attest.recheck import recheck
from so8tqc.services.attest.remake import TEMPERATURE_KEYS
from so8tqc.services.attest.statement import (
    BASE,
    OUTSIDE,
    STATEMENT_NAME,
    WEIGHING,
    Digest,
    Link,
    Resource,
    Statement,
    applied_inputs,
    seal,
    write_statement,
)
from so8tqc.services.attest.stored import resource

_STAGES = ("bake", "export", "quantize", "calibrate")
_PLACES = frozenset(
    {
        "base",
        "rotations",
        "adapters",
        "out",
        "gguf",
        "model",
        "llama_cpp",
        "vendor",
        "imatrix",
        "imatrix_data",
        "hessians",
        "hessian_data",
        "hessian_tokens",
        "threads",
    }
)
"""Options of a stage that do not determine its result: where things are, how many threads."""


def attest(config: AttestConfig, progress: Progress = SILENT) -> Record:
    """Write a statement about files and how each was made: of a run, or of what commands made.

    Of a run directory every file is hashed first and must be as the manifest says. Of a baked
    directory or a GGUF file the records beside it are followed back (``chain``); where they lead to
    no bake, the statement begins with the file that was quantized, and a notice says so.

    Record metrics: ``links`` (name → {kind, inputs, outputs: numbers of files}), ``subjects``
    (name → SHA-256).

    Raises:
        InputError: no run directory, no stage that makes something, or a file was changed.
    """
    watch = Stopwatch()
    directory = config.directory
    if directory.is_file() or (directory / PROVENANCE_NAME).is_file():
        beside = directory.with_name(f"{directory.name}.{STATEMENT_NAME}")
        with laid_out(directory) as layout:
            found = Found(layout.directory, layout.records, layout.outside)
            record = _stated(config, found, config.out or beside, watch, progress)
        ends = (f"{layout.end} The statement begins there.",) if layout.end else ()
        return record.model_copy(update={"notices": ends})
    checked = recheck(directory, progress)
    if checked.verdict is Verdict.FAIL:
        wrong = next(check for check in checked.checks if check.failed)
        raise InputError(
            wrong.detail, where=str(directory), remedy="Run it again: so8tqc run CONFIG."
        )
    found = Found(directory, _records(directory))
    record = _stated(config, found, config.out or directory / STATEMENT_NAME, watch, progress)
    return record.model_copy(update={"notices": _kept_numbers(directory)})


class Found(NamedTuple):
    """A run's directory, or what is laid out as one; stage → record; see ``loose.Layout``."""

    directory: Path
    records: Mapping[str, Record]
    outside: Path | None = None


def statement_of(found: Found, progress: Progress) -> Statement:
    """The statement about what the stages made."""
    with progress.task("hashing tensors", total=len(found.records), unit="stages") as task:
        links: list[Link] = []
        for stage, record in found.records.items():
            links += _MAKERS[stage](found.directory, record, links)
            task.advance(1, item=stage)
    if found.outside is not None:
        links = [_from_outside(link, found.outside, found.records[link.kind]) for link in links]
    records = _record_files(found.directory)
    return seal(tuple(links), records, versions("torch", "llama-cpp-python"))


def _from_outside(link: Link, source: Path, record: Record) -> Link:
    """A link that quantizes a file of which nothing says how it was made."""
    entry = _external(source.name, record.inputs["gguf"].sha256)
    parameters: dict[str, JsonValue] = {**link.parameters, OUTSIDE: [source.name]}
    return link.model_copy(update={"inputs": (entry, *link.inputs), "parameters": parameters})


def _stated(
    config: AttestConfig, found: Found, path: Path, watch: Stopwatch, progress: Progress
) -> Record:
    """Write the statement; its record."""
    statement = statement_of(found, progress)
    links = statement.predicate.links
    write_statement(path, statement)
    checks = [_verdicts(found.records)]
    return Record(
        kind="attest",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=AttestMetrics(
            links={
                link.name: {
                    "kind": link.kind,
                    "inputs": len(link.inputs),
                    "outputs": len(link.outputs),
                }
                for link in links
            },
            subjects={entry.name: entry.digest.sha256 for entry in statement.subject},
        ).as_json(),
        outputs={"statement": file_ref(path)},
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )


def _records(directory: Path) -> dict[str, Record]:
    paths = {stage: directory / stage / "record.json" for stage in _STAGES}
    records = {stage: read_record(path) for stage, path in paths.items() if path.is_file()}
    if "bake" not in records:
        raise InputError(
            "the run has baked nothing, so its files lead back to nothing", where=str(directory)
        )
    return records


def _record_files(directory: Path) -> tuple[Resource, ...]:
    """Every stage's record, those of qc and longtext included."""
    return tuple(
        resource(path, path.relative_to(directory).as_posix())
        for path in sorted(directory.glob("*/record.json"))
        if path.parent.name != "report"
    )


def _kept_numbers(directory: Path) -> tuple[str, ...]:
    """Says that numbers of the qc, whose record the statement seals, are of earlier calls."""
    path = directory / "qc" / "record.json"
    kept = QCMetrics.of(read_record(path)).kept if path.is_file() else {}
    if not kept:
        return ()
    return (
        f"{len(kept)} comparisons in qc/record.json were computed by earlier calls and kept (the "
        f"oldest at {min(kept.values())}). With qc.evaluation_cache: false in the run file all "
        "models are run again.",
    )


def _verdicts(records: Mapping[str, Record]) -> Check:
    failed = [stage for stage, record in records.items() if record.verdict is Verdict.FAIL]
    return judge(
        "attest.verdicts",
        len(failed),
        0,
        detail="Stages whose own checks failed, as the statement says: "
        + (", ".join(failed) or "none")
        + ".",
    )


def _bake(directory: Path, record: Record, _: list[Link]) -> list[Link]:
    model = _in(directory, "bake", record.outputs["baked_model"].path)
    provenance = read_provenance(model)
    if provenance is None or provenance.base_fingerprint is None:
        raise InputError(
            "the bake did not read all of its base, so the statement could not name it",
            where=str(model),
            remedy="Bake again without --no-verify.",
        )
    files = sorted(path for path in model.rglob("*") if path.is_file())
    given = record.config.get("rotations") is not None
    applied = applied_inputs(provenance, rotations_given=given)
    return [
        Link(
            name="bake",
            kind="bake",
            inputs=(
                _external(BASE, provenance.base_fingerprint),
                *(_external(name, digest) for name, digest in applied.items()),
            ),
            outputs=tuple(resource(f, f.relative_to(directory).as_posix()) for f in files),
            parameters={
                "options": _options(record),
                "model": model.relative_to(directory).as_posix(),
                "said": _said(provenance),
            },
            verdict=record.verdict.value,
        )
    ]


def _said(provenance: Provenance) -> dict[str, JsonValue]:
    """What the baked directory says of its making that does not follow from its inputs."""
    content: dict[str, JsonValue] = provenance.model_dump(
        mode="json", include={"base", "rotations", "versions"}
    )
    if provenance.adapters:
        content["adapters"] = [adapter.path for adapter in provenance.adapters]
    return content


def _export(directory: Path, record: Record, links: list[Link]) -> list[Link]:
    paths = [_in(directory, "export", ref.path) for ref in record.outputs.values()]  # text first
    return [
        Link(
            name="export",
            kind="export",
            inputs=tuple(_bare(entry) for entry in links[0].outputs),
            outputs=tuple(resource(p, p.relative_to(directory).as_posix()) for p in paths),
            parameters={
                "options": _options(record),
                "converter": ExportMetrics.of(record).converter,
                "model": links[0].parameters["model"],
            },
            verdict=record.verdict.value,
        )
    ]


def _quantize(directory: Path, record: Record, links: list[Link]) -> list[Link]:
    found = QuantizeMetrics.of(record)
    if found.derivation is None:
        raise InputError(
            "the record of quantize holds no digests of tensors",
            where=str(directory / "quantize" / "record.json"),
            remedy="It is of an earlier version; quantize again.",
        )
    derived, files = found.derivation, found.files
    inputs = tuple(_bare(link.outputs[0]) for link in links if link.kind == "export")
    references = {**record.inputs, **record.outputs}
    inputs += tuple(_external(n, references[n].sha256) for n in WEIGHING if n in references)
    made = []
    for name in derived.tensors:
        path = directory / "quantize" / name
        made.append(
            Link(
                name=f"quantize {files[name].type}",
                kind="quantize",
                inputs=inputs,
                outputs=(resource(path, path.relative_to(directory).as_posix()),),
                parameters={
                    "options": {**_options(record), **files[name].options},
                    "build": derived.build.model_dump(mode="json"),
                },
                verdict=record.verdict.value,
            )
        )
    return made


def _calibrate(directory: Path, record: Record, links: list[Link]) -> list[Link]:
    digest = record.inputs["gguf"].sha256
    sources = [o for link in links for o in link.outputs if o.digest.sha256 == digest]
    if not sources:
        raise InputError(
            "the temperature was fitted on a file that this run did not make",
            where=str(directory / "calibrate" / "record.json"),
        )
    names = [key for key in ("temperature_config", "calibrated") if key in record.outputs]
    paths = [_in(directory, "calibrate", record.outputs[name].path) for name in names]
    return [
        Link(
            name="calibrate",
            kind="calibrate",
            inputs=(_bare(sources[0]),),
            outputs=tuple(resource(p, p.relative_to(directory).as_posix()) for p in paths),
            parameters={
                "temperature": CalibrateMetrics.of(record).temperature,
                **{key: record.config[key] for key in TEMPERATURE_KEYS},
            },
            verdict=record.verdict.value,
        )
    ]


_MAKERS = {"bake": _bake, "export": _export, "quantize": _quantize, "calibrate": _calibrate}


def _options(record: Record) -> dict[str, JsonValue]:
    return {key: value for key, value in record.config.items() if key not in _PLACES}


def _in(directory: Path, stage: str, path: str) -> Path:
    """The file of a stage in the directory as it is now, whatever it was called then."""
    return directory / stage / Path(path).name


def _external(name: str, digest: str) -> Resource:
    return Resource(name=name, digest=Digest(sha256=digest))


def _bare(entry: Resource) -> Resource:
    return Resource(name=entry.name, digest=entry.digest)
