"""Two things: which is the reference is recognised, and the other is judged by it."""

from __future__ import annotations

from pathlib import Path

from so8tqc.checkpoints.provenance import Provenance, read_provenance
from so8tqc.config import CheckConfig
from so8tqc.gguf.file import GGUFFile
from so8tqc.progress import Progress
from so8tqc.services.attest.chain import follow, located
from so8tqc.services.check.deeper import judge_by_qc, level_for, rotation_options
from so8tqc.services.check.judged import Judged, named, told
from so8tqc.services.check.recognise import Kind, Thing
from so8tqc.services.quantize.proof import PLAIN_TYPES

_RUNNABLE = (Kind.GGUF, Kind.MODEL)
_TRAINED = (Kind.GATES, Kind.ADAPTER)


def judge_pair(first: Thing, second: Thing, config: CheckConfig, progress: Progress) -> Judged:
    """Judge one of two things by the other.

    A capture is a reference; a model directory is one of a GGUF file; what another's record or
    ``so8tqc.json`` names is the other's; of two GGUF files the finer one is. Where nothing tells,
    the first is.
    """
    for thing in (first, second):
        if thing.problem:
            what = f"{named(thing.path)}: {thing.what}"
            return Judged(what, problem=thing.problem, next=told("check", thing.path))
    kinds = {first.kind, second.kind}
    if kinds & set(_TRAINED) and Kind.MODEL in kinds:
        return _base_and_trained(first, second, progress)
    if not kinds <= {*_RUNNABLE, Kind.CAPTURE} or kinds == {Kind.CAPTURE}:
        odd = first if first.kind not in _RUNNABLE else second
        what = f"{named(first.path)}: {first.what}; {named(second.path)}: {second.what}"
        problem = f"{named(odd.path)} is not a model, so the two cannot be compared"
        return Judged(what, problem=problem, next=told("check", odd.path))
    reference, candidate, why = _roles(first, second)
    return _by_qc(reference, candidate, why, config, progress)


def _roles(first: Thing, second: Thing) -> tuple[Thing, Thing, str]:
    """Reference, candidate, and by what that was recognised."""
    pair = (first, second)
    for reference, candidate in (pair, pair[::-1]):
        if reference.kind is Kind.CAPTURE:
            return reference, candidate, "recorded logits are a reference"
    for reference, candidate in (pair, pair[::-1]):
        if _names(candidate, reference):
            return reference, candidate, f"the record of {named(candidate.path)} names it"
    for reference, candidate in (pair, pair[::-1]):
        if reference.kind is Kind.MODEL and candidate.kind is Kind.GGUF:
            return reference, candidate, "a GGUF file is made from a model directory"
    for reference, candidate in (pair, pair[::-1]):
        baked = [_provenance(thing) is not None for thing in (reference, candidate)]
        if baked == [False, True]:
            return reference, candidate, f"{named(candidate.path)} was baked"
        if reference.gguf and candidate.gguf and _bits(reference.gguf) > _bits(candidate.gguf):
            return reference, candidate, "it is the finer of the two"
    return first, second, "it was given first"


def _names(candidate: Thing, reference: Thing) -> bool:
    """Whether the way back from one leads through the other."""
    chain = follow(candidate.path)
    places = {chain.base, chain.baked and chain.baked[0]}
    for step in chain.steps:
        places |= {located(Path(ref.path), step.path) for ref in step.record.inputs.values()}
    resolved = {place.resolve() for place in places if place is not None}
    return reference.path.resolve() in resolved


def _bits(gguf: GGUFFile) -> float:
    return gguf.bits_per_weight


def _provenance(thing: Thing) -> Provenance | None:
    return read_provenance(thing.path) if thing.kind is Kind.MODEL else None


def _by_qc(
    reference: Thing, candidate: Thing, why: str, config: CheckConfig, progress: Progress
) -> Judged:
    judged = Judged(
        f"{named(candidate.path)}: {candidate.what}, judged by {named(reference.path)} as the "
        f"reference ({why})"
    )
    chain = follow(candidate.path)
    rotations, adapters = config.rotations, chain.adapters
    said = chain.baked[1] if chain.baked else None
    at_the_base = _provenance(reference) is None and reference.kind is Kind.MODEL
    if rotations is None and at_the_base:
        rotations = chain.rotations
    if at_the_base and said is not None and rotations is None and not adapters:
        judged.unseen.append(f"what the gates should be: give --rotations. {chain.end}".strip())
    level, unrun = level_for(config, _weights(candidate))
    if rotations is None and not (adapters and at_the_base) and config.level == "auto":
        level, unrun = "full", ""  # nothing can be told of two models from their files alone
    judged.unseen += [unrun] if unrun else []
    judge_by_qc(
        judged,
        config,
        reference.path,
        candidate.path,
        progress,
        rotations=rotations if at_the_base else None,
        options=rotation_options(said, adapters) if at_the_base else None,
        level=level,
        tokenizer=config.tokenizer,
    )
    judged.next = _after(judged, reference, candidate, rotations if at_the_base else None)
    return judged


def _weights(thing: Thing) -> int:
    import math

    from so8tqc.checkpoints.safetensors_index import open_checkpoint
    from so8tqc.services.check.files import whole

    if thing.gguf is not None:
        return sum(tensor.elements for tensor in whole(thing.path).tensors.values())
    tensors = open_checkpoint(thing.path).tensors.values()
    return sum(math.prod(entry.shape) for entry in tensors)


def _after(judged: Judged, reference: Thing, candidate: Thing, rotations: Path | None) -> str:
    """The report that tells more; of what passed, what comes next."""
    gates = ("--rotations", rotations) if rotations is not None else ()
    if judged.failed or (candidate.gguf is not None and not _is_plain(candidate)):
        out = candidate.path.parent / "qc"
        return told(
            "qc", "--reference", reference.path, *gates, "--candidate", candidate.path, "--out", out
        )
    if candidate.gguf is not None:
        folder = candidate.path.parent / "quantized"
        return told("quantize", candidate.path, "--type", "Q5_K_M", "--out", folder)
    gguf = candidate.path.with_name(f"{candidate.path.name}-F16.gguf")
    return told("export", candidate.path, "--out", gguf)


def _is_plain(thing: Thing) -> bool:
    return thing.gguf is not None and set(thing.gguf.types) <= PLAIN_TYPES


def _base_and_trained(first: Thing, second: Thing, progress: Progress) -> Judged:
    """Base and gates, or an adapter: whether they fit, by what a bake would do."""
    import tempfile

    from so8tqc.config import BakeConfig
    from so8tqc.services.bake import plan
    from so8tqc.services.check.trained import judge_adapter, judge_gates

    base, trained = (first, second) if first.kind is Kind.MODEL else (second, first)
    look = judge_adapter if trained.kind is Kind.ADAPTER else judge_gates
    judged = look(trained.path, base.path)
    judged.what += f"; for {named(base.path)}"
    if judged.next.split()[1:2] != ["bake"]:
        return judged
    with tempfile.TemporaryDirectory(prefix="so8tqc-") as scratch:
        asked = BakeConfig(base=base.path, rotations=trained.path, out=Path(scratch) / "baked")
        record = plan(asked, progress)
    judged.unseen = ["what they do to it: bake them"]
    judged.proved = judged.add(record.checks, f"a bake into {named(base.path)} would go through")
    judged.proved |= not judged.failed
    return judged
