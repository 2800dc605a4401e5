"""A quantized file is a function of named inputs: its recipe is run again and the result compared.

The record of ``quantize`` holds the digests of the input, of the importance matrix or the second
moments, and of each output tensor, the options, and the build of libllama. One build gives the same
bytes each time, so there any difference is a difference. Another build or CPU may round a few
blocks otherwise: a tensor then counts as *within rounding* if its bytes are the recorded ones and
each block that differs lies about as near to the unquantized weights as the one made here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from so8tqc.closure import versions_of
from so8tqc.config import VerifyConfig
from so8tqc.disk.digests import file_ref
from so8tqc.errors import InputError
from so8tqc.gguf.file import open_gguf
from so8tqc.llama.build import library_build
from so8tqc.progress import SILENT, Progress
from so8tqc.record_files import read_record
from so8tqc.record_kinds.attest import ComparedTensor, Likeness, VerifyMetrics
from so8tqc.record_kinds.quantize import Build, QuantizeMetrics
from so8tqc.records import (
    Check,
    FileRef,
    Record,
    Stopwatch,
    judge,
    overall,
    skipped,
)
from so8tqc.services.attest.requantize import (
    compare_tensors,
    make_again,
    other_keys,
)
from so8tqc.services.quantize.derivation import tensor_digests
from so8tqc.wording import listed


def verify(config: VerifyConfig, progress: Progress = SILENT) -> Record:
    """Quantize again as the record says, in a temporary directory, and compare tensor by tensor.

    Record metrics: ``tensors`` (identical, within rounding, different → number), ``not_identical``
    (tensor → {link, blocks}), ``build`` ({recorded, here, same}).

    Raises:
        InputError: there is no record of the file, or an input is missing.
        MissingToolError: no libllama.
        ToolError: libllama failed, or the temporary directory has no room.
    """
    watch = Stopwatch()
    file = open_gguf(config.file)
    record_path = config.record or config.file.parent / "record.json"
    recorded = _recorded(record_path, config.file.name)
    inputs = _inputs(recorded, config)
    here, digests = library_build(), tensor_digests(file)
    places = {kind: Path(reference.path) for kind, reference in inputs.items()}
    with tempfile.TemporaryDirectory(prefix="so8tqc-") as scratch:
        made = open_gguf(
            make_again(recorded.type, recorded.options, places, Path(scratch), progress)
        )
        same_build = here == recorded.build
        source = open_gguf(places["gguf"])
        found = compare_tensors(file, digests, made, source, recorded.tensors, same_build)
        keys = other_keys(config.file, made.path)
    checks = [
        _inputs_check(recorded, inputs),
        _record_check(recorded, digests),
        *_tensor_checks(found, len(file.tensors | made.tensors), same_build),
        judge(
            "derivation.metadata",
            len(keys),
            0,
            detail=f"Key-values that differ from those of the file made again: {listed(keys)}.",
        ),
    ]
    links = [tensor["link"] for tensor in found.values()]
    return Record(
        kind="verify",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=VerifyMetrics(
            tensors={
                Likeness.IDENTICAL: len(file.tensors | made.tensors) - len(links),
                **{
                    link: links.count(link)
                    for link in (Likeness.WITHIN_ROUNDING, Likeness.DIFFERENT)
                },
            },
            not_identical=found,
            build={"recorded": recorded.build, "here": here, "same": same_build},
        ).as_json(),
        inputs={"file": file_ref(config.file), "record": file_ref(record_path), **inputs},
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )


_INPUTS = ("gguf", "imatrix", "hessians")


@dataclass(frozen=True)
class _Recorded:
    """What a record of ``quantize`` says of one file.

    Attributes:
        type: the recipe, e.g. ``Q5_K_M``.
        options: of ``quantize``.
        inputs: ``gguf`` and, if there were such, ``imatrix`` and ``hessians``.
        tensors: tensor → SHA-256.
        build: of libllama.
    """

    type: str
    options: Mapping[str, Any]
    inputs: Mapping[str, FileRef]
    tensors: Mapping[str, str]
    build: Build


def _recorded(path: Path, name: str) -> _Recorded:
    record = read_record(path)
    if record.kind != "quantize":
        raise InputError(
            f"a record of {record.kind}, not of quantize",
            where=str(path),
            remedy="Give the one that quantize wrote (--record).",
        )
    try:
        found = QuantizeMetrics.of(record)
    except ValidationError:
        found = None
    derived = found.derivation if found else None
    if found is None or derived is None:
        raise InputError(
            "the record holds no digests of tensors",
            where=str(path),
            remedy="It is of an earlier version; quantize again.",
        )
    if name not in derived.tensors:
        raise InputError(
            f"the record knows no file {name}",
            where=str(path),
            remedy=f"It knows {', '.join(derived.tensors)}.",
        )
    references = {**record.outputs, **record.inputs}  # a matrix may have been computed on the way
    return _Recorded(
        type=str(found.files[name].type),
        options={**record.config, **found.files[name].options},
        inputs={kind: references[kind] for kind in _INPUTS if kind in references},
        tensors=derived.tensors[name],
        build=derived.build,
    )


def _inputs(recorded: _Recorded, config: VerifyConfig) -> dict[str, FileRef]:
    """The inputs as they are now, with their digests."""
    given = {"gguf": config.input, "imatrix": config.imatrix, "hessians": config.hessians}
    found = {}
    for kind, reference in recorded.inputs.items():
        path = given[kind] or Path(reference.path)
        if not path.is_file():
            raise InputError(
                f"the {kind} that the file was made from is not here",
                where=str(path),
                remedy=f"Give its place with --{'input' if kind == 'gguf' else kind}.",
            )
        found[kind] = file_ref(path)
    return found


def _inputs_check(recorded: _Recorded, inputs: Mapping[str, FileRef]) -> Check:
    other = [kind for kind, ref in inputs.items() if ref.sha256 != recorded.inputs[kind].sha256]
    return judge(
        "derivation.inputs",
        len(other),
        0,
        detail=f"Inputs that are not those of the record, by SHA-256: {listed(other)}.",
    )


def _record_check(recorded: _Recorded, digests: Mapping[str, str]) -> Check:
    names = digests.keys() | recorded.tensors.keys()
    other = sorted(name for name in names if digests.get(name) != recorded.tensors.get(name))
    return judge(
        "derivation.record",
        len(other),
        0,
        detail=f"Tensors whose bytes are not those that quantize recorded: {listed(other)}.",
    )


def _tensor_checks(
    found: Mapping[str, ComparedTensor], total: int, same_build: bool
) -> list[Check]:
    different = [n for n, tensor in found.items() if tensor["link"] is Likeness.DIFFERENT]
    near = [n for n, tensor in found.items() if tensor["link"] is Likeness.WITHIN_ROUNDING]
    build = "the same build of libllama" if same_build else "another build of libllama, or CPU"
    shown = [f"{name}{_blocks(found[name])}" for name in different]
    checks = [
        judge(
            "derivation.tensors",
            len(different),
            0,
            detail=f"{total - len(found)} of {total} tensors are identical when made again with "
            f"{build}; different: {listed(shown)}.",
        )
    ]
    if near:
        blocks = sum(found[name]["blocks"] or 0 for name in near)
        checks.append(
            skipped(
                "derivation.identical",
                f"Within rounding, not identical: {blocks} blocks of {len(near)} tensors "
                f"({listed(near)}). Only the recorded build shows whether it made these bytes.",
            )
        )
    return checks


def _blocks(tensor: ComparedTensor) -> str:
    count = tensor["blocks"]
    if count is None:
        return " (missing, added, or of another type or shape)"
    return f" ({count} block{'' if count == 1 else 's'})"
