"""A quantized file is held against what its types cost the model: libllama's own is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from planted import save_model

from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.config import BakeConfig, ExportConfig, QCConfig, QuantizeConfig
from so8tqc.gguf.conversion import UntraceableError
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.rewrite import changed_copy
from so8tqc.llama.ggml import dequantizer, encode
from so8tqc.llama.vendor import is_vendored
from so8tqc.records import Check, Record, Verdict
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.bake import bake
from so8tqc.services.export.service import export
from so8tqc.services.qc.quantization_floor import FACTOR
from so8tqc.services.qc.service import qc
from so8tqc.services.quantize.service import quantize
from so8tqc.services.tensors.expected import expected_of
from so8tqc.services.tensors.honest import is_quantized, write_honest

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]

LOOSE = "loose:\n  models: {kl.mean: {limit: 9}}\n  gguf: {default: {kl.mean: {limit: 9}}}\n"


class Made(NamedTuple):
    """A tiny Llama with gates, baked in float32, its F32 file, and quantized ones."""

    base: Path
    gates: Path
    f32: Path
    folder: Path


@pytest.fixture(scope="module")
def made(tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("floor")
    base = save_model(folder / "base", "llama", tokenizer_files)
    gates = folder / "gates.safetensors"
    generator = np.random.default_rng(0)
    theta = {Target(i): generator.normal(size=(32, 8, 8)) * 0.3 for i in range(3)}
    write_native(
        gates,
        theta,
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )
    bake(BakeConfig(base=base, rotations=gates, out=folder / "baked", baked_dtype="float32"))
    f32 = folder / "tiny-F32.gguf"
    export(ExportConfig(model=folder / "baked", out=f32, type="f32"))
    for kind in ("Q8_0", "Q4_K_M"):
        quantize(QuantizeConfig(gguf=f32, types=(kind,), out=folder / "plain", threads=1))
    return Made(base, gates, f32, folder)


def judged(made: Made, files: list[Path], out: Path, **options: object) -> Record:
    profile = out / "loose.yaml"
    out.mkdir(exist_ok=True)
    profile.write_text(LOOSE)
    return qc(
        QCConfig.model_validate(
            {
                "reference": made.base,
                "rotations": made.gates,
                "candidates": tuple(files),
                "out": out,
                "profile": str(profile),
                "data": ("builtin:validation",),
                "max_tokens": 48,
                "resamples": 100,
                **options,
            }
        )
    )


def coarser(source: Path, to: Path) -> Path:
    """The same file, each of its Q8_0 tensors through Q4_0: the types, sizes and keys stay."""
    to.write_bytes(source.read_bytes())
    with to.open("r+b") as out:
        for tensor in open_gguf(source).tensors.values():
            if tensor.type != "Q8_0":
                continue
            values = np.empty(tensor.shape, np.float32)
            dequantizer("Q8_0")(tensor.raw, values)
            rows = values.reshape(-1, tensor.shape[-1])
            dequantizer("Q4_0")(encode(rows, "Q4_0").reshape(-1), rows)
            out.seek(tensor.offset)
            out.write(encode(rows, "Q8_0").tobytes())
    return to


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0"])
def test_the_floor_is_what_libllama_quantizes_from_the_unrounded_bake(
    made: Made, kind: str, tmp_path: Path
) -> None:
    """Byte by byte: the fold in float32 rounds nothing that float32 values do not."""
    quantized = open_gguf(made.folder / "plain" / f"tiny-{kind}.gguf")
    baked = open_checkpoint(made.folder / "baked")
    expected = expected_of(baked, quantized)
    floor = open_gguf(write_honest(quantized, expected, tmp_path))
    assert floor.types == quantized.types
    assert is_quantized(floor)
    assert not is_quantized(open_gguf(made.f32))
    for name, tensor in quantized.tensors.items():
        np.testing.assert_array_equal(floor.tensors[name].raw, tensor.raw, name)


def test_honest_files_pass_and_one_from_a_coarser_file_fails(made: Made, tmp_path: Path) -> None:
    q8 = made.folder / "plain" / "tiny-Q8_0.gguf"
    q4 = made.folder / "plain" / "tiny-Q4_K_M.gguf"
    requantized = coarser(q8, tmp_path / "requantized-Q8_0.gguf")
    record = judged(made, [made.f32, q8, q4, requantized], tmp_path / "qc")
    for honest in (q8, q4):
        check = record.check("kl.floor", honest.name)
        assert check.verdict is Verdict.PASS
        assert check.noise_floor is not None
        assert check.limit == pytest.approx(FACTOR * check.noise_floor)
        # its bytes are those of a floor from the same float32 values
        assert check.value == pytest.approx(check.noise_floor, rel=0.05)
    wrong = record.check("kl.floor", requantized.name)
    assert (wrong.verdict, record.verdict) == (Verdict.FAIL, Verdict.FAIL)
    assert wrong.value is not None
    assert wrong.noise_floor is not None
    assert wrong.value > 8 * wrong.noise_floor
    # the fixed limit, which must bear any model, would let it pass
    assert record.check("kl.mean", requantized.name).verdict is Verdict.PASS
    # a file that only rounds has no codes to choose
    assert not [c for c in record.checks if (c.id, c.subject) == ("kl.floor", made.f32.name)]


def test_the_floor_is_read_as_the_file_is(made: Made, tmp_path: Path) -> None:
    """By its weights, where the file is: what the runtime adds is on neither side or on both."""
    q4 = made.folder / "plain" / "tiny-Q4_K_M.gguf"
    record = judged(made, [q4], tmp_path / "qc", gguf_reading="weights")
    check = record.check("kl.floor", q4.name)
    assert check.noise_floor is not None
    # bit by bit the same weights in both, but for the fold's rounding to float32
    assert check.value == pytest.approx(check.noise_floor, rel=1e-3)


def test_a_file_with_other_keys_is_no_measure_of_itself(made: Made, tmp_path: Path) -> None:
    """With its rope base an honest file would lose as much: the mistake would be its own limit."""
    wrong = tmp_path / "wrong.gguf"
    changed_copy(made.folder / "plain" / "tiny-Q8_0.gguf", wrong, {"llama.rope.freq_base": 500.0})
    record = judged(made, [wrong], tmp_path / "qc")
    assert record.check("tensors.keys", wrong.name).verdict is Verdict.FAIL
    assert not [check for check in record.checks if check.id == "kl.floor"]
    (told,) = [notice for notice in record.notices if "no quantization floor" in notice]
    assert "tensors.keys" in told


def test_without_it_there_is_no_check(made: Made, tmp_path: Path) -> None:
    q8 = made.folder / "plain" / "tiny-Q8_0.gguf"
    record = judged(made, [q8], tmp_path / "off", quantization_floor=False)
    assert not [check for check in record.checks if check.id == "kl.floor"]
    only = judged(made, [q8], tmp_path / "files", level="files")
    assert not [check for check in only.checks if check.id == "kl.floor"]


def test_where_it_cannot_be_made_it_is_absent_and_said(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from so8tqc.services.qc import quantization_floor as module

    def unknown(*_: object) -> Path:
        raise UntraceableError("nothing is known of blk.0.odd")

    monkeypatch.setattr(module, "write_honest", unknown)
    q8 = made.folder / "plain" / "tiny-Q8_0.gguf"
    record = judged(made, [q8], tmp_path / "qc")
    assert not [check for check in record.checks if check.id == "kl.floor"]
    told = [notice for notice in record.notices if "no quantization floor" in notice]
    assert len(told) == 1
    assert "tiny-Q8_0.gguf" in told[0]
    assert "blk.0.odd" in told[0]


def limited(made: Made, file: Path, out: Path, profile: str, kl: float) -> dict[str, Check]:
    """The candidate's checks by a profile that allows a Q4_K_M so much."""
    out.mkdir()
    path = out / "profile.yaml"
    path.write_text(f"a:\n  models: {{}}\n  gguf: {{default: {{kl.mean: {{{profile}: {kl}}}}}}}\n")
    record = judged(made, [file], out / "qc", profile=str(path))
    return {check.id: check for check in record.checks}


def test_an_absolute_target_is_said_and_the_floor_decides(made: Made, tmp_path: Path) -> None:
    """A type may cost this model more than a profile foresaw, or much less."""
    q4 = made.folder / "plain" / "tiny-Q4_K_M.gguf"
    tight = limited(made, q4, tmp_path / "tight", "target", 1e-9)
    assert tight["kl.mean"].verdict is Verdict.PASS
    assert tight["kl.mean"].target_met is False
    floor = tight["kl.floor"].noise_floor
    assert floor is not None
    assert tight["kl.mean"].noise_floor == floor
    assert tight["kl.mean"].limit == FACTOR * floor
    fixed = limited(made, q4, tmp_path / "fixed", "limit", 1e-9)
    assert fixed["kl.mean"].verdict is Verdict.FAIL
    worse = coarser(made.folder / "plain" / "tiny-Q8_0.gguf", tmp_path / "worse.gguf")
    wide = limited(made, worse, tmp_path / "wide", "target", 9.0)
    assert wide["kl.mean"].verdict is Verdict.PASS
    assert wide["kl.floor"].verdict is Verdict.FAIL


def test_without_a_floor_the_target_is_the_limit(made: Made, tmp_path: Path) -> None:
    q4 = made.folder / "plain" / "tiny-Q4_K_M.gguf"
    path = tmp_path / "profile.yaml"
    path.write_text("a:\n  models: {}\n  gguf: {default: {kl.mean: {target: 1.0e-9}}}\n")
    record = judged(made, [q4], tmp_path / "qc", profile=str(path), quantization_floor=False)
    (mean,) = [check for check in record.checks if check.id == "kl.mean"]
    assert mean.verdict is Verdict.FAIL
    assert mean.limit == 1e-9


def test_every_limit_of_quantized_types_is_measured_beside_the_file(
    made: Made, tmp_path: Path
) -> None:
    """By the profile that is the default: calibration and the top token, too."""
    q4 = made.folder / "plain" / "tiny-Q4_K_M.gguf"
    record = judged(made, [q4], tmp_path / "qc", profile="default")
    mine = {check.id: check for check in record.checks if check.subject == q4.name}
    for name in ("kl.mean", "kl.top1", *(f"calibration.{w}" for w in ("ece", "brier", "nll"))):
        assert mine[name].noise_floor is not None
        assert mine[name].target is not None
        assert not mine[name].failed
