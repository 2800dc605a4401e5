"""A model spread over memory and disk gives the numbers of one that is all in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from every_source import every_source
from so8tqc.config import QCConfig
from so8tqc.records import Verdict
from so8tqc.services.bake import bake
from so8tqc.services.qc.service import qc
from so8tqc.sources.hf import HFModel
from so8tqc.sources.protocol import LogitSource

TOKENS = np.random.default_rng(0).integers(0, 90, 24)


def logits(source: LogitSource) -> torch.Tensor:
    return torch.cat([block.clone() for block in source.logits(TOKENS, 10)])


@pytest.mark.parametrize(("kind", "stored"), [("llama", "float32"), ("qwen2", "bfloat16")])
def test_offloaded_weights_give_the_same_logits(
    kind: str, stored: str, make_model: Callable[..., Path], make_gates: Callable[..., Path]
) -> None:
    base = make_model(kind, stored)
    gates = make_gates(base)
    whole = HFModel.load(base)
    spread = HFModel.load(base, device_map="auto", max_memory={"cpu": 40_000})
    on_disk = Path(spread._offloaded.name) if spread._offloaded else None
    assert on_disk is not None
    assert any(p.device.type == "meta" for p in spread.module.parameters())
    theirs = every_source(spread, gates)
    values = {}
    for name, source in every_source(whole, gates).items():
        values[name] = logits(source)
        assert torch.equal(logits(theirs[name]), values[name]), name
    assert not torch.equal(values["gated"], values["plain"])
    spread.close()
    assert not on_disk.exists()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_right_bake_passes_in_every_compute_dtype(
    dtype: str,
    make_model: Callable[..., Path],
    make_gates: Callable[..., Path],
    texts_file: Path,
    tmp_path: Path,
) -> None:
    from so8tqc.config import BakeConfig

    base = make_model("llama", "bfloat16")
    gates, baked = make_gates(base), tmp_path / "baked"
    bake(BakeConfig(base=base, rotations=gates, out=baked))
    record = qc(
        QCConfig(
            reference=base,
            rotations=gates,
            candidates=(baked,),
            data=(str(texts_file),),
            out=tmp_path / "qc",
            compute_dtype=dtype,
            device_map="auto",
            resamples=200,
        )
    )
    assert record.verdict is Verdict.PASS, [c for c in record.checks if c.verdict is Verdict.FAIL]
