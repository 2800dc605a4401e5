"""Tiny models, and files of them in three types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from parted import save_model

from so8tqc.config import ExportConfig, QuantizeConfig
from so8tqc.services.export.service import write_gguf
from so8tqc.services.quantize.service import quantize

TYPES = ("Q8_0", "Q4_K")


@pytest.fixture(scope="session")
def parted_model(
    tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Build (once each) a tiny model of an architecture."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp("parted") / architecture
            made[architecture] = save_model(folder, architecture, tokenizer_files)
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def parted_files(
    parted_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Path]]:
    """GGUF files of such a model (once each): type → file."""
    made: dict[str, dict[str, Path]] = {}

    def make(architecture: str) -> dict[str, Path]:
        if architecture not in made:
            folder = tmp_path_factory.mktemp("files")
            whole = folder / "F16.gguf"
            write_gguf(ExportConfig(model=parted_model(architecture), out=whole))
            out = folder / "quantized"
            quantize(QuantizeConfig(gguf=whole, out=out, types=("Q8_0", "Q4_K_S"), pure=True))
            made[architecture] = {"F16": whole} | {
                kind: next(out.glob(f"*{kind}*.gguf")) for kind in TYPES
            }
        return made[architecture]

    return make


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter takes seconds to tell of a directory; what it says does not change."""
    from so8tqc.services.locate import sides

    real = sides.traced

    def remembered(checkpoint):  # type: ignore[no-untyped-def]
        if checkpoint.directory not in _TOLD:
            _TOLD[checkpoint.directory] = real(checkpoint)
        return _TOLD[checkpoint.directory]

    monkeypatch.setattr(sides, "traced", remembered)


_TOLD: dict[Path, object] = {}
