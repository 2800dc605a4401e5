"""Everything that is no model: judged where something can be, else told apart and pointed on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from so8tqc.config import CheckConfig, VerifyConfig
from so8tqc.disk.digests import file_ref
from so8tqc.disk.foreign import read_whole
from so8tqc.progress import Progress
from so8tqc.record_files import read_record
from so8tqc.records import Record, Verdict, judge
from so8tqc.services.attest.chain import follow, located, made_by
from so8tqc.services.check import files
from so8tqc.services.check.judged import Judged, named, told
from so8tqc.services.check.nearby import base_for
from so8tqc.services.check.recognise import Kind, Thing
from so8tqc.wording import counted, listed

Judge = Callable[[Thing, CheckConfig, Progress], Judged]


def _refused(thing: Thing, problem: str, next_: str) -> Judged:
    return Judged(f"{named(thing.path)}: {thing.what}", problem=problem, next=next_)


def _nothing(thing: Thing, _: CheckConfig, __: Progress) -> Judged:
    """What is not here, or empty."""
    where = thing.path.parent if thing.kind is Kind.MISSING else thing.path
    return _refused(thing, thing.problem, f"ls {where}")


def _broken(thing: Thing, config: CheckConfig, _: Progress) -> Judged:
    """A GGUF file that is cut: how it was made says how to make it again."""
    from so8tqc.services.check.remade import make_again

    chain = follow(thing.path)
    base = config.base or chain.base or base_for(thing.path, None)
    again = make_again(chain, thing.path) or told("export", base or "MODEL", "--out", thing.path)
    judged = _refused(thing, f"{thing.problem}. Copy it again, or make it again", again)
    judged.found |= {f"record of {step.kind}": str(step.path) for step in chain.steps}
    return judged


def _gguf_part_of_nothing(thing: Thing, config: CheckConfig, _: Progress) -> Judged:
    """LoRA, projector, importance matrix: no models, but files with tensors that can be broken."""
    assert thing.gguf is not None  # of these kinds it has a header
    count = counted(len(thing.gguf.tensors), "tensor")
    base = str(thing.gguf.fields.get("general.base_model.0.name", ""))
    judged = Judged(
        f"{named(thing.path)}: {thing.what}, {count}" + (f", of {base}" if base else "")
    )
    judged.add([files.finite_check(thing.gguf)], "all of its tensors are whole and finite")
    judged.unseen.append(_BESIDE[thing.kind])
    directory = config.base or base_for(thing.path, None) or "BASE"
    f16 = _near(thing.path, "*F16*.gguf") or "MODEL-F16.gguf"
    judged.next = {
        Kind.GGUF_ADAPTER: told("bake", directory, "ADAPTER_DIRECTORY", "--out", "baked"),
        Kind.GGUF_IMPORTANCE: told(
            "quantize", f16, "--type", "Q4_K_M", "--imatrix", thing.path, "--out", "quantized"
        ),
    }.get(thing.kind, told("check", _near(thing.path, "*.gguf", thing.path) or "MODEL.gguf"))
    return judged


_BESIDE = {
    Kind.GGUF_ADAPTER: "what it does to a model: adapters are judged and baked as the PEFT "
    "directory that they were converted from",
    Kind.GGUF_PROJECTOR: "pictures and sound, which are not run here: give the GGUF file of the "
    "language model",
    Kind.GGUF_IMPORTANCE: "whether it fits a model: quantize looks at that, and refuses another's",
}


def _near(path: Path, pattern: str, other_than: Path | None = None) -> Path | None:
    found = (p for p in sorted(path.parent.glob(pattern)) if p != other_than)
    return next(found, None)


def _vocabulary(thing: Thing, _: CheckConfig, __: Progress) -> Judged:
    problem = "it holds no weights, so it is no model: nothing of it can be judged"
    return _refused(
        thing, problem, told("check", _near(thing.path, "*.gguf", thing.path) or "FILE")
    )


def _folder_of_gguf(thing: Thing, _: CheckConfig, __: Progress) -> Judged:
    first = min(p for p in thing.path.iterdir() if p.suffix.lower() == ".gguf")
    return _refused(thing, "they are different models: check one at a time", told("check", first))


def _weightless(thing: Thing, _: CheckConfig, __: Progress) -> Judged:
    problem = "it has a config.json and no weights: they were not copied, or not fetched"
    if any(thing.path.glob("*.bin")):
        problem = "its weights are pickles (.bin), which are not read as a model: save safetensors"
    return _refused(thing, problem, f"ls -l {thing.path}")


def _gates(thing: Thing, config: CheckConfig, _: Progress) -> Judged:
    from so8tqc.services.check.trained import judge_gates

    return judge_gates(thing.path, config.base)


def _adapter(thing: Thing, config: CheckConfig, _: Progress) -> Judged:
    from so8tqc.services.check.trained import judge_adapter

    return judge_adapter(thing.path, config.base)


def _capture(thing: Thing, _: CheckConfig, __: Progress) -> Judged:
    from so8tqc.services.check.trained import judge_capture

    return judge_capture(thing.path)


def _weights(thing: Thing, config: CheckConfig, _: Progress) -> Judged:
    """Tensors alone: of a model directory they are judged with it, others hold no gates."""
    if (thing.path.parent / "config.json").is_file():
        problem = "one file of a model directory tells nothing by itself: give the directory"
        return _refused(thing, problem, told("check", thing.path.parent))
    problem = "none of its tensors is called a gate, and there is no config.json beside it"
    base = config.base or base_for(thing.path, None) or "BASE"
    return _refused(thing, problem, told("bake", base, thing.path, "--key", "NAME.{layer}.GATE"))


def _run(thing: Thing, _: CheckConfig, progress: Progress) -> Judged:
    """A run: every file that it wrote, hashed again, and its stages' verdicts."""
    from so8tqc.services.attest.recheck import recheck
    from so8tqc.services.report import read_stages

    records = read_stages(thing.path)
    again = recheck(thing.path, progress)
    judged = Judged(f"{named(thing.path)}: a run directory with {listed(list(records))}")
    judged.add(again.checks, "every file that it wrote is unchanged")
    _add_verdict(judged, records)
    judged.proved = not judged.failed and "qc" in records
    if "qc" not in records:
        judged.unseen.append("what its files are worth: no qc was run (so8tqc run CONFIG)")
    statement = thing.path / "attestation.json"
    judged.unseen.append("whether its files can be made again from base and rotations")
    failed = any(record.verdict is Verdict.FAIL for record in records.values())
    judged.next = told("report" if failed else "attest", thing.path)
    if statement.is_file() and not failed:
        judged.next = told("verify", statement, *_inputs_of(records))
    return judged


def _inputs_of(records: Mapping[str, Record]) -> list[object]:
    """``--base`` and ``--rotations`` of the bake of a run."""
    bake = records.get("bake")
    if bake is None:
        return []
    names = ("base", "rotations")
    return [x for n in names if n in bake.inputs for x in (f"--{n}", bake.inputs[n].path)]


def _add_verdict(judged: Judged, records: Mapping[str, Record]) -> None:
    """``file.verdicts``, and what the failed checks of a run say."""
    failed = {name: r for name, r in records.items() if r.verdict is Verdict.FAIL}
    reasons = [c.detail for r in failed.values() for c in r.checks if c.failed]
    detail = f"Stages whose own checks failed: {', '.join(failed) or 'none'}."
    if reasons:
        detail += f" First: {reasons[0]}"
    proof = f"no check of its {counted(len(records), 'stage')} failed"
    judged.add([judge("file.verdicts", len(failed), 0, detail=detail)], proof)
    judged.diagnosis += [d for record in failed.values() for d in record.diagnosis]


def _stage(thing: Thing, _: CheckConfig, __: Progress) -> Judged:
    return _of_record(thing.path / "record.json", thing.path)


def _record(thing: Thing, _: CheckConfig, __: Progress) -> Judged:
    return _of_record(thing.path, thing.path)


def _of_record(path: Path, called: Path) -> Judged:
    """A record: what it says was made is here, and as it says."""
    record = read_record(path)
    kind = "the directory" if called.is_dir() else "the record"
    judged = Judged(f"{named(called)}: {kind} of so8tqc {record.kind}, which says {record.verdict}")
    here = {n: located(Path(ref.path), path) for n, ref in record.outputs.items()}
    plain = {n: p for n, p in here.items() if p is not None and p.is_file()}
    changed = [n for n, p in plain.items() if file_ref(p).sha256 != record.outputs[n].sha256]
    gone = [n for n, p in here.items() if p is None]
    if plain:
        detail = f"Of {len(plain)} files that it made, changed: {', '.join(changed) or 'none'}."
        judged.add(
            [judge("file.recorded", len(changed), 0, detail=detail)],
            f"{counted(len(plain), 'file')} that it made are as it recorded",
        )
    _add_verdict(judged, {record.kind: record})
    judged.diagnosis = list(dict.fromkeys((*judged.diagnosis, *record.diagnosis)))
    judged.unseen += [f"what is not here: {listed(gone)}"] if gone else []
    judged.found = {name: str(place) for name, place in here.items() if place is not None}
    models = [p for p in here.values() if p is not None and (p.is_dir() or p.suffix == ".gguf")]
    judged.next = told("check", models[0]) if models else told("explain")
    return judged


def _statement(thing: Thing, config: CheckConfig, progress: Progress) -> Judged:
    """A statement: the files beside it against its digests; its links, if the base is given."""
    from so8tqc.services.attest.verify_statement import verify_statement

    level = "files" if config.level == "files" or config.base is None else "full"
    asked = VerifyConfig(
        file=thing.path,
        level="full" if level == "full" else "files",
        base=config.base,
        rotations=config.rotations,
    )
    again = verify_statement(asked, progress)
    judged = Judged(f"{named(thing.path)}: {thing.what}")
    judged.proved = judged.add(again.checks, "its files are those that it states")
    if level == "files":
        judged.proved = False
        judged.unseen.append("whether it tells the truth: give --base and --rotations")
    judged.next = told(
        "verify", thing.path, "--base", config.base or "BASE", "--rotations",
        config.rotations or "GATES",
    )  # fmt: skip
    return judged


def _temperature(thing: Thing, _: CheckConfig, __: Progress) -> Judged:
    """A fitted temperature: whose it is, and whether that file is here."""
    content = json.loads(read_whole(thing.path))
    model = content.get("model") if isinstance(content.get("model"), dict) else {}
    name, digest = str(model.get("file", "")), model.get("sha256")
    value = content["temperature"]
    judged = Judged(
        f"{named(thing.path)}: a temperature, {value}, fitted on {name or 'an unnamed file'}"
    )
    folders = (thing.path.parent, *list(thing.path.absolute().parents)[1:3])
    places = [p for f in folders for p in (f / name, *f.glob(f"*/{name}")) if name and p.is_file()]
    if not places or digest is None:
        judged.unseen.append(f"the file that it belongs to: {name or 'it names none'} is not here")
        judged.next = told("check", name or "FILE.gguf")
        return judged
    same = [place for place in places if file_ref(place).sha256 == digest]
    detail = f"{places[0].name} is not the file that this temperature was fitted on."
    if same:
        detail = f"{name} is the file that it was fitted on, by SHA-256."
    judged.add([judge("file.recorded", 0 if same else 1, 0, detail=detail)], detail.rstrip("."))
    judged.next = told("check", (same or places)[0])
    return judged


def _tokenizer(thing: Thing, _: CheckConfig, __: Progress) -> Judged:
    problem = "a tokenizer alone is no model: there are no weights to be judged"
    gguf = _near(thing.path, "*.gguf") or "FILE.gguf"
    where = thing.path if thing.path.is_dir() else thing.path.parent
    return _refused(thing, problem, told("check", gguf, "--tokenizer", where))


def _index(thing: Thing, _: CheckConfig, __: Progress) -> Judged:
    problem = "an index names files of weights; the directory is the model"
    return _refused(thing, problem, told("check", thing.path.parent))


def _config(thing: Thing, _: CheckConfig, __: Progress) -> Judged:
    if thing.path.suffix in (".yaml", ".yml"):
        problem = "a configuration is checked by so8tqc config check"
        return _refused(thing, problem, told("config", "check", thing.path))
    problem = "a configuration alone is no model; its directory may be one"
    return _refused(thing, problem, told("check", thing.path.parent))


def _words(thing: Thing, _: CheckConfig, __: Progress) -> Judged:
    problem = "text is what models are judged on: it is no model, no gates and no record"
    gguf = _near(thing.path, "*.gguf") or "FILE.gguf"
    text = thing.path if thing.path.is_file() else thing.path / "TEXT.txt"
    return _refused(thing, problem, told("check", gguf, "--data", text))


def _archive(thing: Thing, _: CheckConfig, __: Progress) -> Judged:
    problem = "an archive is not looked into: unpack it, and check what was in it"
    name = thing.path.name.lower()
    unpack = f"unzip {thing.path}" if name.endswith(".zip") else f"tar xf {thing.path}"
    if name.endswith((".gz", ".bz2", ".xz")) and ".tar" not in name:
        unpack = f"gunzip -k {thing.path}" if name.endswith(".gz") else f"unar {thing.path}"
    return _refused(thing, problem, unpack)


def _stranger(thing: Thing, _: CheckConfig, __: Progress) -> Judged:
    problem = thing.problem or "no model, no gates, no record: nothing here can judge it"
    if (made := made_by(thing.path)) is not None:
        return _refused(thing, problem, told("check", made.path))
    return _refused(thing, problem, told("check", thing.path.parent))


OTHERS: Mapping[Kind, Judge] = {
    Kind.MISSING: _nothing,
    Kind.EMPTY: _nothing,
    Kind.GGUF_BROKEN: _broken,
    Kind.GGUF_PROJECTOR: _gguf_part_of_nothing,
    Kind.GGUF_ADAPTER: _gguf_part_of_nothing,
    Kind.GGUF_IMPORTANCE: _gguf_part_of_nothing,
    Kind.GGUF_VOCABULARY: _vocabulary,
    Kind.GGUF_FOLDER: _folder_of_gguf,
    Kind.WEIGHTLESS: _weightless,
    Kind.ADAPTER: _adapter,
    Kind.GATES: _gates,
    Kind.CAPTURE: _capture,
    Kind.WEIGHTS: _weights,
    Kind.RUN: _run,
    Kind.STAGE: _stage,
    Kind.STATEMENT: _statement,
    Kind.RECORD: _record,
    Kind.TEMPERATURE: _temperature,
    Kind.TOKENIZER: _tokenizer,
    Kind.INDEX: _index,
    Kind.CONFIG: _config,
    Kind.TEXT: _words,
    Kind.PICTURES: _stranger,
    Kind.ARCHIVE: _archive,
    Kind.UNKNOWN: _stranger,
}
