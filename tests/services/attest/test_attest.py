"""Attest and verify: every edit is found and placed, and every link is made again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from so8tqc.cli.main import run as run_main
from so8tqc.config import (
    AttestConfig,
    BakeOptions,
    CalibrateOptions,
    QuantizeOptions,
    RunConfig,
    VerifyConfig,
)
from so8tqc.disk.digests import sha256_json
from so8tqc.errors import InputError
from so8tqc.llama.vendor import is_vendored
from so8tqc.records import Record, Verdict
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.attest import verify_statement as module
from so8tqc.services.attest.service import attest
from so8tqc.services.attest.verify_statement import verify_statement
from so8tqc.services.run.pipeline import run

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]

EDITS = 200
MODEL = "bake/baked_model"
F16, Q8 = "export/tiny-F16.gguf", "quantize/tiny-Q8_0.gguf"


@pytest.fixture(scope="module")
def sources(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``base`` (two shards) and ``gates.safetensors``."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(make_model("llama", "bfloat16", "150KB"), folder / "base")
    generator = np.random.default_rng(3)
    write_native(
        folder / "gates.safetensors",
        {Target(i): generator.normal(size=(8, 8, 8)) * 0.3 for i in range(3)},
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )
    return folder


@pytest.fixture(scope="module")
def attested(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with an attestation (shared: copy it before editing)."""
    out = tmp_path_factory.mktemp("run")
    config = RunConfig(
        name="tiny",
        base=str(sources / "base"),
        rotations=str(sources / "gates.safetensors"),
        out=out,
        bake=BakeOptions(baked_dtype="float32"),
        quantize=QuantizeOptions(types=("Q8_0", "Q4_0"), threads=1),
        calibrate=CalibrateOptions(allow_small=True, resamples=100, png=False),
        calibrate_type="Q8_0",
    )
    for stage in ("bake", "export", "quantize", "calibrate"):
        run(config, only=stage)
    record = attest(AttestConfig(directory=out))
    assert record.verdict is Verdict.PASS
    return out


@pytest.fixture
def copied(attested: Path, tmp_path: Path) -> Path:
    """The run directory, to be edited."""
    shutil.copytree(attested, tmp_path / "run")
    return tmp_path / "run"


def check(directory: Path, level: str = "files", **options: Any) -> Record:
    path = directory / "attestation.json"
    return verify_statement(VerifyConfig(file=path, level=level, **options))


def links(record: Record) -> dict[str, str]:
    return {name: link["found"] for name, link in record.metrics["links"].items()}  # type: ignore[index,union-attr]


def shipped(directory: Path) -> list[Path]:
    """Every file that ships, told without the statement."""
    model = [p for p in (directory / MODEL).rglob("*") if p.is_file()]
    files = [*model, directory / F16, *(directory / "quantize").glob("*.gguf")]
    return sorted([*files, directory / "calibrate" / "temperature_config.json"])


def test_the_statement_is_in_toto_and_names_every_file(attested: Path) -> None:
    statement = json.loads((attested / "attestation.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    stated = {s["name"]: s["digest"]["sha256"] for s in statement["subject"]}
    files = {p.relative_to(attested).as_posix(): p for p in shipped(attested)}
    assert stated == {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in files.items()}
    assert str(attested) not in (attested / "attestation.json").read_text()


def test_every_link_is_made_again_and_identical(attested: Path, sources: Path) -> None:
    record = check(attested, "full", base=sources / "base", rotations=sources / "gates.safetensors")
    assert record.verdict is Verdict.PASS
    assert links(record) == {
        "bake": "identical",
        "export": "identical",
        "quantize Q8_0": "identical",
        "quantize Q4_0": "identical",
        "calibrate": "not checked",
    }


def test_base_rotations_and_statement_alone_make_every_file(
    attested: Path, sources: Path, tmp_path: Path
) -> None:
    """Nothing but the statement was shipped: what earlier links make serves the later ones."""
    statement = shutil.copy(attested / "attestation.json", tmp_path)
    record = verify_statement(
        VerifyConfig(file=statement, base=sources / "base", rotations=sources / "gates.safetensors")
    )
    assert set(links(record).values()) == {"identical", "not checked"}
    assert links(record)["quantize Q4_0"] == "identical"
    assert record.check("statement.absent").verdict is Verdict.SKIP


def test_without_base_and_rotations_the_bake_is_not_checked(attested: Path) -> None:
    record = check(attested, "full")
    assert links(record)["bake"] == "not checked"
    assert "--base and --rotations" in record.check("derivation.link", "bake").detail
    assert links(record)["export"] == "identical"


def test_other_rotations_do_not_make_these_files(
    attested: Path, sources: Path, make_gates: Callable[..., Path]
) -> None:
    other = make_gates(sources / "base", seed=9)
    record = check(attested, "full", base=sources / "base", rotations=other)
    assert record.verdict is Verdict.FAIL
    assert links(record)["bake"] == "different"
    found = record.check("derivation.link", "bake").detail
    assert "rotations given here: not the stated one" in found
    assert "self_attn.o_proj.weight" in found
    assert "mlp" not in found


def test_a_true_statement_of_another_run_is_found_by_the_files(
    attested: Path, copied: Path
) -> None:
    """The bake's own files are replaced by the base's: what was never baked does not pass."""
    record = check(attested)
    assert record.verdict is Verdict.PASS
    (copied / MODEL / "config.json").unlink()
    (copied / MODEL / "modeling_evil.py").write_text("print()")
    record = check(copied)
    assert "modeling_evil.py" in record.check("statement.strangers").detail
    assert record.verdict is Verdict.FAIL
    assert "config.json" in record.check("statement.absent").detail


def test_files_uploaded_without_their_folders_are_found(attested: Path, tmp_path: Path) -> None:
    for file in [*shipped(attested), attested / "attestation.json"]:
        shutil.copy(file, tmp_path / file.name)
    record = check(tmp_path)
    assert record.verdict is Verdict.PASS
    states = {n: f["state"] for n, f in record.metrics["files"].items()}  # type: ignore[index,union-attr]
    assert {n for n, state in states.items() if state == "absent"} == {
        f"{stage}/record.json" for stage in ("bake", "export", "quantize", "calibrate")
    }


def _safetensors_places(path: Path) -> Iterator[tuple[str, int, int]]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            yield name, *(8 + length + offset for offset in entry["data_offsets"])


def _gguf_places(path: Path) -> Iterator[tuple[str, int, int]]:
    for tensor in gguf.GGUFReader(str(path)).tensors:
        start = int(tensor.data_offset)
        yield tensor.name, start, start + int(tensor.n_bytes)


def _tensor_at(path: Path, position: int) -> str | None:
    """The tensor that holds a byte, by the format's own readers."""
    readers = {".safetensors": _safetensors_places, ".gguf": _gguf_places}
    reader = readers.get(path.suffix)
    for name, start, end in reader(path) if reader else ():
        if start <= position < end:
            return name
    return None


def test_random_edits_of_single_bytes_are_all_found_and_placed(
    copied: Path, record_property: Callable[[str, object], None]
) -> None:
    """In any file, the statement included; every second one in the file's first 4 KiB."""
    record_property("tries", EDITS)
    generator = np.random.default_rng(11)
    files = [*shipped(copied), copied / "attestation.json"]
    for number in range(EDITS):
        file = files[generator.integers(len(files))]
        original = file.read_bytes()
        near_start = number % 2 == 0
        position = int(
            generator.integers(min(len(original), 4096) if near_start else len(original))
        )
        tensor = _tensor_at(file, position)
        edited = bytearray(original)
        edited[position] ^= int(generator.integers(1, 256))
        file.write_bytes(edited)
        name = file.relative_to(copied).as_posix()
        if file.name == "attestation.json":
            with pytest.raises(InputError, match=r"attestation\.json"):
                check(copied)
        else:
            record = check(copied)
            assert record.verdict is Verdict.FAIL, (name, position)
            found = record.metrics["files"]
            different = {n: f["parts"] for n, f in found.items() if f["parts"]}  # type: ignore[index,union-attr]
            assert list(different) == [name], (name, position)
            if tensor is not None:
                assert different[name] == [tensor], (name, position)
        file.write_bytes(original)
    assert check(copied).verdict is Verdict.PASS


def _edit(directory: Path, change: Callable[[dict[str, Any]], None], *, reseal: bool) -> Path:
    """Change a statement; with ``reseal`` compute its digests anew, as a forger would."""
    path = directory / "attestation.json"
    content = json.loads(path.read_text())
    change(content)
    if reseal:
        predicate = content["predicate"]
        predicate["seals"] = {
            "subject": sha256_json(content["subject"]),
            "links": {link["name"]: sha256_json(link) for link in predicate["links"]},
            "records": sha256_json(predicate["records"]),
            "versions": sha256_json(predicate["versions"]),
        }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def _drop(number: int) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["predicate"]["links"].pop(number)


def _swap(content: dict[str, Any]) -> None:
    found = content["predicate"]["links"]
    found[1], found[2] = found[2], found[1]


def _exchange_outputs(content: dict[str, Any]) -> None:
    _, _, a, b, _ = content["predicate"]["links"]
    a["outputs"], b["outputs"] = b["outputs"], a["outputs"]


def _other_input(content: dict[str, Any]) -> None:
    content["predicate"]["links"][2]["inputs"][0]["digest"]["sha256"] = "0" * 64


def _no_base(content: dict[str, Any]) -> None:
    content["predicate"]["links"][0]["inputs"].pop(0)


def _twice(content: dict[str, Any]) -> None:
    content["predicate"]["links"].append(content["predicate"]["links"][3])


def _other_subject(content: dict[str, Any]) -> None:
    content["subject"][0]["digest"]["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_drop(0), "no link before 'export' makes"),
        (_drop(1), "no link before 'quantize Q8_0' makes its input export/"),
        (_drop(2), "no link before 'calibrate' makes its input quantize/"),
        (_swap, "no link before 'quantize Q8_0' makes"),
        (_other_input, "made from another export/"),
        (_no_base, "does not say its base"),
        (_twice, "two links"),
        (_other_subject, "is not the file that its link makes"),
    ],
)
def test_a_broken_chain_is_refused_whatever_its_digests_say(
    change: Callable[[dict[str, Any]], None], says: str, copied: Path
) -> None:
    _edit(copied, change, reseal=True)
    with pytest.raises(InputError, match=f"chain is broken: .*{says}"):
        check(copied)


def test_exchanged_outputs_are_refused_or_not_made_again(copied: Path) -> None:
    original = (copied / "attestation.json").read_bytes()
    _edit(copied, _exchange_outputs, reseal=False)
    with pytest.raises(InputError, match="the link 'quantize Q4_0', the link 'quantize Q8_0'"):
        check(copied)
    (copied / "attestation.json").write_bytes(original)
    _edit(copied, _exchange_outputs, reseal=True)
    record = check(copied, "full")
    assert links(record)["quantize Q8_0"] == "different"
    assert links(record)["quantize Q4_0"] == "different"


def test_whitespace_and_unknown_keys_are_edits(copied: Path) -> None:
    path = copied / "attestation.json"
    original = path.read_text()
    path.write_text(original.replace('  "predicateType"', '   "predicateType"'))
    line = original[: original.index('"predicateType"')].count("\n") + 1
    with pytest.raises(InputError, match=rf"line {line}: edited after it was written"):
        check(copied)
    path.write_text(original.replace('  "predicateType"', '  "extra": 1,\n  "predicateType"'))
    with pytest.raises(InputError, match="extra"):
        check(copied)


def test_a_forged_export_is_not_made_again(copied: Path) -> None:
    """File, digests and seals are edited alike: only making it again shows it."""
    path = copied / F16
    data = bytearray(path.read_bytes())
    name, start, _ = next(p for p in _gguf_places(path) if p[0] == "blk.1.ffn_up.weight")
    data[start + 1] ^= 0x04
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()

    def forge(content: dict[str, Any]) -> None:
        every = [*content["subject"]]
        for link in content["predicate"]["links"]:
            every += [*link["inputs"], *link["outputs"]]
        for entry in every:
            if entry["name"] == F16:
                entry["digest"]["sha256"] = digest

    _edit(copied, forge, reseal=True)
    assert check(copied).check("statement.files").verdict is Verdict.PASS
    record = check(copied, "full")
    assert links(record)["export"] == "different"
    assert links(record)["quantize Q8_0"] == "different"
    assert name  # the tensor's own digest was left, so the file says nothing of its place


def test_another_build_is_within_rounding_or_not_checked(
    attested: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that rounds one tie otherwise: the block is counted, the verdict is no pass."""
    here = module.library_build()
    other = here.model_copy(update={"cpu": "CPU : NEON = 1"})
    monkeypatch.setattr(module, "library_build", lambda: other)
    original = module.remake

    def rounded(link: Any, inputs: Any, scratch: Any, progress: Any) -> Any:
        made = original(link, inputs, scratch, progress)
        if link.name == "quantize Q8_0":
            _round_otherwise(made[Q8], copied / F16)
        return made

    monkeypatch.setattr(module, "remake", rounded)
    record = check(copied, "full")
    assert links(record)["quantize Q8_0"] == "within rounding"
    assert "1 blocks of 1 tensors" in record.check("derivation.link", "quantize Q8_0").detail
    assert record.check("derivation.link", "quantize Q8_0").verdict is Verdict.SKIP
    (copied / Q8).unlink()
    assert links(check(copied, "full"))["quantize Q8_0"] == "not checked"


def _round_otherwise(path: Path, source: Path) -> None:
    """Move the Q8_0 weight that lies nearest the middle of two steps to its other neighbour."""
    name = "blk.1.attn_output.weight"
    weights = {t.name: t for t in gguf.GGUFReader(str(source)).tensors}[name].data
    start = next(p[1] for p in _gguf_places(path) if p[0] == name)
    data = bytearray(path.read_bytes())
    rows = np.frombuffer(bytes(data[start : start + weights.size // 32 * 34]), np.uint8)
    rows = rows.reshape(-1, 34)
    scale = rows[:, :2].copy().view(np.float16).astype(np.float32)
    steps = weights.astype(np.float32).reshape(-1, 32) / scale
    stored = rows[:, 2:].copy().view(np.int8)
    block, weight = np.unravel_index(int(np.abs(steps - stored).argmax()), steps.shape)
    step = 1 if steps[block, weight] > stored[block, weight] else -1
    data[start + 34 * int(block) + 2 + int(weight)] = (int(stored[block, weight]) + step) % 256
    path.write_bytes(data)


def test_what_was_changed_before_is_not_attested(copied: Path) -> None:
    (copied / Q8).write_bytes((copied / Q8).read_bytes() + b"\0")
    with pytest.raises(InputError, match=r"changed: quantize/tiny-Q8_0\.gguf"):
        attest(AttestConfig(directory=copied))


def test_a_statement_is_told_from_other_json_and_names_nothing_outside(copied: Path) -> None:
    other = copied / "attestation.json"
    other.write_text((copied / "bake" / "record.json").read_text())
    with pytest.raises(InputError, match="not an in-toto statement"):
        check(copied)


def test_the_command_shows_every_link(
    attested: Path, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statement = str(attested / "attestation.json")
    given = ["--base", str(sources / "base"), "--rotations", str(sources / "gates.safetensors")]
    assert run_main(["verify", statement, *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"quantize Q8_0 +identical", line) for line in lines)
    assert any(re.match(r"calibrate +not checked", line) for line in lines)
    assert max(map(len, lines)) <= 80
