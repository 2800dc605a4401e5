"""What single commands made, laid out as a run: a statement needs no run directory.

The records lie beside the outputs, wherever these are. They are followed back (``chain``), and
what is found is laid out in a scratch directory, by links, as ``run`` would have written it; so
the makers of links know one layout. Where the way back ends at a GGUF file of which nothing says
how it was made, that file is an input from outside, and the statement says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from so8tqc.disk.digests import file_ref
from so8tqc.errors import InputError
from so8tqc.record_kinds.quantize import QuantizeMetrics
from so8tqc.records import Record
from so8tqc.services.attest.chain import Chain, Step, follow, located


@dataclass(frozen=True)
class Layout:
    """A scratch directory that looks like a run's.

    Attributes:
        directory: of it.
        records: stage → record, in the order in which they were made.
        outside: what the first step was made from, if nothing says how that was made.
        end: a sentence, where the way back ends before a base; "" if it does not.
    """

    directory: Path
    records: Mapping[str, Record]
    outside: Path | None
    end: str


@contextmanager
def laid_out(path: Path) -> Iterator[Layout]:
    """The way back from a file or baked directory, as a run directory for as long as it is used.

    Raises:
        InputError: nothing beside it says how it was made; or it is not what its record says.
    """
    chain = follow(path)
    steps = _usable(chain, path)
    with TemporaryDirectory(prefix="so8tqc-") as scratch:
        directory = Path(scratch)
        records = {}
        for step in reversed(steps):
            records[step.kind] = _place(step, directory)
        first = steps[-1]
        outside = None
        if first.kind != "bake":
            outside = Path(first.record.inputs["gguf"].path)
        yield Layout(directory, records, outside, chain.end if outside is not None else "")


def _usable(chain: Chain, path: Path) -> tuple[Step, ...]:
    """The steps, newest first, back to a bake, or else to a file that is quantized."""
    kinds = [step.kind for step in chain.steps]
    if not kinds:
        raise InputError(
            "no record beside it says how it was made",
            where=str(path),
            remedy="Give a run directory, or what bake, export or quantize wrote, with its record.",
        )
    for step in chain.steps:
        _require_as_recorded(step)
    if "bake" in kinds:
        return chain.steps
    if kinds[0] != "quantize":
        raise InputError(
            f"so it leads back to no base. {chain.end}",
            where=str(path),
            remedy="Put what it was made from, with its record, where it was.",
        )
    return chain.steps[:1]


def _require_as_recorded(step: Step) -> None:
    if step.kind == "bake":  # whose every tensor is looked at when it is made again
        return
    named = [ref for ref in step.record.outputs.values() if Path(ref.path).name == step.output.name]
    if file_ref(step.output).sha256 != named[0].sha256:
        raise InputError(
            f"not the file that {step.kind} recorded",
            where=str(step.output),
            remedy=f"Make it again; the record is {step.path}.",
        )


def _place(step: Step, directory: Path) -> Record:
    """Link a step's output, and its record, where a run has them; of several files the one."""
    folder = directory / step.kind
    folder.mkdir()
    outputs = [step.output]
    if step.kind == "calibrate":  # whose link names its temperature, too
        places = (located(Path(ref.path), step.path) for ref in step.record.outputs.values())
        outputs = [place for place in places if place is not None]
    for output in outputs:
        (folder / output.name).symlink_to(output.resolve())
    (folder / "record.json").symlink_to(step.path.resolve())
    if step.kind != "quantize":
        return step.record
    metrics = QuantizeMetrics.of(step.record)
    if metrics.derivation is None:
        return step.record
    names = {step.output.name}
    tensors = {n: t for n, t in metrics.derivation.tensors.items() if n in names}
    derivation = metrics.derivation.model_copy(update={"tensors": tensors})
    update = {"metrics": metrics.model_copy(update={"derivation": derivation}).as_json()}
    return step.record.model_copy(update=update)
