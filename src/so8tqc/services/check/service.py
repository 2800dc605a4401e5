"""Check: one path, or two, in; what it is, whether to trust it, and what comes next, out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from so8tqc.checkpoints.provenance import Provenance, read_provenance
from so8tqc.checkpoints.quantized import quantization_name
from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.closure import versions_of
from so8tqc.config import CheckConfig
from so8tqc.errors import ExitCode, So8tqcError
from so8tqc.gguf.file import GGUFFile
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.check import CheckMetrics
from so8tqc.records import Record, Stopwatch, Verdict, overall
from so8tqc.services.attest.chain import Chain, follow
from so8tqc.services.check import files, models
from so8tqc.services.check.deeper import (
    judge_by_qc,
    judge_by_verify,
    level_for,
    rotation_options,
)
from so8tqc.services.check.judged import Judged, named, reading_flags, told
from so8tqc.services.check.nearby import baked_as, base_for
from so8tqc.services.check.others import OTHERS
from so8tqc.services.check.pairs import judge_pair
from so8tqc.services.check.recognise import Kind, Thing, recognise
from so8tqc.services.check.remade import make_again, source_of
from so8tqc.services.export.provenance import says_baked
from so8tqc.services.quantize.proof import PLAIN_TYPES
from so8tqc.wording import size


def check(config: CheckConfig, progress: Progress = SILENT) -> Record:
    """Say what something is, and judge it as deeply as what is here allows.

    Beside it are looked for: the record of its making, what that names (base, rotations, the file
    that was quantized), ``so8tqc.json``, a tokenizer. With two paths the second is judged by the
    first, or the first by the second: which is the reference is recognised.

    Record metrics: :class:`so8tqc.record_kinds.check.CheckMetrics`. ``readable`` is False, and the
    verdict a failure, of what cannot be read; the verdict is a skip where nothing was judged.

    Raises:
        So8tqcError: a service that judges fails for a reason of its own (a full disk, say).
    """
    watch = Stopwatch()
    thing = recognise(config.path)
    if config.other is None:
        judged = _judged(thing, config, progress)
    else:
        judged = judge_pair(thing, recognise(config.other), config, progress)
    return Record(
        kind="check",
        verdict=Verdict.FAIL if judged.problem else overall(judged.checks),
        checks=tuple(judged.checks),
        metrics=CheckMetrics(
            what=judged.what,
            trust=judged.trust(),
            proved=judged.proved and not judged.failed and not judged.problem,
            readable=not judged.problem,
            unseen=judged.unseen,
            next=judged.next,
            found=judged.found,
            serve=judged.serve or None,
        ).as_json(),
        diagnosis=tuple(judged.diagnosis),
        notices=tuple(dict.fromkeys(judged.notices)),
        inputs=judged.inputs,
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )


def _judged(thing: Thing, config: CheckConfig, progress: Progress) -> Judged:
    """One thing, by itself and by what lies beside it; what cannot be read is told as that."""
    look: Callable[[Thing, CheckConfig, Progress], Judged]
    if thing.kind is Kind.GGUF:
        look = _gguf
    elif thing.kind is Kind.MODEL:
        look = _model
    else:
        look = OTHERS[thing.kind]
    try:
        return look(thing, config, progress)
    except So8tqcError as error:
        if error.exit_code is not ExitCode.BAD_INPUT:  # a missing tool is no fault of a file
            raise
        what = f"{named(thing.path)}: {thing.what}"
        return Judged(what, problem=str(error), next=told("check", thing.path.absolute().parent))


def _gguf(thing: Thing, config: CheckConfig, progress: Progress) -> Judged:
    gguf = files.whole(thing.path)
    path = gguf.path
    judged = Judged(_what_gguf(thing, gguf))
    judged.add([files.finite_check(gguf)], "all of its tensors are whole and finite")
    chain = _told(follow(path), gguf, path, config)
    judged.found |= _found(chain)
    made = chain.steps[0] if chain.steps else None
    if made is not None:
        judged.add(
            [files.recorded_check(gguf, made)], f"its bytes are those that {made.kind} recorded"
        )
        _add_verdicts(judged, chain)
    tokenizer = config.tokenizer or _tokenizer(chain)
    if tokenizer is not None and (tokens := files.token_check(path, tokenizer)) is not None:
        judged.add([tokens])
    weights = sum(tensor.elements for tensor in gguf.tensors.values())
    level, why = level_for(config, weights)
    if chain.base is not None and (chain.rotations is not None or chain.adapters):
        judge_by_qc(
            judged,
            config,
            chain.base,
            path,
            progress,
            rotations=_other_than(chain.base, chain.rotations),
            options=rotation_options(chain.baked and chain.baked[1], chain.adapters),
            level=level if not judged.failed else "files",
            tokenizer=tokenizer,
        )
    else:
        why = ""
        _tell_what_is_missing(judged, chain, gguf, path)
    judged.unseen += [why] if why else []
    if made is not None and made.kind == "quantize" and level == "full" and not judged.failed:
        source = source_of(chain)
        if source is not None:
            judge_by_verify(judged, path, made.path, source, progress)
    judged.next = _after_gguf(judged, gguf, chain, path, config)
    if judged.proved and not judged.failed:
        judged.serve = told("serve-config", path, "--for", "llama-server")
    return judged


def _what_gguf(thing: Thing, gguf: GGUFFile) -> str:
    kind = gguf.file_type or "/".join(list(gguf.types)[:2])
    baked = ", baked" if says_baked(gguf.fields) else ""
    parts = f", in {len(gguf.parts)} files" if len(gguf.parts) > 1 else ""
    stored = size(gguf.size)
    other = "" if thing.path == gguf.path else f" (of which {thing.path.name} is a part)"
    return (
        f"{gguf.path.name}: a GGUF model, {gguf.architecture or 'of no architecture'}, {kind}, "
        f"{stored}{parts}{baked}{other}"
    )


def _told(chain: Chain, gguf: GGUFFile, path: Path, config: CheckConfig) -> Chain:
    """The chain with what the user gives, and with what the file's own keys point to."""
    import dataclasses

    if chain.baked is None and (found := baked_as(gguf, path)) is not None:
        further = follow(found[0])
        chain = dataclasses.replace(
            further, steps=(*chain.steps, *further.steps), baked=found, end=further.end
        )
    if config.base is not None:
        chain = dataclasses.replace(chain, base=config.base)
    if config.rotations is not None:
        chain = dataclasses.replace(chain, rotations=config.rotations)
    return chain


def _found(chain: Chain) -> dict[str, str]:
    found = {f"record of {step.kind}": str(step.path) for step in chain.steps}
    places = {
        "base": chain.base,
        "rotations": chain.rotations,
        "baked": chain.baked and chain.baked[0],
    }
    return found | {name: str(path) for name, path in places.items() if path}


def _add_verdicts(judged: Judged, chain: Chain) -> None:
    """``file.verdicts``: commands on the way whose own checks failed."""
    from so8tqc.records import judge

    failed = [step.kind for step in chain.steps if step.record.verdict is Verdict.FAIL]
    detail = f"Commands whose own checks failed when it was made: {', '.join(failed) or 'none'}."
    judged.add([judge("file.verdicts", len(failed), 0, detail=detail)])


def _tokenizer(chain: Chain) -> Path | None:
    """A directory on the way that brings a tokenizer."""
    places = (chain.baked and chain.baked[0], chain.base, _exported_from(chain))
    return next((p for p in places if p is not None and models.has_tokenizer(p)), None)


def _exported_from(chain: Chain) -> Path | None:
    step = chain.step("export")
    path = Path(step.record.inputs["model"].path) if step else None
    return path if path is not None and path.is_dir() else None


def _other_than(base: Path, rotations: Path | None) -> Path | None:
    """No rotations of their own where the base holds the gates itself."""
    same = rotations is not None and rotations.resolve() == base.resolve()
    return None if same else rotations


def _tell_what_is_missing(judged: Judged, chain: Chain, gguf: GGUFFile, path: Path) -> None:
    if chain.end:
        judged.unseen.append(f"what it should be. {chain.end}")
    if not says_baked(gguf.fields):
        judged.unseen.append("whether gates were folded in: no key so8t.baked says so")
    at = base_for(path, None) or "BASE"
    judged.unseen.append(f"its logits and weights beside a model's: {told('check', at, path)}")


def _after_gguf(
    judged: Judged, gguf: GGUFFile, chain: Chain, path: Path, config: CheckConfig
) -> str:
    """What comes next for a GGUF file."""
    if judged.failed:
        return make_again(chain, path) or told("check", base_for(path, config.base) or "BASE", path)
    plain = set(gguf.types) <= PLAIN_TYPES
    out = path.parent
    if plain:
        return told("quantize", path, "--type", "Q5_K_M", "--out", out / "quantized")
    tokenizer = config.tokenizer or _tokenizer(chain)
    if "so8t.calibration.temperature" not in gguf.fields and tokenizer is not None:
        return told("calibrate", path, "--tokenizer", tokenizer, "--out", out / "calibrate")
    if chain.steps:
        return told("attest", path)
    return told("check", base_for(path, config.base) or "BASE", path)


def _model(thing: Thing, config: CheckConfig, progress: Progress) -> Judged:
    from so8tqc.services.trained_base import is_trained_directory

    path = thing.path
    checkpoint = open_checkpoint(path)
    judged = Judged(_what_model(checkpoint))
    judged.add([models.finite_check(checkpoint)], "all of its tensors are whole and finite")
    if not models.has_tokenizer(path):
        judged.unseen.append("its tokenizer: it brings none (copy the base's files into it)")
    if (method := quantization_name(checkpoint.config)) is not None:
        judged.what += f", quantized by {method}"
        judged.unseen.append("what it is worth: quantized directories are not read (give its base)")
        judged.next = told("check", path, "GGUF")
        return judged
    provenance = read_provenance(path)
    if provenance is not None:
        return _baked(judged, checkpoint, provenance, config, progress)
    if is_trained_directory(path):
        return _trained(judged, path)
    judged.unseen.append("whether gates were folded into it: no so8tqc.json says so")
    judged.next = told("export", path, "--out", path.with_name(f"{path.name}-F16.gguf"))
    return judged


def _what_model(checkpoint: Checkpoint) -> str:
    dtypes = ", ".join(sorted({entry.dtype for entry in checkpoint.tensors.values()}))
    return (
        f"{named(checkpoint.directory)}: a model directory, {checkpoint.model_type}, {dtypes}, "
        f"{len(checkpoint.tensors)} tensors, {size(checkpoint.bytes)}"
    )


def _trained(judged: Judged, path: Path) -> Judged:
    """Base and gates in one."""
    from so8tqc.services.check.trained import judge_gates

    gates = judge_gates(path, path)
    judged.what += f", with {gates.what.partition(': ')[2]} in it"
    judged.checks += gates.checks
    judged.proofs += gates.proofs
    judged.unseen += gates.unseen
    known = gates.next.split()[1:2] == ["bake"]
    judged.next = told("bake", path, "--out", path.with_name("baked")) if known else gates.next
    return judged


def _baked(
    judged: Judged,
    checkpoint: Checkpoint,
    provenance: Provenance,
    config: CheckConfig,
    progress: Progress,
) -> Judged:
    """A baked directory: as it was written, and beside its base and rotations."""
    import dataclasses

    path = checkpoint.directory
    judged.what += f", baked ({len(provenance.tensors)} tensors)"
    same = models.recorded_check(checkpoint, provenance, progress)
    judged.add([same], "its baked tensors are those that the bake recorded")
    chain = follow(path)
    if config.base is not None:
        chain = dataclasses.replace(chain, base=config.base, end="")
    if config.rotations is not None:
        chain = dataclasses.replace(chain, rotations=config.rotations, end="")
    judged.found |= _found(chain)
    if chain.steps:
        _add_verdicts(judged, chain)
    if chain.base is not None and (chain.rotations is not None or chain.adapters):
        _beside_its_base(judged, chain, path, config, progress, checkpoint)
    else:
        judged.unseen.append(f"whether it is the fold of its base. {chain.end}")
        judged.unseen.append("more with: " + told("check", path, "BASE", "--rotations", "GATES"))
    judged.next = _after_model(judged, chain, provenance, path)
    return judged


def _beside_its_base(
    judged: Judged,
    chain: Chain,
    path: Path,
    config: CheckConfig,
    progress: Progress,
    checkpoint: Checkpoint,
) -> None:
    import math

    assert chain.base is not None  # the caller's condition
    assert chain.baked is not None  # as the directory has a so8tqc.json
    weights = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    level, why = level_for(config, weights)
    judged.unseen += [why] if why else []
    judge_by_qc(
        judged,
        config,
        chain.base,
        path,
        progress,
        rotations=_other_than(chain.base, chain.rotations),
        options=rotation_options(chain.baked[1], chain.adapters),
        level=level if not judged.failed else "files",
        tokenizer=config.tokenizer,
    )


def _after_model(judged: Judged, chain: Chain, provenance: Provenance, path: Path) -> str:
    if not judged.failed:
        return told("export", path, "--out", path.with_name(f"{path.name}-F16.gguf"))
    base = chain.base or provenance.base
    words = provenance.model_dump(mode="json")
    rotations: list[object] = [chain.rotations or provenance.rotations]
    for adapter in provenance.adapters[0 if provenance.convention is not None else 1 :]:
        rotations += ["--adapter", adapter.path]
    again = path.with_name(f"{path.name}-again")
    return told("bake", base, *rotations, "--out", again, *reading_flags(words))
