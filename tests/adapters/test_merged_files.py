"""GGUF files of merges against base + adapter: right ones pass, wrong ones are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_cases import adapter
from test_merges import deltas

from so8tqc.config import BakeConfig, ExportConfig, QCConfig
from so8tqc.gguf.file import open_gguf
from so8tqc.llama.quantizer import Job, Quantizer, Recipe, resolve_type
from so8tqc.llama.vendor import is_vendored
from so8tqc.records import Record, Verdict
from so8tqc.rotations.options import RotationOptions
from so8tqc.services.bake import bake
from so8tqc.services.export.service import export
from so8tqc.services.qc.service import qc

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]

TYPES = ("F16", "Q8_0", "Q4_K_M")
SCALE = 3.0
HEADS, WIDTH = 4, 256
STRENGTHS = {"right": 1.0, "unmerged": 0.0, "twice": 2.0, "weak": 1 / 3, "negative": -1.0}
"""How strongly s·B·A was added."""


def wide_llama(folder: Path, tokenizer: Path) -> Path:
    """A Llama of random weights whose rows are whole blocks of every type, with outliers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            spread = torch.distributions.StudentT(5.0).sample(parameter.shape)
            parameter.data.copy_(spread * 0.8 * parameter.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(str(folder))
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


def in_pairs(weight: np.ndarray) -> np.ndarray:
    """q's rows as llama.cpp's RoPE takes them: the halves of each head interleaved."""
    halves = weight.reshape(HEADS, 2, WIDTH // HEADS // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def sources(tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, adapter ``lora`` on q, o and down projections, and ``base.gguf`` in F32."""
    folder = tmp_path_factory.mktemp("merged-files")
    wide_llama(folder / "base", tokenizer_files)
    adapter(folder / "base", folder / "lora", "lora")
    export(ExportConfig(model=folder / "base", out=folder / "base.gguf", type="f32"))
    return folder


def merged_file(sources: Path, path: Path, change: Callable[[str], float]) -> Path:
    """``base.gguf`` with W + c·s·B·A in bfloat16, merged here by hand in float64.

    Args:
        sources: the fixture.
        path: to write.
        change: GGUF tensor → c.
    """
    names = {"self_attn.q_proj": "attn_q", "self_attn.o_proj": "attn_output"}
    content = bytearray((sources / "base.gguf").read_bytes())
    file = open_gguf(sources / "base.gguf")
    for stored, delta in deltas(sources / "lora", SCALE).items():
        layer, module = stored.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        name = f"blk.{layer}.{names.get(module, 'ffn_down')}.weight"
        added = delta.numpy()
        tensor = file.tensors[name]
        new = tensor.values() + change(name) * (in_pairs(added) if "attn_q" in name else added)
        rounded = torch.from_numpy(new).to(torch.bfloat16).float().numpy()
        content[tensor.offset : tensor.offset + tensor.bytes] = rounded.tobytes()
    path.write_bytes(content)
    return path


def quantized(source: Path, type_: str) -> Path:
    destination = source.with_name(f"{source.stem}-{type_}.gguf")
    quantizer = Quantizer()
    try:
        recipe = Recipe(resolve_type(type_)[1])
        quantizer.write(Job(source, destination, recipe, threads=1), lambda _: None)
    finally:
        quantizer.close()
    return destination


def judged(sources: Path, candidates: list[Path], out: Path, **more: object) -> Record:
    settings = {"level": "files", **more}
    return qc(
        QCConfig(
            reference=sources / "base",
            rotations=sources / "lora",
            candidates=tuple(candidates),
            out=out,
            **settings,
        )
    )


@pytest.fixture(scope="module")
def record(sources: Path) -> Record:
    """All strengths in all types, judged in one go."""
    files = [
        quantized(merged_file(sources, sources / f"{name}.gguf", lambda _, c=strength: c), type_)
        for name, strength in STRENGTHS.items()
        for type_ in TYPES
    ]
    return judged(sources, files, sources / "qc")


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("right", None, ""),
        ("unmerged", "not_baked", "never merged"),
        ("twice", "double_baked", "twice"),
        ("weak", "wrong_scale", "0.333 times as strongly"),
        ("negative", "wrong_scale", "with the opposite sign"),
    ],
)
def test_a_merge_in_a_file_is_judged(
    name: str, code: str | None, words: str, type_: str, record: Record
) -> None:
    subject = f"{name}-{type_}.gguf"
    told = [d for d in record.diagnosis if subject in d.text]
    failed = [c.id for c in record.checks if c.subject == subject and c.verdict is Verdict.FAIL]
    if code is None:
        assert not told
        assert not failed
        return
    assert [d.code for d in told] == [code]
    assert words in told[0].text
    assert f"6 of 6 tensors of {subject}" in told[0].text
    assert failed == ["tensors.honest"]


def test_a_layer_that_was_left_out_and_a_foreign_edit(sources: Path, tmp_path: Path) -> None:
    """Beside each other, each of its own name."""
    path = merged_file(sources, tmp_path / "some.gguf", lambda name: float("blk.0" in name))
    file = open_gguf(path)
    edited = file.tensors["blk.0.ffn_up.weight"]
    content = bytearray(path.read_bytes())
    noise = np.random.default_rng(0).normal(size=edited.shape).astype(np.float32)
    content[edited.offset : edited.offset + edited.bytes] = noise.tobytes()
    path.write_bytes(content)
    told = judged(sources, [quantized(path, "Q8_0")], tmp_path / "qc").diagnosis
    assert [(d.code, d.layers) for d in told] == [("layer_missing", (1,)), ("other_tensor", (0,))]


def test_what_no_known_mistake_explains_is_no_merge(sources: Path, tmp_path: Path) -> None:
    """Noise beside the right merge: it is an edit, not another strength."""
    path = merged_file(sources, tmp_path / "noisy.gguf", lambda _: 1.0)
    tensor = open_gguf(path).tensors["blk.1.attn_output.weight"]
    noise = np.random.default_rng(0).normal(size=tensor.shape) * 0.05 * tensor.values().std()
    content = bytearray(path.read_bytes())
    new = (tensor.values() + noise).astype(np.float32)
    content[tensor.offset : tensor.offset + tensor.bytes] = new.tobytes()
    path.write_bytes(content)
    for candidate in (path, quantized(path, "Q8_0")):
        told = judged(sources, [candidate], tmp_path / candidate.stem).diagnosis
        assert [(d.code, d.layers) for d in told] == [("foreign_edit", (1,))]


def test_experts_and_several_adapters(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Stacked experts: what was made of all of them stands in one tensor; a part is missing."""
    base = make_model("mixtral", "bfloat16")
    first = adapter(base, tmp_path / "first", "lora")
    second = adapter(base, tmp_path / "second", "dora", seed=1)
    for name, adapters in {"both": (second,), "half": ()}.items():
        bake(BakeConfig(base=base, rotations=first, adapters=adapters, out=tmp_path / name))
        model, out = tmp_path / name, tmp_path / f"{name}.gguf"
        export(ExportConfig(model=model, out=out, type="q8_0"))
    export(ExportConfig(model=base, out=tmp_path / "none.gguf", type="q8_0"))
    made = qc(
        QCConfig(
            reference=base,
            rotations=first,
            rotation_options=RotationOptions(adapters=(second,)),
            candidates=tuple(tmp_path / f"{name}.gguf" for name in ("both", "half", "none")),
            out=tmp_path / "qc",
            level="files",
        )
    )
    told = {
        name: [d for d in made.diagnosis if f"{name}.gguf" in d.text]
        for name in ("both", "half", "none")
    }
    assert not told["both"]
    assert [d.code for d in told["half"]] == ["part_missing"]
    assert "the DoRA branch is missing" in told["half"][0].text
    assert [d.code for d in told["none"]] == ["not_baked"]
    experts = [row for row in made.metrics["tensors"]["none.gguf"] if "exps" in row["name"]]  # type: ignore[index]
    assert experts
    assert not any(row["verdict"] == "plain" for row in experts)
