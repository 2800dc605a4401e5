"""What a record measured has one typed structure: services write it, reports read it."""

from __future__ import annotations

import ast
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from so8tqc.config import (
    AttestConfig,
    BakeConfig,
    CaptureConfig,
    ChooseConfig,
    IdentifyConfig,
    VerifyConfig,
)
from so8tqc.errors import InputError
from so8tqc.languages import Language
from so8tqc.record_files import read_record, write_record
from so8tqc.record_kinds.attest import AttestMetrics, RecheckMetrics, VerifyMetrics
from so8tqc.record_kinds.bake import BakeMetrics, LayerDrift, PlanMetrics
from so8tqc.record_kinds.base import Metrics, OnThisMachine
from so8tqc.record_kinds.calibrate import CalibrateMetrics
from so8tqc.record_kinds.capture import CaptureMetrics
from so8tqc.record_kinds.choose import ChooseMeasured, ChooseMetrics
from so8tqc.record_kinds.comparison import ComparisonMetrics
from so8tqc.record_kinds.export import ExportMetrics
from so8tqc.record_kinds.identify import IdentifyMetrics
from so8tqc.record_kinds.longtext import LongTextMetrics
from so8tqc.record_kinds.qc import QCMetrics
from so8tqc.record_kinds.quantize import QuantizeMeasured, QuantizeMetrics
from so8tqc.record_kinds.run import RunMetrics
from so8tqc.record_kinds.tools import VendorMetrics
from so8tqc.records import Record, RunInfo, Verdict, judge
from so8tqc.reports.kinds.bake import layer_table
from so8tqc.reports.kinds.calibrate import held_out_table
from so8tqc.reports.kinds.choose import row_table, speed_table
from so8tqc.reports.kinds.qc import candidate_table, split_table
from so8tqc.reports.summary import summarise_run
from so8tqc.services.attest.recheck import recheck
from so8tqc.services.attest.service import attest
from so8tqc.services.attest.verify_file import verify
from so8tqc.services.attest.verify_statement import verify_statement
from so8tqc.services.bake import plan
from so8tqc.services.capture import capture
from so8tqc.services.choose.service import choose
from so8tqc.services.compare.service import compare_runs
from so8tqc.services.identify.service import identify
from so8tqc.services.report import report
from so8tqc.services.vendor import vendor

SOURCES = Path(__file__).parents[2] / "src" / "so8tqc"
READERS = (*sorted((SOURCES / "reports").rglob("*.py")), SOURCES / "cli" / "show.py")
STAGES = {
    "bake": BakeMetrics,
    "export": ExportMetrics,
    "quantize": QuantizeMetrics,
    "calibrate": CalibrateMetrics,
    "qc": QCMetrics,
    "choose": ChooseMetrics,
    "longtext": LongTextMetrics,
}
MEASURED: dict[str, type[OnThisMachine]] = {"quantize": QuantizeMeasured, "choose": ChooseMeasured}


LAYER = LayerDrift(
    layer=0,
    target="q_proj",
    blocks=2,
    orthogonality_max=0.0,
    orthogonality_mean=0.0,
    angle_max=0.5,
    angle_mean=0.25,
)


def exactly(kind: type[Metrics], record: Record) -> None:
    """The structure has a place for every key of a record, and no required one is missing."""
    again = kind.model_validate(record.metrics).as_json()
    assert json.dumps(again, sort_keys=True) == json.dumps(record.metrics, sort_keys=True)


@pytest.mark.llama
def test_every_stage_writes_the_structure_of_its_kind(real_run: Path) -> None:
    for stage, kind in STAGES.items():
        record = read_record(real_run / stage / "record.json")
        exactly(kind, record)
        if stage in MEASURED:
            again = MEASURED[stage].model_validate(record.run.measured).as_json()
            assert again == record.run.measured
    exactly(RunMetrics, read_record(real_run / "record.json"))


@pytest.mark.llama
def test_what_works_on_a_run_writes_the_structure_of_its_kind(
    real_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(real_run, run)
    exactly(RunMetrics, report(run))
    exactly(RecheckMetrics, recheck(run))
    exactly(AttestMetrics, attest(AttestConfig(directory=run)))
    statement = VerifyConfig(file=run / "attestation.json", level="files")
    exactly(VerifyMetrics, verify_statement(statement))
    quantized = next((run / "quantize").glob("*Q8_0.gguf"))
    exactly(VerifyMetrics, verify(VerifyConfig(file=quantized)))
    comparison = compare_runs(real_run, run, tmp_path / "comparison")
    exactly(ComparisonMetrics, comparison)
    exactly(VendorMetrics, vendor())


@pytest.mark.llama
def test_single_services_write_the_structure_of_their_kind(real_run: Path, tmp_path: Path) -> None:
    config = read_record(real_run / "bake" / "record.json").config
    out = tmp_path / "baked"
    exactly(PlanMetrics, plan(BakeConfig.model_validate({**config, "out": out})))
    gguf = next((real_run / "export").glob("*.gguf"))
    texts = read_record(real_run / "qc" / "record.json").config["data"]
    assert isinstance(texts, list)
    baked = real_run / "bake" / "baked_model"
    recorded = tmp_path / "reference.safetensors"
    told = CaptureConfig(
        model=baked, out=recorded, data=tuple(map(str, texts)), max_tokens=32, dtype="float32"
    )
    exactly(CaptureMetrics, capture(told))
    found = choose(
        ChooseConfig(
            gguf=gguf,
            reference=recorded,
            out=tmp_path / "choice",
            types=("Q4_K_M", "Q8_0"),
            resamples=100,
            repeats=1,
            threads=1,
            max_kl=1e-4,
            max_evaluations=4,
        )
    )
    exactly(ChooseMetrics, found)
    assert found.metrics["search"]


@pytest.mark.parametrize("by", ["capture", "text"])
def test_an_identification_writes_the_structure_of_its_kind(
    llama: Path, texts_file: Path, tmp_path: Path, by: str
) -> None:
    gates = tmp_path / "gates.pt"
    theta = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(2)) * 0.2
    torch.save({f"model.layers.{i}.self_attn.rotation_gate.theta": theta for i in range(3)}, gates)
    data = (str(texts_file),)
    recorded = tmp_path / "recorded.safetensors" if by == "capture" else None
    if recorded is not None:
        capture(CaptureConfig(model=llama, out=recorded, data=data, max_tokens=32))
    found = identify(
        IdentifyConfig(
            base=llama, rotations=gates, capture=recorded, data=data, windows=4, resamples=100
        )
    )
    exactly(IdentifyMetrics, found)
    assert IdentifyMetrics.of(found).by == [by]
    assert len(IdentifyMetrics.of(found).readings) > 2


def record(kind: str, run: RunInfo | None = None, **metrics: object) -> Record:
    return Record(
        kind=kind,
        verdict=Verdict.PASS,
        checks=(judge("x.y", 0.0, 1.0, detail=""),),
        metrics=metrics,  # type: ignore[arg-type]
        run=run or RunInfo(started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.0),
    )


def test_a_record_of_an_older_version_still_reads() -> None:
    """Keys that it lacks, keys that are forgotten, numbers that JSON does not have."""
    bake = record("bake", layers=[{"layer": 0, "effect": 0.25, "drift_of_old": 1}])
    table = layer_table(bake)
    assert table is not None
    assert (table.header, table.rows) == (["layer", "effect"], [["0", "0.25"]])

    qc = record(
        "qc",
        candidates={"baked": {"kl_mean": 0.125, "kl_max": "inf", "nll_correlation": "nan"}},
        split={"baked": {"storage": "bfloat16"}},
        forgotten=[1, 2],
    )
    table = candidate_table(qc)
    assert table is not None
    assert (table.header, table.rows) == (
        ["candidate", "KL mean", "KL max"],
        [["baked", "0.125", "inf"]],
    )
    assert split_table(qc) is not None

    row = {
        "bytes": 1000,
        "kl_mean": 0.5,
        "kl_ci95": None,
        "kl_99": 1.0,
        "kl_99_ci95": None,
        "top1": 0.75,
        "top1_ci95": [0.5, 1.0],
        "ppl_ratio": 1.5,
        "ppl_ratio_ci95": None,
        "type": "Q8_0",
        "path": "q/m.gguf",
        "bits_per_weight": 8.5,
        "types": {"Q8_0": 7},
    }
    choice = record("choose", rows={"Q8_0": row}, recommended="Q8_0")
    table = row_table(choice)
    assert table is not None
    assert table.rows[0][0] == "→ Q8_0"
    assert table.rows[0][5] == "75.0 % (50.0 % … 100.0 %)"
    assert speed_table(choice) is None  # nothing about this machine

    calibrated = record("calibrate", temperature=1.5, significant=True, before={"ece": 0.5})
    assert held_out_table(calibrated) is None
    cards = summarise_run("r", {"calibrate": calibrated})["headline"]
    assert [(card["label"], card["value"]) for card in cards] == [("Temperature", "1.5")]


def test_nothing_is_read_for_what_a_service_must_write() -> None:
    """Only reading forgives: a service that leaves a key out does not make a record."""
    assert BakeMetrics.of(record("bake")).layers == []
    with pytest.raises(ValidationError, match="bytes_written"):
        BakeMetrics.model_validate({"layers": [], "orthogonality": []})
    with pytest.raises(ValidationError, match="drift"):
        LayerDrift.model_validate({**dict(LAYER), "drift": 1.0})
    with pytest.raises(ValidationError, match="a\n"):
        ComparisonMetrics.of(record("comparison"))


def test_a_record_of_another_shape_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    write_record(tmp_path / "qc" / "record.json", record("qc", candidates={"m": {"kl_mean": []}}))
    with pytest.raises(InputError, match=r"QCMetrics, candidates\.m\.kl_mean: .*valid number"):
        report(tmp_path, language=Language.ENGLISH)


def test_what_was_not_measured_is_not_written() -> None:
    written = VerifyMetrics(links={}, files=None).as_json()
    assert written == {"links": {}}


def reads(path: Path) -> list[str]:
    """Where a module could get at a metric that has no type."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Name(id="Any" | "cast") | ast.alias(name="Any" | "cast"):
                found.append("Any")
            case ast.Attribute(attr="metrics" | "measured"):
                found.append(f".{node.attr}")
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str()), *_]):
                found.append("getattr")
    text = path.read_text(encoding="utf-8")
    found += ["type: ignore"] * text.count("# type: ignore")
    return [f"{path.name}: {what}" for what in found]


@pytest.mark.parametrize("path", READERS, ids=lambda path: path.name)
def test_no_report_reads_a_metric_without_a_type(path: Path) -> None:
    """mypy is strict; without these four nothing that a record holds can be ``Any``."""
    assert reads(path) == []


def test_a_read_without_a_type_would_be_found(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "from typing import Any\n"
        "def f(record) -> Any:\n"
        "    return record.metrics['a'], record.run.measured.get('b')  # type: ignore\n"
    )
    assert [what.partition(": ")[2] for what in reads(module)] == [
        "Any",
        "Any",
        ".metrics",
        ".measured",
        "type: ignore",
    ]


def test_templates_are_handed_what_they_show() -> None:
    templates = (SOURCES / "reports" / "templates").glob("*.j2")
    assert not [path.name for path in templates if ".metrics" in path.read_text("utf-8")]
