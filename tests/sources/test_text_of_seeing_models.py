"""The text model's GGUF of a model that sees, by its weights: no projector is in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from so8tqc.config import ExportConfig, QCConfig
from so8tqc.llama.vendor import is_vendored
from so8tqc.records import Verdict
from so8tqc.services.export.service import write_gguf
from so8tqc.services.qc.service import qc

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl"])
def test_its_weights_are_run_without_the_projector(
    kind: str, make_vision_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers runs the directory whole; the file's weights give its logits."""
    model = make_vision_model(kind)
    path = tmp_path / "text-F32.gguf"
    write_gguf(ExportConfig(model=model, out=path, type="f32", text_only=True))
    record = qc(
        QCConfig(
            reference=model,
            candidates=(path,),
            out=tmp_path / "qc",
            data=("builtin:validation",),
            max_tokens=32,
            resamples=100,
            gguf_reading="weights",
        )
    )
    check = record.check("kl.mean", path.name)
    assert check.value is not None
    assert check.value < 1e-9
    assert check.verdict is Verdict.PASS
