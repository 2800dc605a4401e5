"""The service, from files to files: what is written, what ships, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from so8tqc.config import CalibrateConfig, CalibrateOptions
from so8tqc.errors import (
    ConfigError,
    DataError,
    ExitCode,
    MissingToolError,
    ModelError,
)
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.norm import NORM_TEMPERATURE
from so8tqc.gguf.rewrite import CALIBRATION_TEMPERATURE, SAMPLING_TEMPERATURE
from so8tqc.progress import SilentProgress
from so8tqc.records import Record, Verdict
from so8tqc.reports.kinds.calibrate import calibration_tables
from so8tqc.services import pages
from so8tqc.services.calibrate import service
from so8tqc.services.pages import Pages, draw_pages
from so8tqc.sources.protocol import TokenIds

MEASURES = {"nll", "ece", "adaptive_ece", "classwise_ece", "brier", "sharpness"}


class _Overconfident:
    """Predicts the next token 40 % of the time, and says 99 %."""

    name = "overconfident"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        generator = np.random.default_rng(int(tokens.sum()))
        z = generator.normal(size=(tokens.size, self.vocab_size)).astype(np.float32)
        right = generator.uniform(size=tokens.size) < 0.4
        guess = generator.integers(0, self.vocab_size, tokens.size)
        following = np.append(tokens[1:], 0)
        z[np.arange(tokens.size), np.where(right, following, guess)] += 12.0
        yield from torch.from_numpy(z)[first:].split(rows)

    def close(self) -> None:
        pass


class _Honest(_Overconfident):
    """Knows nothing, and says so: no temperature helps."""

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        generator = np.random.default_rng(int(tokens.sum()))
        z = generator.normal(size=(tokens.size, self.vocab_size)).astype(np.float32) * 1e-4
        yield from torch.from_numpy(z)[first:].split(rows)


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    path = tmp_path / "model-Q5_K_M.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def config(
    gguf_file: Path,
    tokenizer_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> CalibrateConfig:
    monkeypatch.setattr(service, "_open", lambda *_: _Overconfident(512))
    return CalibrateConfig(
        gguf=gguf_file,
        tokenizer=tokenizer_files,
        out=tmp_path / "out",
        max_tokens=100,
        resamples=300,
        png=False,
    )


def test_writes_config_record_and_page(config: CalibrateConfig) -> None:
    record = service.calibrate(config)
    assert record.verdict is Verdict.PASS
    written = json.loads((config.out / "temperature_config.json").read_text())
    assert written["temperature"] == written["fitted"] == record.metrics["temperature"]
    assert written["temperature"] > 1.2
    assert written["significant"] is True
    assert written["objective"] == "nll"
    assert written["at_bound"] is False
    assert written["ci95"][0] < written["fitted"] < written["ci95"][1]
    for name in ("nll", "ece", "brier"):
        assert written["after"][name] < written["before"][name]
    assert written["model"]["sha256"] == record.inputs["gguf"].sha256
    split = record.metrics["split"]
    assert isinstance(split, dict)
    assert not set(split["fit"]) & set(split["holdout"])
    assert len(split["fit"]) + len(split["holdout"]) == 25
    json.loads(record.model_dump_json(), parse_constant=pytest.fail)  # no NaN anywhere
    assert set(record.outputs) == {"temperature_config"}
    assert draw_pages(record, config.out).files == [config.out / "reliability.html"]
    page = (config.out / "reliability.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme" in page
    assert page.count("plotly.js v") == 1
    assert "<script src=" not in page


def test_not_significant_writes_temperature_one(
    config: CalibrateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_open", lambda *_: _Honest(512))
    stale = config.out / f"{config.gguf.stem}-calibrated.gguf"
    stale.parent.mkdir()
    stale.write_bytes(b"of an earlier run")
    record = service.calibrate(config.model_copy(update={"apply": "metadata"}))
    written = json.loads((config.out / "temperature_config.json").read_text())
    assert written["temperature"] == 1.0
    assert written["significant"] is False
    assert written["after"] == written["before"]
    assert written["applied_to"] is None
    assert record.verdict is Verdict.PASS
    assert not stale.exists()
    assert any("No calibrated GGUF" in notice for notice in record.notices)


@pytest.mark.parametrize("sampling", [False, True])
def test_apply_metadata(config: CalibrateConfig, sampling: bool) -> None:
    before = config.gguf.read_bytes()
    record = service.calibrate(
        config.model_copy(update={"apply": "metadata", "sampling_temp": sampling})
    )
    path = config.out / "model-Q5_K_M-calibrated.gguf"
    fields = gguf.GGUFReader(str(path)).fields
    temperature = record.metrics["temperature"]
    assert fields[CALIBRATION_TEMPERATURE].contents() == pytest.approx(temperature, rel=1e-6)
    assert (SAMPLING_TEMPERATURE in fields) is sampling
    assert config.gguf.read_bytes() == before
    assert record.outputs["calibrated"].path == str(path)


def test_little_text_is_refused_unless_allowed(config: CalibrateConfig, texts_file: Path) -> None:
    small = config.model_copy(update={"data": (str(texts_file),), "max_tokens": 40})
    with pytest.raises(DataError, match=r"held-out tokens are too few .* --allow-small") as error:
        service.calibrate(small)
    assert error.value.exit_code is ExitCode.BAD_INPUT
    record = service.calibrate(small.model_copy(update={"allow_small": True}))
    assert record.metrics["ci95"] is None  # three texts: fitted and shown, never used
    assert record.metrics["temperature"] == 1.0
    assert any("an interval needs at least" in notice for notice in record.notices)


def test_a_model_directory_as_reference(
    config: CalibrateConfig, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the config fixture replaced _open altogether
    real = service._open
    monkeypatch.setattr(
        service, "_open", lambda path, c: real(path, c) if path.is_dir() else _Overconfident(512)
    )
    record = service.calibrate(
        config.model_copy(update={"objective": "entropy", "reference": llama})
    )
    entropy, reference = record.metrics["entropy"], record.metrics["reference"]
    assert isinstance(entropy, dict)
    assert isinstance(reference, dict)
    assert entropy["before"] < entropy["reference"]
    assert abs(entropy["fitted"] - entropy["reference"]) < abs(
        entropy["before"] - entropy["reference"]
    )
    assert set(reference) == MEASURES
    draw_pages(record, config.out)
    page = (config.out / "reliability.html").read_text(encoding="utf-8")
    for title in ("Against the unquantized model", "Every objective", "Beyond one temperature"):
        assert title in page
    tables = {title: rows for title, _, rows in calibration_tables(record)}
    assert [row[0] for row in tables["Every objective, on the fit texts"]] == [
        "nll",
        "brier",
        "ece",
        "entropy",
        "confidence-variance",
    ]
    assert len(tables["Beyond one temperature"]) == 3
    assert record.inputs["reference"].path == str(llama)


# The file that ships


class _Runtime(_Overconfident):
    """Runs a file: its logits are divided by what the file's norm carries."""

    def __init__(self, path: Path, *, honours_norm: bool = True, blur: float = 0.0) -> None:
        super().__init__(512)
        carried = float(open_gguf(path).fields.get(NORM_TEMPERATURE, 1.0))
        self.norm = carried if honours_norm else 1.0
        self.blur = blur if "calibrated" in path.name else 0.0

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        for block in super().logits(tokens, rows, first):
            noise = torch.randn(block.shape, generator=torch.Generator().manual_seed(0))
            yield block / self.norm + self.blur * noise


def _ship(
    config: CalibrateConfig, monkeypatch: pytest.MonkeyPatch, apply: str, **runtime: object
) -> Record:
    writer = gguf.GGUFWriter(str(config.gguf), "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(service, "_open", lambda path, _: _Runtime(path, **runtime))
    return service.calibrate(config.model_copy(update={"apply": apply}))


def _metric(record: Record, *keys: str) -> Any:
    value: Any = record.metrics
    for key in keys:
        value = value[key]
    return value


@pytest.mark.parametrize(("apply", "reader"), [("norm", 1.0), ("metadata", None)])
def test_the_numbers_are_those_of_the_file_that_ships(
    apply: str, reader: float | None, config: CalibrateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = _ship(config, monkeypatch, apply)
    assert record.check("calibration.applied_scale").verdict is Verdict.PASS
    assert record.check("calibration.applied_kl").verdict is Verdict.PASS
    written = json.loads((config.out / "temperature_config.json").read_text())
    assert written["applied"]["how"] == apply
    assert written["applied_to"] == written["applied"]["file"] == "model-Q5_K_M-calibrated.gguf"
    told = written["applied"]["reader_temperature"]
    assert told == pytest.approx(reader or written["temperature"], rel=1e-6)
    for name in MEASURES:
        assert written["after"][name] == pytest.approx(written["at_fitted"][name], abs=1e-3)
    assert written["after"] != written["at_fitted"]  # measured, not copied


def test_a_runtime_that_computes_something_else_is_found_out(
    config: CalibrateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = _ship(config, monkeypatch, "norm", honours_norm=False)
    scale, kl = (record.check(f"calibration.applied_{name}") for name in ("scale", "kl"))
    assert scale.value == pytest.approx(1.0 - 1.0 / _metric(record, "temperature"), abs=1e-6)
    assert scale.verdict is kl.verdict is record.verdict is Verdict.FAIL
    # and the report says what that file does, which is nothing
    assert _metric(record, "after", "ece") == pytest.approx(_metric(record, "before", "ece"))


def test_noise_in_the_logits_shows(
    config: CalibrateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = _ship(config, monkeypatch, "norm", blur=0.01)
    assert record.check("calibration.applied_kl").verdict is Verdict.FAIL
    assert record.check("calibration.ece").verdict is Verdict.PASS


def test_nothing_is_applied_that_is_not_significant(
    config: CalibrateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.out.mkdir()
    (config.out / "model-Q5_K_M-calibrated.gguf").write_bytes(b"of an earlier run")
    _ship(config.model_copy(update={"bounds": (0.99, 1.01)}), monkeypatch, "norm")
    written = json.loads((config.out / "temperature_config.json").read_text())
    assert (written["temperature"], written["applied"]) == (1.0, None)
    assert not (config.out / "model-Q5_K_M-calibrated.gguf").exists()


def test_soft_capping_is_refused_before_anything_is_run(
    config: CalibrateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = gguf.GGUFWriter(str(config.gguf), "gemma2")
    writer.add_final_logit_softcapping(30.0)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(service, "_open", lambda *_: pytest.fail("a model was opened"))
    with pytest.raises(ModelError, match="soft-caps its logits") as error:
        service.calibrate(config.model_copy(update={"apply": "norm"}))
    assert error.value.exit_code is ExitCode.BAD_INPUT
    assert not config.out.exists()


def test_a_temperature_is_not_applied_twice() -> None:
    with pytest.raises(ValueError, match="apply the temperature twice"):
        CalibrateOptions(apply="norm", sampling_temp=True)


@pytest.mark.png
def test_the_image_is_drawn(config: CalibrateConfig, llama: Path) -> None:
    record = service.calibrate(config.model_copy(update={"png": True}))
    drawn = draw_pages(record, config.out)
    image = (config.out / "reliability.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert int.from_bytes(image[16:20], "big") == 2200  # width
    assert drawn == Pages([config.out / "reliability.html", config.out / "reliability.png"])


def test_without_a_chrome_a_message_says_so(
    config: CalibrateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise MissingToolError("no Chrome that starts", remedy="Install one.")

    config.out.mkdir()
    (config.out / "reliability.png").write_bytes(b"of an earlier run")
    monkeypatch.setattr(pages, "draw_reliability_png", missing)
    record = service.calibrate(config.model_copy(update={"png": True}))
    told: list[str] = []
    drawn = draw_pages(record, config.out, progress=_Told(told))
    assert drawn == Pages([config.out / "reliability.html"], complete=False)
    assert not (config.out / "reliability.png").exists()
    assert told == ["The image was not drawn: no Chrome that starts. Install one."]


class _Told(SilentProgress):
    """Keeps the messages."""

    def __init__(self, messages: list[str]) -> None:
        self._messages = messages

    def message(self, text: str) -> None:
        self._messages.append(text)


def test_entropy_without_a_reference_is_a_config_error(config: CalibrateConfig) -> None:
    with pytest.raises(ConfigError, match="--reference"):
        service.calibrate(config.model_copy(update={"objective": "entropy"}))


def test_a_missing_model_is_named(config: CalibrateConfig, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.gguf: no such GGUF file"):
        service.calibrate(config.model_copy(update={"gguf": tmp_path / "nowhere.gguf"}))


def test_another_models_tokenizer_is_refused(
    config: CalibrateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_open", lambda *_: _Overconfident(100))
    with pytest.raises(DataError, match="Give the tokenizer that belongs to the model"):
        service.calibrate(config)


@pytest.mark.parametrize("bins", [5, 20])
def test_bins_are_those_asked_for(config: CalibrateConfig, bins: int) -> None:
    record = service.calibrate(config.model_copy(update={"bins": bins}))
    reliability = record.metrics["reliability"]
    assert isinstance(reliability, dict)
    before = reliability["before"]
    assert isinstance(before, dict)
    assert len(before["count"]) == bins
    tokens = record.metrics["tokens"]
    assert isinstance(tokens, dict)
    assert sum(before["count"]) == tokens["holdout"]


def test_the_notice_of_groups_names_the_lowest_and_the_highest() -> None:
    from so8tqc.metrics.temperature.fit import Change
    from so8tqc.metrics.temperature.groups import GroupTemperature
    from so8tqc.services.calibrate.beyond import JudgedGroups
    from so8tqc.services.calibrate.service import _ends

    gain = Change(3.0, 2.9, (-0.2, -0.05))
    groups = {
        name: GroupTemperature(temperature, temperature, 1.0, 9)
        for name, temperature in (("law", 1.1), ("art", 1.25), ("", 0.95))
    }
    judged = JudgedGroups(groups, 1.0, gain, gain, True)
    assert _ends(judged) == "0.950 (unnamed) … 1.250 (art)"
