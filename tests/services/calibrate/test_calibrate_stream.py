"""A reference that is run a layer at a time is judged against as the resident one."""

from __future__ import annotations

from pathlib import Path

import pytest

from so8tqc.config import CalibrateConfig, ExportConfig
from so8tqc.services.calibrate.service import calibrate
from so8tqc.services.export.service import write_gguf
from so8tqc.sources.layerwise import choice


@pytest.mark.llama
def test_streamed_and_resident_references_are_one(
    llama: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny-F16.gguf"
    write_gguf(ExportConfig(model=llama, out=file, type="f16"))
    records = {}
    for stream in (False, True, None):
        if stream is None:
            monkeypatch.setattr(choice, "free_memory", lambda: 1000)
        records[stream] = calibrate(
            CalibrateConfig(
                gguf=file,
                tokenizer=llama,
                data=(str(texts_file),),
                out=tmp_path / str(stream),
                reference=llama,
                max_tokens=48,
                allow_small=True,
                resamples=200,
                png=False,
                stream=stream,
            )
        )
        assert not (tmp_path / str(stream) / ".layers").exists()
    assert records[True].metrics == records[False].metrics == records[None].metrics
    assert any("a layer at a time" in notice for notice in records[None].notices)
    assert not any("a layer at a time" in notice for notice in records[False].notices)
