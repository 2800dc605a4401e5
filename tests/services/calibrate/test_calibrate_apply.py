"""The file that ships, run by libllama itself."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from so8tqc.config import CalibrateConfig
from so8tqc.progress import SILENT
from so8tqc.records import Verdict
from so8tqc.services.calibrate.apply import (
    applied_checks,
    measure_applied,
    proof_logits,
    write_applied,
)
from so8tqc.services.calibrate.holdout import Split
from so8tqc.services.calibrate.verdict import Calibration, calibrate_source, shipped
from so8tqc.sources.gguf import GGUFSource
from so8tqc.sources.protocol import EncodedText

pytestmark = pytest.mark.llama

V, WIDTH, HIDDEN, T = 96, 256, 512, 1.3


def _llama(path: Path, kind: str) -> Path:
    """One layer of random weights, the output head of a type, without a tokenizer."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("none")
    generator = np.random.default_rng(0)
    shapes = {
        "token_embd": (V, WIDTH),
        "output": (V, WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        **{f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (HIDDEN, WIDTH),
        "blk.0.ffn_up": (HIDDEN, WIDTH),
        "blk.0.ffn_down": (WIDTH, HIDDEN),
    }
    for name, shape in shapes.items():
        if len(shape) == 1:
            values = 1.0 + 0.2 * generator.normal(size=shape)
        else:
            values = generator.normal(size=shape) * shape[-1] ** -0.5
        array = values.astype(np.float32)
        if name == "output" and kind != "f32":
            type_ = gguf.GGMLQuantizationType[kind.upper()]
            writer.add_tensor("output.weight", gguf.quants.quantize(array, type_), raw_dtype=type_)
        else:
            writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _open(path: Path) -> GGUFSource:
    return GGUFSource(path, path.name, threads=1, context=64)


@pytest.fixture
def texts() -> list[EncodedText]:
    generator = np.random.default_rng(1)
    return [EncodedText(f"t{i}", generator.integers(3, V, size=40)) for i in range(12)]


@pytest.fixture(params=["f32", "f16", "q8_0"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> CalibrateConfig:
    path = _llama(tmp_path / "tiny.gguf", request.param)
    return CalibrateConfig(gguf=path, tokenizer=tmp_path, out=tmp_path / "out", resamples=200)


def _calibrated(
    config: CalibrateConfig, texts: list[EncodedText]
) -> tuple[Calibration, list[np.ndarray], list[EncodedText]]:
    """As if T had been fitted to it."""
    split = Split(fit=np.arange(6), holdout=np.arange(6, 12))
    held_out = [texts[i] for i in split.holdout]
    with closing(_open(config.gguf)) as source:
        calibration = calibrate_source(source, texts, split, config)
        originals = proof_logits(source, held_out)
    return replace(calibration, temperature=T, significant=True), originals, held_out


@pytest.mark.parametrize("apply", ["norm", "metadata"])
def test_the_applied_file_has_the_original_at_t(
    apply: str, config: CalibrateConfig, texts: list[EncodedText]
) -> None:
    config = config.model_copy(update={"apply": apply})
    calibration, originals, held_out = _calibrated(config, texts)
    path = write_applied(config, T, SILENT)
    applied = measure_applied(path, _open, texts, held_out, calibration, originals, SILENT)
    for check in applied_checks(applied, T):
        assert check.verdict is Verdict.PASS, check
    assert applied.rows == 6 * 40
    assert applied.reader_temperature == pytest.approx(T if apply == "metadata" else 1.0)
    expected = calibration.holdout_table.at(T)
    for name in ("nll", "confidence", "brier"):
        assert getattr(applied.scored.scores, name).mean() == pytest.approx(
            getattr(expected, name).mean(), abs=2e-4
        )
    after = shipped(calibration, applied.scored, config)
    assert after.used["nll"].after == pytest.approx(expected.nll.mean(), abs=2e-4)
    assert after.used["nll"].before == pytest.approx(calibration.holdout_table.at(1.0).nll.mean())


def test_another_temperature_in_the_file_fails(
    config: CalibrateConfig, texts: list[EncodedText]
) -> None:
    config = config.model_copy(update={"apply": "norm"})
    calibration, originals, held_out = _calibrated(config, texts)
    path = write_applied(config, T * 1.0003, SILENT)
    applied = measure_applied(path, _open, texts, held_out, calibration, originals, SILENT)
    scale, kl = applied_checks(applied, T)
    assert scale.value == pytest.approx(3e-4, rel=0.1)
    assert scale.verdict is Verdict.FAIL
    assert kl.verdict is Verdict.PASS  # too little to matter, but not what was meant
