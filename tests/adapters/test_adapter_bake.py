"""W' of every method against PEFT's own unmerged forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_cases import METHODS, adapter, effective, load, logits, unmerged

from so8tqc.adapters.changed import AdapterPatch
from so8tqc.adapters.plan import plan_adapters
from so8tqc.checkpoints.patch import tensor_view
from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.config import BakeConfig
from so8tqc.records import Verdict
from so8tqc.rotations.fold import to_storage
from so8tqc.services.bake import bake

IDS = torch.arange(7, 31)[None]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gemma3_text", "qwen2_vl"])
def test_w_is_what_pefts_forward_multiplies_by(
    architecture: str, method: str, make_model, tmp_path: Path
) -> None:
    model = make_model(architecture, "float32")
    directory = adapter(model, tmp_path / "a", method)
    plan = plan_adapters(open_checkpoint(model), [directory], None, dtype="keep")
    live = unmerged(model, [directory], torch.float32)
    modules = dict(live.named_modules())
    changed = {c.entry.name: c for c in plan.changed}
    seen = 0
    for name, module in modules.items():
        if not hasattr(module, "base_layer") or not hasattr(module, "adapter_layer_names"):
            continue
        path = name.removeprefix("base_model.model.")
        found = [
            c
            for n, c in changed.items()
            if n.endswith(".".join(path.split(".")[-4:]) + ".weight") and len(c.entry.shape) == 2
        ]
        assert len(found) == 1, path
        expected = effective(module, found[0].entry.shape[1])
        got = found[0].whole_in_float64()
        scale = float(expected.abs().max())
        assert float((got - expected).abs().max()) < 1e-12 * max(scale, 1.0)
        base = tensor_view(found[0].entry).double()
        assert float((got - base).abs().max()) > 1e-3 * scale  # it does something
        seen += 1
    assert seen == len(live.base_model.targeted_module_names) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_each_element_is_the_exact_value_rounded_once(
    method: str, dtype: str, make_model, tmp_path: Path
) -> None:
    model = make_model("llama", dtype)
    directory = adapter(model, tmp_path / "a", method)
    plan = plan_adapters(open_checkpoint(model), [directory], None, dtype="keep")
    for changed in plan.changed[:3]:
        stored = torch.cat(list(AdapterPatch(changed).pieces(tensor_view(changed.entry))))
        value = changed.whole_in_float64()
        near = to_storage(value, stored.dtype)
        differs = stored.ne(near)
        assert int(differs.sum()) <= 3  # only where float64 itself is on the boundary
        assert stored.dtype == getattr(torch, dtype)


MODELS = ["llama", "qwen3", "phi3", "gemma3_text", "mixtral", "qwen2_vl"]
"""The architectures of the claim; phi3 fuses its projections, mixtral has experts."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", MODELS)
def test_a_baked_directory_has_pefts_unmerged_logits(
    architecture: str, method: str, dtype: str, make_model, tmp_path: Path
) -> None:
    model = make_model(architecture, dtype)
    directory = adapter(model, tmp_path / "a", method)
    record = bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "out"))
    assert record.verdict is Verdict.PASS, [c for c in record.checks if c.verdict is Verdict.FAIL]
    fine = tmp_path / "fine"
    bake(BakeConfig(base=model, rotations=directory, out=fine, baked_dtype="float32"))
    expected = logits(unmerged(model, [directory], getattr(torch, dtype)), IDS)
    effect = float((expected - logits(load(model, torch.float64), IDS)).abs().max())

    def distance(candidate: Path) -> float:
        return float((logits(load(candidate, torch.float64), IDS) - expected).abs().max())

    # the changed tensors' own rounding: to float32 2⁻²⁵ of each element, to bfloat16 2⁻⁹
    assert distance(fine) < 2e-5 * effect
    assert distance(tmp_path / "out") < {"float32": 2e-5, "bfloat16": 0.3}[dtype] * effect
