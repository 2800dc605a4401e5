"""No fault is missed, none is misnamed, and no correct bake is blamed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from document import DOCUMENT, fault_matrix
from fault_bench import Bench
from fault_table import FAULTS, Fault

from conftest import attention_width
from so8tqc.config import BakeConfig, ExportConfig, QCConfig, QuantizeConfig
from so8tqc.llama.vendor import is_vendored
from so8tqc.records import Record, Verdict
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.bake import bake
from so8tqc.services.export.service import export
from so8tqc.services.qc.service import qc
from so8tqc.services.quantize.service import quantize

ARCHITECTURES = ("llama", "qwen3")  # the second has heads × head_dim ≠ hidden_size
CORRECT = 20

BenchMaker = Callable[..., Bench]


@pytest.fixture(scope="session")
def benches(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> BenchMaker:
    """Correct bakes, each made once; a test breaks a copy."""
    made: dict[tuple[object, ...], tuple[Path, Path, Path]] = {}
    ggufs: dict[Path, Path] = {}

    def gguf_of(model: Path, key: Path) -> Path:
        if key not in ggufs:
            out = tmp_path_factory.mktemp("gguf") / "tiny-F16.gguf"
            export(ExportConfig(model=model, out=out))
            ggufs[key] = out
        return ggufs[key]

    def make(architecture: str, dtype: str, fault: Fault, out: Path) -> Bench:
        key = (architecture, dtype, fault.scale, fault.parametrization)
        if key not in made:
            base = make_model(architecture, dtype)
            root = tmp_path_factory.mktemp("bench")
            gates = write_gates(
                base,
                root / "gates.safetensors",
                scale=fault.scale,
                parametrization=fault.parametrization,
            )
            bake(BakeConfig(base=base, rotations=gates, out=root / "baked", verify=False))
            made[key] = base, gates, root / "baked"
        base, gates, baked = made[key]
        shutil.copytree(baked, out)
        return Bench(base, gates, out, lambda d: gguf_of(d, baked if d == out else d))

    return make


def write_gates(
    base: Path,
    path: Path,
    *,
    seed: int = 0,
    scale: float = 0.3,
    convention: Convention = Convention.COLUMN,
    parametrization: Parametrization = Parametrization.EXP,
    site: Site = Site.INPUT,
) -> Path:
    """A gate for each of the three layers of a tiny model."""
    width = attention_width(base) if site is Site.INPUT else 64
    draw = np.random.default_rng(seed)
    theta = {Target(i): draw.normal(size=(width // 8, 8, 8)) * scale for i in range(3)}
    if parametrization is Parametrization.MATRIX:
        theta = {t: np.linalg.qr(value)[0] for t, value in theta.items()}
        for value in theta.values():
            value[:, :, 0] *= np.linalg.det(value)[:, None]
    write_native(
        path, theta, parametrization=parametrization, convention=convention, site=site, pet=None
    )
    return path


def judged(bench: Bench, candidate: Path, texts: Path, level: str) -> Record:
    return qc(
        QCConfig(
            reference=bench.base,
            rotations=bench.gates,
            candidates=(candidate,),
            level=level,
            data=(str(texts),),
            out=bench.out.with_suffix(".qc"),
            max_tokens=48,
            resamples=100,
        )  # type: ignore[arg-type]
    )


def failed(record: Record) -> set[str]:
    return {check.id for check in record.checks if check.verdict is Verdict.FAIL}


def assert_named(record: Record, fault: Fault) -> None:
    assert record.verdict is Verdict.FAIL
    texts = [d.text for d in record.diagnosis]
    assert {d.code for d in record.diagnosis} == {fault.diagnosis}, texts
    layers = {layer for d in record.diagnosis for layer in d.layers}
    assert layers == set(fault.layers), texts
    assert all("so8tqc " in d.remedy for d in record.diagnosis)
    if fault.gguf and fault.diagnosis == "not_baked":  # the bake may be right: it was not exported
        assert all("so8tqc export" in d.remedy for d in record.diagnosis)


def cases(fault: Fault) -> list[Any]:
    """Every architecture and dtype a fault is made on."""
    return [
        pytest.param(fault, architecture, dtype, id=f"{fault.name}-{architecture}-{dtype}")
        for architecture in ARCHITECTURES
        for dtype in fault.dtypes
    ]


CASES = [case for fault in FAULTS for case in cases(fault)]
ONE_OF_EACH = [cases(fault)[i % len(cases(fault))] for i, fault in enumerate(FAULTS)]


@pytest.mark.parametrize(
    ("fault", "architecture", "dtype"), [c for c in CASES if not c.values[0].gguf]
)
def test_the_files_show_the_fault(
    fault: Fault,
    architecture: str,
    dtype: str,
    benches: BenchMaker,
    texts_file: Path,
    tmp_path: Path,
) -> None:
    bench = benches(architecture, dtype, fault, tmp_path / "model")
    fault.break_it(bench)
    record = judged(bench, bench.out, texts_file, "files")
    assert failed(record) >= set(fault.caught_by)
    assert_named(record, fault)


@pytest.mark.parametrize(
    ("fault", "architecture", "dtype"),
    [c for c in ONE_OF_EACH if not c.values[0].gguf],
)
def test_the_logits_show_the_fault(
    fault: Fault,
    architecture: str,
    dtype: str,
    benches: BenchMaker,
    texts_file: Path,
    tmp_path: Path,
) -> None:
    bench = benches(architecture, dtype, fault, tmp_path / "model")
    fault.break_it(bench)
    record = judged(bench, bench.out, texts_file, "full")
    assert failed(record) >= {*fault.caught_by, *fault.logits}
    assert_named(record, fault)


@pytest.mark.llama
@pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first")
@pytest.mark.parametrize(("fault", "architecture", "dtype"), [c for c in CASES if c.values[0].gguf])
def test_the_gguf_shows_the_fault(
    fault: Fault,
    architecture: str,
    dtype: str,
    benches: BenchMaker,
    texts_file: Path,
    tmp_path: Path,
) -> None:
    bench = benches(architecture, dtype, fault, tmp_path / "model")
    candidate = fault.break_it(bench)
    assert candidate is not None
    record = judged(bench, candidate, texts_file, "full")
    assert failed(record) >= {*fault.caught_by, *fault.logits}
    assert_named(record, fault)


@pytest.mark.parametrize("seed", range(CORRECT))
def test_a_correct_bake_is_not_blamed(
    seed: int, make_model: Callable[..., Path], texts_file: Path, tmp_path: Path
) -> None:
    """Twenty bakes: architectures, dtypes, conventions, parametrizations, sites, sizes vary."""
    base = make_model(ARCHITECTURES[seed % 2], ("bfloat16", "float32", "float16")[seed % 3])
    gates = write_gates(
        base,
        tmp_path / "gates.safetensors",
        seed=100 + seed,
        scale=(0.05, 0.1, 0.2)[seed // 2 % 3],
        convention=list(Convention)[seed // 2 % 2],
        parametrization=list(Parametrization)[seed % 5],
        site=list(Site)[seed // 3 % 2],
    )
    bake(BakeConfig(base=base, rotations=gates, out=tmp_path / "model", verify=False))
    bench = Bench(base, gates, tmp_path / "model")
    record = judged(bench, bench.out, texts_file, "full")
    assert [(c.id, c.detail) for c in record.checks if c.verdict is not Verdict.PASS] == []
    assert record.verdict is Verdict.PASS
    assert record.diagnosis == ()


@pytest.mark.llama
@pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_correct_ggufs_are_not_blamed(
    architecture: str, benches: BenchMaker, texts_file: Path, tmp_path: Path
) -> None:
    """4 bits cost a tiny model its top tokens, but its weights are right."""
    bench = benches(architecture, "bfloat16", FAULTS[0], tmp_path / "model")
    assert bench.gguf is not None
    source = bench.gguf(bench.out)
    quantize(QuantizeConfig(gguf=source, out=tmp_path, types=("Q8_0", "Q4_K_M")))
    for candidate in (source, tmp_path / "tiny-Q8_0.gguf"):
        record = judged(bench, candidate, texts_file, "full")
        assert {c.verdict for c in record.checks} == {Verdict.PASS}
        assert record.diagnosis == ()
    record = judged(bench, tmp_path / "tiny-Q4_K_M.gguf", texts_file, "files")
    assert {c.verdict for c in record.checks} == {Verdict.PASS}
    assert record.diagnosis == ()


def test_the_document_is_the_tables() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == fault_matrix(), (
        "run: python tests/faults/document.py"
    )


def test_the_matrix_is_large_enough() -> None:
    assert len({fault.text for fault in FAULTS}) == len(FAULTS) >= 30
