"""Tokens whose experts rounding may choose otherwise: marked by the reference, counted apart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from so8tqc.config import BakeConfig, QCConfig
from so8tqc.metrics.columns import COLUMNS
from so8tqc.metrics.divergence import TokenTable
from so8tqc.record_kinds.qc import QCMetrics
from so8tqc.records import Record, Verdict
from so8tqc.reports.kinds.qc import routing_table
from so8tqc.services.bake import bake
from so8tqc.services.qc.service import qc
from so8tqc.services.qc.ties import judged, routing, routing_notice
from so8tqc.services.qc.token_file import read_tokens
from so8tqc.sources.gated import GatedSource
from so8tqc.sources.hf import HFModel
from so8tqc.sources.inputs.prepared import prepare
from so8tqc.sources.inputs.texts import load_tokenizer
from so8tqc.sources.routing import Choice, ties

TOKENS = 48


@pytest.fixture(scope="module")
def tied(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of four experts, two of which have one row of the router."""
    folder = tmp_path_factory.mktemp("tied") / "mixture"
    shutil.copytree(make_model("mixtral", "bfloat16"), folder)
    tensors = load_file(str(folder / "model.safetensors"))
    routers = [name for name in tensors if name.endswith(".gate.weight")]
    assert len(routers) == 3
    tensors[routers[1]][1] = tensors[routers[1]][0]
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def run(base: Path, gates: Path, texts: Path, folder: Path) -> Record:
    bake(BakeConfig(base=base, rotations=gates, out=folder / "baked"))
    return qc(
        QCConfig(
            reference=base,
            rotations=gates,
            candidates=(folder / "baked",),
            data=(str(texts),),
            max_tokens=TOKENS,
            resamples=100,
            out=folder / "qc",
        )
    )


def gaps(base: Path, gates: Path, texts: Path) -> np.ndarray[Any, Any]:
    """Of every scored token the smallest gap between the second and the third score of a router.

    Seen by hooks on the routers of the gated model, in float64.
    """
    from so8tqc.rotations.options import RotationOptions
    from so8tqc.rotations.read import read_rotations

    model = HFModel.load(base, dtype="float64")
    source = GatedSource(model, read_rotations(gates, RotationOptions()), "gated")
    seen: list[torch.Tensor] = []
    for layer in model.module.model.layers:
        weight = layer.mlp.gate.weight
        layer.mlp.gate.register_forward_pre_hook(
            lambda _, args, w=weight: seen.append(args[0].reshape(-1, w.shape[1]) @ w.T)
        )
    found = []
    for text in prepare((str(texts),), load_tokenizer(base), TOKENS).texts:
        seen.clear()
        list(source.logits(text.tokens, 64))
        tops = torch.stack([scores.sort(dim=1, descending=True).values for scores in seen])
        found.append((tops[:, :, 1] - tops[:, :, 2]).amin(dim=0)[text.scored].numpy())
    return np.concatenate(found)


def test_tokens_at_a_tie_are_marked_and_counted_apart(
    tied: Path, make_gates: Callable[..., Path], texts_file: Path, tmp_path: Path
) -> None:
    gates = make_gates(tied)
    record = run(tied, gates, texts_file, tmp_path)
    assert record.verdict is Verdict.PASS
    table = read_tokens(tmp_path / "qc" / "tokens.npz")["baked"]
    assert table.tie is not None
    gap = gaps(tied, gates, texts_file)
    assert table.tie[gap < 1e-9].all()
    assert not table.tie[gap > 0.2].any()
    assert 0 < table.tie.sum() < len(table)
    found = QCMetrics.of(record).candidates["baked"].routing
    assert found is not None
    assert found.others is not None
    assert found.ties.tokens == int(table.tie.sum())
    assert found.others.tokens == int((~table.tie).sum())
    assert found.ties.kl_mean == pytest.approx(float(table.columns["kl"][table.tie].mean()))
    assert found.others.kl_max == float(table.columns["kl"][~table.tie].max())
    said = f"at {table.tie.sum():,} of {len(table):,} tokens"
    assert any(said in notice for notice in record.notices)
    kl = next(check for check in record.checks if check.id == "kl.mean")
    assert found.apart == (table.tie.mean() <= 0.5)
    judged_by = found.others.kl_mean if found.apart else table.columns["kl"].mean()
    assert kl.value == pytest.approx(float(judged_by))
    shown = routing_table(record)
    assert shown is not None
    assert [row[0] for row in shown.rows] == ["baked, experts certain", "baked, experts at a tie"]


def test_a_model_without_experts_has_no_marks(
    llama: Path, make_gates: Callable[..., Path], texts_file: Path, tmp_path: Path
) -> None:
    record = run(llama, make_gates(llama), texts_file, tmp_path)
    assert read_tokens(tmp_path / "qc" / "tokens.npz")["baked"].tie is None
    assert QCMetrics.of(record).candidates["baked"].routing is None
    assert routing_table(record) is None
    assert not any("experts" in notice for notice in record.notices)


def table_of(tie: np.ndarray[Any, Any] | None) -> TokenTable:
    """Ten tokens of two texts whose KL is 1 at the first three and 0 at the others."""
    columns = {name: np.zeros(10) for name in COLUMNS}
    columns["kl"][:3] = 1.0
    text = np.repeat(np.arange(2, dtype=np.int32), 5)
    return TokenTable(columns, text, np.arange(10, dtype=np.int32), 7, ("a", "b"), None, tie)


def test_at_least_half_of_the_tokens_must_be_left() -> None:
    few, many = np.arange(10) < 3, np.arange(10) < 6
    assert judged(table_of(few)).columns["kl"].max() == 0
    assert len(judged(table_of(few))) == 7
    assert len(judged(table_of(many))) == 10
    assert len(judged(table_of(None))) == 10
    told = routing(table_of(many))
    assert told is not None
    assert not told.apart
    assert told.ties.kl_mean == 0.5
    assert "judged with the others" in str(routing_notice(table_of(many)))
    assert "30" in str(routing_notice(table_of(few)))
    assert routing(table_of(np.zeros(10, dtype=bool))) is None
    everything = routing(table_of(np.ones(10, dtype=bool)))
    assert everything is not None
    assert everything.others is None


def test_an_error_that_is_not_measured_is_a_share_of_the_largest_score() -> None:
    scores = torch.tensor([[8.0, 1.0, 0.999, -torch.inf], [8.0, 1.0, 0.99, -torch.inf]])
    assert ties([Choice(scores, 2)], None, 2.0**-13).tolist() == [True, False]
    assert not ties([Choice(scores, 2)], None).any()
    moved = scores + torch.tensor([[0.0], [0.005]])
    assert ties([Choice(scores, 2)], [Choice(moved, 2)]).tolist() == [False, True]
