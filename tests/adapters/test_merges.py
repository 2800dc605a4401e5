"""Merges that others made: named from the weights alone; right ones are left alone."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft_cases import METHODS, adapter, load
from safetensors.torch import load_file, save_file

from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.config import BakeConfig, QCConfig
from so8tqc.records import Verdict
from so8tqc.rotations.options import RotationOptions
from so8tqc.services.bake import bake
from so8tqc.services.qc.service import qc
from so8tqc.services.weights.quantizers import NF4, dequantized


def files_only(base: Path, adapters: list[Path], candidate: Path, out: Path, **more: object):
    first, *rest = adapters
    options = RotationOptions(adapters=tuple(rest), **more)
    return qc(
        QCConfig(
            reference=base,
            rotations=first,
            rotation_options=options,
            candidates=(candidate,),
            out=out,
            level="files",
        )
    )


def codes(record) -> list[str]:
    return [d.code for d in record.diagnosis]


Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors, Path], Tensors]


def edited(base: Path, directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The base's directory with other tensors."""
    shutil.copytree(base, directory)
    tensors = load_file(str(base / "model.safetensors"))
    save_file(
        {k: v.contiguous() for k, v in change(tensors).items()},
        str(directory / "model.safetensors"),
        metadata={"format": "pt"},
    )
    return directory


def deltas(directory: Path, scale: float) -> Tensors:
    """Stored weight name → s·B·A in float64, of a LoRA adapter."""
    parts = load_file(str(directory / "adapter_model.safetensors"))
    found = {}
    for key, a in parts.items():
        if key.endswith("lora_A.weight"):
            b = parts[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            found[name] = scale * b.double() @ a.double()
    return found


def merged(tensors: Tensors, changes: Tensors) -> Tensors:
    return {
        k: (v.double() + changes[k]).to(v.dtype) if k in changes else v for k, v in tensors.items()
    }


SCALE = 3.0  # alpha 12, rank 4
SQUARE = {"target_modules": ["q_proj", "o_proj"]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("code", "words", "change"),
    [
        ("not_baked", "base weight", lambda t, d: t),
        ("double_baked", "twice", lambda t, d: merged(t, {k: 2 * v for k, v in d.items()})),
        ("wrong_scale", "2 times", lambda t, d: merged(t, {k: 2 * v for k, v in d.items()})),
        ("wrong_scale", "alpha/√r", lambda t, d: merged(t, {k: 2 * v for k, v in d.items()})),
        ("wrong_scale", "0.333 ", lambda t, d: merged(t, {k: v / 3 for k, v in d.items()})),
        ("wrong_scale", "opposite sign", lambda t, d: merged(t, {k: -v for k, v in d.items()})),
        ("transposed", "(B·A)ᵀ", lambda t, d: merged(t, {k: v.T for k, v in d.items()})),
    ],
)
def test_lora_mistakes(
    code: str, words: str, change, dtype: str, make_model, tmp_path: Path
) -> None:
    base = make_model("llama", dtype)
    options = {"rank_pattern": {}} | SQUARE
    if words == "alpha/√r":  # told from "twice" by the rank alone
        options["r"], options["lora_alpha"] = 9, 27
        directory = adapter(base, tmp_path / "a", "lora", **options)
        wrong = {k: 3 * v for k, v in deltas(directory, 3.0).items()}
        candidate = edited(base, tmp_path / "m", lambda t: merged(t, wrong))
    else:
        directory = adapter(base, tmp_path / "a", "lora", **options)
        changes = deltas(directory, SCALE)
        candidate = edited(base, tmp_path / "m", lambda t: change(t, changes))
    record = files_only(base, [directory], candidate, tmp_path / "qc")
    assert record.verdict is Verdict.FAIL
    text = " ".join(d.text for d in record.diagnosis)
    if words == "2 times" or code == "double_baked":  # one and the same for a sum
        assert codes(record) == ["double_baked"]
    else:
        assert codes(record) == [code]
        assert words in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_missing_layers_and_exchanged_layers(dtype: str, make_model, tmp_path: Path) -> None:
    base = make_model("llama", dtype)
    directory = adapter(base, tmp_path / "a", "lora", **SQUARE)
    changes = deltas(directory, SCALE)
    some = {k: v for k, v in changes.items() if ".1." not in k}
    record = files_only(
        base, [directory], edited(base, tmp_path / "m1", lambda t: merged(t, some)), tmp_path / "q1"
    )
    assert [(d.code, d.layers) for d in record.diagnosis] == [("layer_missing", (1,))]
    exchanged = {
        k: changes[k.replace(".0.", ".#.").replace(".2.", ".0.").replace(".#.", ".2.")]
        for k in changes
    }
    record = files_only(
        base,
        [directory],
        edited(base, tmp_path / "m2", lambda t: merged(t, exchanged)),
        tmp_path / "q2",
    )
    assert [(d.code, d.layers) for d in record.diagnosis] == [("layers_permuted", (0, 2))]


def pefts_merge(
    base: Path, adapters: list[Path], out: Path, dtype: torch.dtype, *, safe=False, **more
) -> Path:
    """``merge_and_unload`` and ``save_pretrained``, as people do it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.PeftModel.from_pretrained(load(base, dtype), str(adapters[0]), "a0", **more)
        for i, path in enumerate(adapters[1:], start=1):
            live.load_adapter(str(path), f"a{i}")
        if len(adapters) > 1:
            live.base_model.set_adapter([f"a{i}" for i in range(len(adapters))])
        live.merge_and_unload(safe_merge=safe).save_pretrained(str(out))
    for file in base.iterdir():
        if not (out / file.name).exists():
            shutil.copy(file, out / file.name)
    config = json.loads((out / "config.json").read_text())
    stored = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "dtype": stored.get("dtype")}))
    return out


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"safe": True}),
        ("lora", {"autocast_adapter_dtype": False}),
        ("dora", {"autocast_adapter_dtype": False}),
    ],
)
def test_a_merge_in_bfloat16_is_named(
    method: str, options: dict[str, bool], make_model, tmp_path: Path
) -> None:
    base = make_model("llama", "bfloat16")
    directory = adapter(base, tmp_path / "a", method)
    candidate = pefts_merge(base, [directory], tmp_path / "m", torch.bfloat16, **options)
    record = files_only(base, [directory], candidate, tmp_path / "qc")
    assert codes(record) == ["coarse_merge"]
    assert "bfloat16" in record.diagnosis[0].text


def test_a_merge_into_a_dequantized_base_is_named(make_model, tmp_path: Path) -> None:
    base = make_model("llama", "bfloat16")
    directory = adapter(base, tmp_path / "a", "lora")
    changes = deltas(directory, SCALE)

    def change(tensors: Tensors) -> Tensors:
        quantized = {
            k: dict(dequantized(v.float()))["NF4, blocks of 64"].to(v.dtype) if k in changes else v
            for k, v in tensors.items()
        }
        return merged(quantized, changes)

    record = files_only(base, [directory], edited(base, tmp_path / "m", change), tmp_path / "qc")
    assert codes(record) == ["quantized_base"]
    assert "NF4" in record.diagnosis[0].text
    assert len(NF4) == 16


def test_dora_without_its_norms_is_named(make_model, tmp_path: Path) -> None:
    base = make_model("llama", "bfloat16")
    directory = adapter(base, tmp_path / "a", "dora")
    changes = deltas(directory, SCALE)
    candidate = edited(base, tmp_path / "m", lambda t: merged(t, changes))
    record = files_only(base, [directory], candidate, tmp_path / "qc")
    assert codes(record) == ["dora_norms"]


@pytest.mark.parametrize("method", ["oft", "oft-exact"])
def test_the_other_oft_transform_is_named(method: str, make_model, tmp_path: Path) -> None:
    base = make_model("llama", "float32")
    directory = adapter(base, tmp_path / "a", method)
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    config = json.loads((other / "adapter_config.json").read_text())
    config["use_cayley_neumann"] = not config["use_cayley_neumann"]
    (other / "adapter_config.json").write_text(json.dumps(config))
    candidate = tmp_path / "m"
    second = adapter(base, tmp_path / "b", "lora", target_modules=["up_proj"])
    bake(BakeConfig(base=base, rotations=other, adapters=(second,), out=candidate))
    (candidate / "so8tqc.json").unlink()
    record = files_only(base, [directory, second], candidate, tmp_path / "qc")
    assert set(codes(record)) <= {"wrong_direction", "transposed"}
    assert codes(record)


def test_two_oft_adapters_in_the_other_order(make_model, tmp_path: Path) -> None:
    base = make_model("llama", "float32")
    pair = [adapter(base, tmp_path / f"a{i}", "oft-exact", seed=i) for i in range(2)]
    candidate = pefts_merge(base, pair, tmp_path / "m", torch.float32)
    record = files_only(base, pair, candidate, tmp_path / "qc")
    assert codes(record) == ["wrong_order"]
    assert any("merge_and_unload" in notice for notice in record.notices)


def test_gates_left_out_beside_an_adapter(make_model, make_gates, tmp_path: Path) -> None:
    base = make_model("llama", "bfloat16")
    directory, gates = adapter(base, tmp_path / "a", "lora"), make_gates(base)
    bake(BakeConfig(base=base, rotations=directory, out=tmp_path / "m"))
    (tmp_path / "m" / "so8tqc.json").unlink()
    options = RotationOptions(adapters=(directory,))
    record = qc(
        QCConfig(
            reference=base,
            rotations=gates,
            rotation_options=options,
            candidates=(tmp_path / "m",),
            out=tmp_path / "qc",
            level="files",
        )
    )
    assert codes(record) == ["part_missing"]
    assert "rotation of the input" in record.diagnosis[0].text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_right_merges_raise_no_alarm(method: str, dtype: str, make_model, tmp_path: Path) -> None:
    """Forty-two of them."""
    base = make_model("llama", dtype)
    directory = adapter(base, tmp_path / "a", method, seed=5)
    bake(BakeConfig(base=base, rotations=directory, out=tmp_path / "m"))
    record = files_only(base, [directory], tmp_path / "m", tmp_path / "qc")
    assert record.verdict is Verdict.PASS
    assert record.diagnosis == ()
    assert open_checkpoint(tmp_path / "m").tensors
