"""``qc --stream``: what it says is what the resident one says, and of a GGUF both readings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from so8tqc.config import BakeConfig, CaptureConfig, ExportConfig, QCConfig, QuantizeConfig
from so8tqc.errors import ConfigError, InputError
from so8tqc.record_kinds.qc import QCMetrics
from so8tqc.records import Record, Verdict
from so8tqc.services.bake import bake
from so8tqc.services.capture import capture
from so8tqc.services.export.service import write_gguf
from so8tqc.services.qc import readings
from so8tqc.services.qc.service import qc
from so8tqc.services.qc.token_file import read_tokens
from so8tqc.services.quantize.service import quantize
from so8tqc.sources.layerwise import choice
from so8tqc.sources.layerwise.walk import LayerPass


def judged(out: Path, texts: Path, reference: Path, *candidates: Path, **options: Any) -> Record:
    return qc(
        QCConfig(
            reference=reference,
            candidates=candidates,
            data=(str(texts),),
            out=out,
            max_tokens=48,
            resamples=200,
            **options,
        )
    )


def same_tables(one: Path, other: Path) -> bool:
    a, b = read_tokens(one / "tokens.npz"), read_tokens(other / "tokens.npz")
    assert a.keys() == b.keys()
    return all(
        np.array_equal(a[name].columns[column], b[name].columns[column])
        for name in a
        for column in a[name].columns
    )


def test_streamed_and_resident_say_the_same_of_every_token(
    baked: tuple[Path, Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    base, gates, candidate = baked
    records = [
        judged(tmp_path / name, texts_file, base, candidate, rotations=gates, stream=stream)
        for name, stream in (("resident", False), ("streamed", True))
    ]
    assert same_tables(tmp_path / "resident", tmp_path / "streamed")
    plain, streamed = (QCMetrics.of(record) for record in records)
    for part in ("effect", "noise_floor", "arithmetic", "candidates"):
        assert getattr(plain, part) == getattr(streamed, part), part
    assert [c.verdict for c in records[0].checks] == [c.verdict for c in records[1].checks]
    assert not (tmp_path / "streamed" / ".layers").exists()


def test_by_itself_where_memory_would_not_suffice(
    baked: tuple[Path, Path, Path],
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, gates, candidate = baked
    monkeypatch.setattr(choice, "free_memory", lambda: 1000)
    record = judged(tmp_path / "a", texts_file, base, candidate, rotations=gates)
    assert any("run a layer at a time" in notice for notice in record.notices)
    record = judged(tmp_path / "b", texts_file, base, candidate, rotations=gates, stream=False)
    assert not any("layer at a time" in notice for notice in record.notices)


def test_killed_it_goes_on_and_writes_the_same_bytes(
    baked: tuple[Path, Path, Path],
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, gates, candidate = baked
    options: dict[str, Any] = {"rotations": gates, "stream": True}
    judged(tmp_path / "whole", texts_file, base, candidate, **options)
    through = LayerPass._through

    def dying(self: LayerPass, layer: int) -> None:
        if layer == 2:
            raise KeyboardInterrupt
        through(self, layer)

    monkeypatch.setattr(LayerPass, "_through", dying)
    with pytest.raises(KeyboardInterrupt):
        judged(tmp_path / "killed", texts_file, base, candidate, **options)
    monkeypatch.setattr(LayerPass, "_through", through)
    record = judged(tmp_path / "killed", texts_file, base, candidate, **options)
    assert any("goes on at layer 2" in notice for notice in record.notices)
    assert (tmp_path / "killed/tokens.npz").read_bytes() == (
        tmp_path / "whole/tokens.npz"
    ).read_bytes()


def test_stream_and_device_map_exclude_each_other(
    baked: tuple[Path, Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    base, _, candidate = baked
    with pytest.raises(ConfigError, match="or spread over devices"):
        judged(tmp_path / "q", texts_file, base, candidate, stream=True, device_map="auto")


@pytest.fixture
def files(baked: tuple[Path, Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    _, _, candidate = baked
    whole = tmp_path / "tiny-F32.gguf"
    write_gguf(ExportConfig(model=candidate, out=whole, type="f32"))
    quantize(QuantizeConfig(gguf=whole, types=("Q4_0",), out=tmp_path / "q", threads=1))
    return whole, tmp_path / "q/tiny-Q4_0.gguf"


@pytest.mark.llama
def test_both_readings_of_gguf_files(
    baked: tuple[Path, Path, Path],
    files: tuple[Path, Path],
    texts_file: Path,
    tmp_path: Path,
) -> None:
    base, gates, candidate = baked
    record = judged(
        tmp_path / "q1", texts_file, base, candidate, *files, rotations=gates, stream=True
    )
    found = QCMetrics.of(record)
    directory = found.candidates[candidate.name]
    assert found.readings.keys() == {path.name for path in files}
    whole, small = (found.readings[path.name] for path in files)
    # an F32 file's weights are the baked directory's, bit by bit, and so are their logits
    assert whole.weights == directory.kl_mean
    for reading in (whole, small):
        assert reading.libllama is not None
        assert reading.runtime is not None
    assert small.weights > 100 * whole.weights
    assert abs(small.weights - small.libllama) < 0.5 * small.libllama  # type: ignore[operator]
    assert 0 < small.runtime < small.weights  # type: ignore[operator]
    assert found.candidates[files[1].name].kl_mean == small.libllama


@pytest.mark.llama
def test_a_file_beyond_memory_is_judged_by_its_weights(
    baked: tuple[Path, Path, Path],
    files: tuple[Path, Path],
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, gates, _ = baked
    monkeypatch.setattr(readings, "free_memory", lambda: 1000)
    record = judged(tmp_path / "a", texts_file, base, files[1], rotations=gates, stream=False)
    assert any("judged by its weights" in notice for notice in record.notices)
    found = QCMetrics.of(record)
    assert found.readings[files[1].name].libllama is None
    assert found.candidates[files[1].name].kl_mean == found.readings[files[1].name].weights
    assert record.verdict in (Verdict.PASS, Verdict.FAIL)
    windows = {"protocol": "llama-perplexity", "ctx": 8}
    with pytest.raises(InputError, match="do not fit into the free memory"):
        judged(tmp_path / "b", texts_file, files[0], files[1], **windows)
    with pytest.raises(ConfigError, match="none is given"):
        judged(tmp_path / "c", texts_file, *files, gguf_reading="weights", tokenizer=base)


def test_captures_are_the_same(
    llama: Path, make_gates: Callable[..., Path], texts_file: Path, tmp_path: Path
) -> None:
    gates = make_gates(llama)
    for name, stream in (("a", False), ("b", True)):
        capture(
            CaptureConfig(
                model=llama,
                rotations=gates,
                data=(str(texts_file),),
                out=tmp_path / f"{name}.safetensors",
                max_tokens=32,
                stream=stream,
            )
        )
    a, b = ((tmp_path / f"{n}.safetensors").read_bytes() for n in "ab")
    assert a == b


def test_an_unstreamable_candidate_is_held_in_memory_and_said(
    llama: Path,
    make_gates: Callable[..., Path],
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    gates = make_gates(llama)
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked"))
    forward = LlamaModel.forward

    def looking(self: Any, *arguments: Any, **named: Any) -> Any:
        result = forward(self, *arguments, **named)
        return result if float(self.layers[0].mlp.up_proj.weight.sum()) else None

    monkeypatch.setattr(LlamaModel, "forward", looking)
    record = judged(
        tmp_path / "q", texts_file, llama, tmp_path / "baked", rotations=gates, stream=True
    )
    told = [notice for notice in record.notices if "held in memory" in notice]
    assert len(told) == 2
    assert "outside of that layer" in told[0]
    assert record.verdict is Verdict.PASS
