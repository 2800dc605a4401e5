"""Calibration as a whole, on logit sources whose right temperature is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
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
    InputError,
    MissingToolError,
    ModelError,
)
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.norm import NORM_TEMPERATURE
from so8tqc.gguf.rewrite import CALIBRATION_TEMPERATURE, SAMPLING_TEMPERATURE
from so8tqc.progress import SilentProgress
from so8tqc.records import Check, Record, Verdict
from so8tqc.reports.kinds.calibrate import calibration_tables
from so8tqc.services import pages
from so8tqc.services.calibrate import beyond as temperature_beyond
from so8tqc.services.calibrate import service
from so8tqc.services.calibrate.holdout import Split, split_texts
from so8tqc.services.calibrate.summary import temperature_summary
from so8tqc.services.calibrate.verdict import Calibration, calibrate_source, temperature_checks
from so8tqc.services.pages import Pages, draw_pages
from so8tqc.sources.protocol import EncodedText, TokenIds
from so8tqc.sources.temperatures import frequent_tokens

V = 40
MEASURES = {"nll", "ece", "adaptive_ece", "classwise_ece", "brier", "sharpness"}
OPTIONS = CalibrateOptions(resamples=300)


class FakeSource:
    """Logits that were made beforehand, found by the text's tokens."""

    def __init__(self, logits: dict[bytes, np.ndarray], vocab_size: int = V) -> None:
        self.name = "fake"
        self.vocab_size = vocab_size
        self.passes = 0
        self.closed = False
        self._logits = logits

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        self.passes += 1
        z = torch.from_numpy(self._logits[tokens.tobytes()])
        yield from z[first:].split(rows)

    def close(self) -> None:
        self.closed = True


World = tuple[FakeSource, list[EncodedText], Split]


def _text(number: int, tokens: np.ndarray) -> EncodedText:
    return EncodedText(f"t{number}", tokens, "en" if number % 2 else "ja", f"c{number % 3}")


def _world(temperature: float, *, seed: int = 0, texts: int = 16, tokens: int = 120) -> World:
    """Each next token is drawn from softmax(z / temperature)."""
    generator = np.random.default_rng(seed)
    logits, encoded = {}, []
    for number in range(texts):
        z = (generator.normal(size=(tokens, V)) * 2.5).astype(np.float32)
        following = (z / temperature + generator.gumbel(size=z.shape)).argmax(axis=1)
        ids = np.concatenate([[number], following[:-1]]).astype(np.int64)
        logits[ids.tobytes()] = z
        encoded.append(_text(number, ids))
    return FakeSource(logits), encoded, split_texts(encoded, 0.5, 0)


def _calibrate(world: World, options: CalibrateOptions = OPTIONS) -> Calibration:
    source, texts, split = world
    return calibrate_source(source, texts, split, options)


def _check(calibration: Calibration, name: str) -> Check:
    return next(c for c in temperature_checks(calibration) if c.id == f"calibration.{name}")


def test_known_temperature_is_found_used_and_helps() -> None:
    world = _world(1.7)
    calibration = _calibrate(world)
    assert calibration.temperature == calibration.fit.temperature
    assert calibration.temperature == pytest.approx(1.7, abs=0.15)
    assert calibration.fit.ci95 is not None
    assert calibration.fit.ci95[0] < 1.7 < calibration.fit.ci95[1]
    assert calibration.significant
    for name in ("nll", "ece", "adaptive_ece", "brier"):
        assert calibration.used[name].better
    assert {c.verdict for c in temperature_checks(calibration)} == {Verdict.PASS}


def test_one_pass_whatever_the_number_of_temperatures() -> None:
    world = _world(1.7)
    _calibrate(world)
    assert world[0].passes == len(world[1])


def test_held_out_numbers_are_those_of_full_logits_of_held_out_texts() -> None:
    source, texts, split = _world(1.7)
    calibration = _calibrate((source, texts, split))
    nll = []
    for index in split.holdout:
        tokens = texts[index].tokens
        z = torch.cat(list(source.logits(tokens, 1000)))[:-1].double() / calibration.temperature
        logp = z.log_softmax(dim=1)
        nll.append(-logp[torch.arange(len(tokens) - 1), torch.from_numpy(tokens[1:])])
    assert calibration.used["nll"].after == pytest.approx(float(torch.cat(nll).mean()), abs=1e-5)


def test_a_gain_that_may_be_chance_is_not_used() -> None:
    calibration = _calibrate(_world(1.0))
    assert calibration.fit.temperature != 1.0
    assert not calibration.significant
    assert calibration.temperature == 1.0
    for name in ("nll", "ece", "brier"):
        check = _check(calibration, name)
        assert (check.value, check.limit, check.verdict) == (0.0, 0.0, Verdict.PASS)
        assert "T = 1 is used" in check.detail


def test_a_fit_at_a_bound_is_not_used_though_it_helps() -> None:
    options = CalibrateOptions(resamples=300, bounds=(0.9, 1.2))
    calibration = _calibrate(_world(2.0), options)
    assert calibration.fit.at_bound
    assert calibration.fitted["nll"].better
    assert not calibration.significant
    assert calibration.temperature == 1.0


def _sure_misses() -> World:
    """Calibrated at T = 1, yet every miss goes to a token the model rules out.

    A higher temperature saves much NLL on the misses and makes all the rest under-confident.
    """
    generator = np.random.default_rng(0)
    logits, encoded = {}, []
    for number in range(16):
        following = np.ones(100, dtype=np.int64)
        following[generator.uniform(size=100) < 0.2] = 2
        ids = np.concatenate([[number], following[:-1]])
        z = np.full((100, V), -1.0, dtype=np.float32)
        z[:, 1] = np.log(0.8 / (0.2 / 38)) - 1.0  # p = 0.8, right four times in five
        z[:, 2] = -6.0
        logits[ids.tobytes()] = z
        encoded.append(_text(number, ids))
    return FakeSource(logits), encoded, split_texts(encoded, 0.5, 0)


def test_a_temperature_that_worsens_ece_fails_its_check() -> None:
    calibration = _calibrate(_sure_misses())
    assert calibration.significant
    assert _check(calibration, "nll").verdict is Verdict.PASS
    ece = _check(calibration, "ece")
    assert ece.verdict is Verdict.FAIL
    assert ece.ci95 is not None
    assert ece.ci95[0] > 0


def test_the_ece_objective_refuses_what_nll_would_accept() -> None:
    options = CalibrateOptions(resamples=300, objective="ece")
    calibration = _calibrate(_sure_misses(), options)
    assert calibration.judged_by == "ece"
    assert _check(calibration, "ece").verdict is Verdict.PASS


@pytest.mark.parametrize("objective", ["brier", "ece"])
def test_other_objectives_find_the_temperature(objective: str) -> None:
    options = CalibrateOptions.model_validate({"objective": objective, "resamples": 300})
    calibration = _calibrate(_world(1.7), options)
    assert calibration.judged_by == objective
    assert calibration.significant
    assert calibration.temperature == pytest.approx(1.7, abs=0.25)


def test_entropy_matches_the_reference() -> None:
    source, texts, split = _world(1.5)
    reference = FakeSource({key: z / np.float32(1.5) for key, z in source._logits.items()})
    options = CalibrateOptions(resamples=300, objective="entropy")
    calibration = calibrate_source(source, texts, split, options, reference=reference)
    assert calibration.fit.temperature == pytest.approx(1.5, abs=1e-3)
    assert calibration.judged_by == "nll"
    assert calibration.reference is not None
    assert calibration.reference.at(1.0).entropy.mean() == pytest.approx(
        calibration.holdout_table.at(1.5).entropy.mean(), abs=1e-3
    )


def test_confidence_variance_is_degenerate_and_not_used() -> None:
    options = CalibrateOptions(resamples=300, objective="confidence-variance")
    calibration = _calibrate(_world(1.7), options)
    assert calibration.fit.at_bound
    assert calibration.temperature == 1.0


def test_another_vocabulary_is_refused() -> None:
    source, texts, split = _world(1.5)
    with pytest.raises(InputError, match="cannot be compared"):
        calibrate_source(source, texts, split, OPTIONS, reference=FakeSource({}, V + 1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_logits_name_text_and_position(value: float) -> None:
    source, texts, split = _world(1.5, tokens=300)
    source._logits[texts[3].tokens.tobytes()][201, 5] = value
    with pytest.raises(DataError, match="t3: fake yields non-finite logits at position 201"):
        calibrate_source(source, texts, split, OPTIONS)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    source, texts, split = _world(1.5)
    texts[2].tokens[7] = V
    with pytest.raises(DataError, match=r"t2: token 40 at position 7 .* tokenizer"):
        calibrate_source(source, texts, split, OPTIONS)


# The service, from files to files


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
        "nll", "brier", "ece", "entropy", "confidence-variance",
    ]  # fmt: skip
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


# Every objective, and beyond one number


def test_every_objective_is_reported_from_the_same_pass() -> None:
    source, texts, split = _world(1.7)
    reference = FakeSource({key: z / np.float32(1.5) for key, z in source._logits.items()})
    calibration = calibrate_source(source, texts, split, OPTIONS, reference=reference)
    assert source.passes == len(texts)
    fits = calibration.objectives
    assert list(fits) == ["nll", "brier", "ece", "entropy", "confidence-variance"]
    assert fits["confidence-variance"].at_bound
    assert fits["entropy"].temperature == pytest.approx(1.5, abs=1e-3)
    assert all(fit.converged for fit in fits.values())
    for name, fit in fits.items():
        alone = CalibrateOptions.model_validate({"resamples": 300, "objective": name})
        world = calibrate_source(source, texts, split, alone, reference=reference)
        assert world.fit.temperature == fit.temperature
    without = _calibrate((source, texts, split))
    assert "entropy" not in without.objectives


def _two_languages(english: float, japanese: float, seed: int = 0) -> World:
    """As _world, with a temperature for each language."""
    generator = np.random.default_rng(seed)
    logits, encoded = {}, []
    for number in range(40):
        text = _text(number, np.empty(0))
        z = (generator.normal(size=(100, V)) * 2.5).astype(np.float32)
        temperature = english if text.language == "en" else japanese
        following = (z / temperature + generator.gumbel(size=z.shape)).argmax(axis=1)
        ids = np.concatenate([[number], following[:-1]]).astype(np.int64)
        logits[ids.tobytes()] = z
        encoded.append(_text(number, ids))
    return FakeSource(logits), encoded, split_texts(encoded, 0.5, 0)


def test_languages_that_differ_get_their_own_temperature() -> None:
    calibration = _calibrate(_two_languages(1.1, 2.2))
    languages = calibration.groups["language"]
    assert languages.significant
    assert languages.temperatures["en"].temperature == pytest.approx(1.1, abs=0.12)
    assert languages.temperatures["ja"].temperature == pytest.approx(2.2, abs=0.25)
    assert languages.against == pytest.approx(calibration.objectives["nll"].temperature)
    assert not calibration.groups["category"].significant
    written = temperature_summary(calibration, OPTIONS)["group_temperatures"]
    assert isinstance(written, dict)
    assert set(written["language"]["temperatures"]) == {"en", "ja"}
    assert written["category"]["temperatures"] is None


def test_languages_that_are_alike_do_not() -> None:
    supported = [
        _calibrate(_two_languages(1.5, 1.5, seed)).groups["language"].significant
        for seed in range(6)
    ]
    assert sum(supported) <= 1


def _entropy_world(b: float, seed: int = 0) -> World:
    """Next tokens drawn from softmax(z / (1 + b·H)), sure and unsure positions."""
    generator = np.random.default_rng(seed)
    logits, encoded = {}, []
    for number in range(30):
        z = generator.normal(size=(150, V)) * generator.uniform(0.5, 5.0, size=(150, 1))
        p = torch.from_numpy(z).softmax(dim=1)
        entropy = torch.special.entr(p).sum(dim=1, keepdim=True).numpy()
        following = (z / (1.0 + b * entropy) + generator.gumbel(size=z.shape)).argmax(axis=1)
        ids = np.concatenate([[number], following[:-1]]).astype(np.int64)
        logits[ids.tobytes()] = z.astype(np.float32)
        encoded.append(_text(number, ids))
    return FakeSource(logits), encoded, split_texts(encoded, 0.5, 0)


def test_equal_temperatures_differ_by_nothing() -> None:
    calibration = _calibrate(_two_languages(1.5, 1.5))
    language = calibration.groups["language"]
    nll, error = temperature_beyond._gains(
        calibration.holdout_table,
        language.against,
        np.full(len(calibration.holdout_table), language.against),
        OPTIONS,
    )
    assert (nll.difference, nll.ci95, error.difference) == (0.0, (0.0, 0.0), 0.0)
    assert not nll.better


def test_a_temperature_that_grows_with_entropy_is_found() -> None:
    judged = _calibrate(_entropy_world(0.5)).entropy
    assert judged.significant
    assert (judged.rule.a, judged.rule.b) == pytest.approx((1.0, 0.5), abs=0.2)
    assert judged.nll.ci95 is not None
    assert judged.nll.ci95[1] < 0


def test_a_temperature_that_does_not_is_not_claimed() -> None:
    claims = [_calibrate(_entropy_world(0.0, seed)).entropy.significant for seed in range(6)]
    assert sum(claims) <= 1


# Against the unquantized model


def test_back_where_the_original_was() -> None:
    """The quantized model is the original, sharpened by 1.7; the fit undoes it."""
    source, texts, split = _world(1.7)
    reference = FakeSource({key: z / np.float32(1.7) for key, z in source._logits.items()})
    calibration = calibrate_source(source, texts, split, OPTIONS, reference=reference)
    against = temperature_summary(calibration, OPTIONS)["against_reference"]
    assert isinstance(against, dict)
    assert set(against) == MEASURES - {"sharpness"}
    for name in ("nll", "ece", "brier"):
        row = against[name]
        assert row["before"]["difference"] > 0.01
        assert abs(row["after"]["difference"]) < row["before"]["difference"] / 4
        assert row["back"] is True


def test_what_quantization_destroyed_does_not_come_back() -> None:
    source, texts, split = _world(1.7)
    generator = np.random.default_rng(9)
    true = {key: z / np.float32(1.7) for key, z in source._logits.items()}
    noisy = {
        key: (z + 0.8 * generator.normal(size=z.shape)).astype(np.float32)
        for key, z in true.items()
    }
    calibration = calibrate_source(
        FakeSource(noisy), texts, split, OPTIONS, reference=FakeSource(true)
    )
    assert calibration.significant
    against = temperature_summary(calibration, OPTIONS)["against_reference"]
    assert isinstance(against, dict)
    assert against["nll"]["back"] is False
    assert against["brier"]["back"] is False


def test_classes_are_the_most_frequent_next_tokens() -> None:
    texts = [
        EncodedText("a", np.array([9, 3, 3, 5, 5, 7])),
        EncodedText("b", np.array([9, 5, 1, 7])),
    ]
    assert frequent_tokens(texts, 3).tolist() == [5, 3, 7]
    assert frequent_tokens(texts, 99).tolist() == [5, 3, 7, 1]


def test_classwise_ece_is_that_of_full_logits() -> None:
    source, texts, split = _world(1.7)
    calibration = _calibrate((source, texts, split))
    classes = frequent_tokens(texts, OPTIONS.classes).tolist()
    rows, following = [], []
    for index in split.holdout:
        tokens = texts[index].tokens
        z = torch.cat(list(source.logits(tokens, 1000)))[:-1].double() / calibration.temperature
        rows.append(z.softmax(dim=1).numpy())
        following.append(tokens[1:])
    p, y = np.concatenate(rows), np.concatenate(following)
    total, edges = 0.0, np.linspace(0, 1, 16)
    for c in classes:
        for low, high in pairwise(edges):
            inside = (p[:, c] > low) & (p[:, c] <= high)
            if inside.any():
                total += inside.mean() * abs((y[inside] == c).mean() - p[inside, c].mean())
    after = calibration.used["classwise_ece"].after
    assert after == pytest.approx(total / len(classes), abs=2e-4)


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
    from so8tqc.metrics.temperature_fit import Change
    from so8tqc.metrics.temperature_groups import GroupTemperature
    from so8tqc.services.calibrate.beyond import JudgedGroups
    from so8tqc.services.calibrate.service import _ends

    gain = Change(3.0, 2.9, (-0.2, -0.05))
    groups = {
        name: GroupTemperature(temperature, temperature, 1.0, 9)
        for name, temperature in (("law", 1.1), ("art", 1.25), ("", 0.95))
    }
    judged = JudgedGroups(groups, 1.0, gain, gain, True)
    assert _ends(judged) == "0.950 (unnamed) … 1.250 (art)"
