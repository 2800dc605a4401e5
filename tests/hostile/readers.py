"""Every reader of files that others made: how to make a valid one, how it is read, what it may say.

A reader either succeeds or raises one ``So8tqcError`` with the exit code of its kind and the place.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from so8tqc.errors import ExitCode

Make = Callable[[Path], None]
Read = Callable[[Path], object]

TENSORS = {
    "model.embed_tokens.weight": (64, 32),
    "model.norm.weight": (32,),
    "lm_head.weight": (64, 32),
    **{f"model.layers.{i}.self_attn.o_proj.weight": (32, 32) for i in range(2)},
}


WHOLE = TENSORS | {
    f"model.layers.{i}.{name}.weight": shape
    for i in range(2)
    for name, shape in {
        "self_attn.q_proj": (32, 32), "self_attn.k_proj": (32, 32), "self_attn.v_proj": (32, 32),
        "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48),
        "input_layernorm": (32,), "post_attention_layernorm": (32,),
    }.items()
}  # fmt: skip
"""All weights of that model, which a trained directory needs."""


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        name: for messages.
        files: path in the directory → kind (see ``mutations``) of what is spoilt.
        make: writes a valid set of files into an empty directory.
        read: reads the directory as a command would.
        exit_code: of the refusals that are allowed.
        or_exit_code: another that is: files that leave open what has to be stated.
        share: how many inputs it gets, relative to the others: slow readers get fewer.
        writes: whether it writes, into the subdirectory ``out`` alone.
        spawns: whether it starts a process of its own.
    """

    name: str
    files: dict[str, str]
    make: Make
    read: Read
    exit_code: ExitCode = ExitCode.BAD_INPUT
    or_exit_code: ExitCode | None = None
    share: float = 1.0
    writes: bool = False
    spawns: bool = False


def _theta(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, 8, 8)).astype(np.float32) * 0.1


STATED = {"parametrization": "exp", "convention": "row", "site": "input", "layers": "0-1"}
"""What a bare checkpoint does not say."""


def _make_pt(directory: Path, *, legacy: bool = False) -> None:
    import torch

    gates = {
        f"model.layers.{i}.self_attn.rotation_gate.theta": torch.from_numpy(_theta(i))
        for i in range(2)
    }
    torch.save(
        {"model_state_dict": gates, "step": 7},
        directory / "gates.pt",
        _use_new_zipfile_serialization=not legacy,
    )


def _wrapped(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A model, its attention wrapped, LoRA in it, as a training saves it."""
    import torch

    generator = torch.Generator().manual_seed(0)
    state: dict[str, Any] = {
        name.replace("self_attn.", "self_attn.base_attention."): torch.randn(
            shape, generator=generator
        ).bfloat16()
        for name, shape in shapes.items()
    }
    for i in range(2):
        attention = f"model.layers.{i}.self_attn"
        state[f"{attention}.rotation_gate.theta"] = torch.from_numpy(_theta(i))
        state[f"{attention}.base_attention.o_proj.lora_A.default.weight"] = torch.ones(2, 32) / 9
        state[f"{attention}.base_attention.o_proj.lora_B.default.weight"] = torch.ones(32, 2) / 9
    return state


def _make_trained_file(directory: Path) -> None:
    import torch

    (directory / "base").mkdir()
    _make_checkpoint(directory / "base")
    content = {"module": _wrapped(TENSORS), "config": {"lora_alpha": 4.0, "use_rslora": False}}
    torch.save(content, directory / "trained.bin")


def _make_trained_directory(directory: Path) -> None:
    from safetensors.torch import save_file

    trained = directory / "trained"
    trained.mkdir()
    _make_checkpoint(trained)
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    state = {f"_orig_mod.{name}": value for name, value in _wrapped(WHOLE).items()}
    names = list(state)
    shards = {"model-00001-of-00002.safetensors": names[:4]}
    shards["model-00002-of-00002.safetensors"] = names[4:]
    for file, own in shards.items():
        save_file({name: state[name] for name in own}, trained / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (trained / "model.safetensors.index.json").write_text(json.dumps(index))


def _make_gated_adapter(directory: Path) -> None:
    import torch
    from safetensors.torch import save_file

    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": True,
        "bias": "none",
        "alpha_pattern": {"o_proj": 2},
        "fan_in_fan_out": False,
        "use_dora": False,
    }
    (directory / "base").mkdir()
    _make_checkpoint(directory / "base")
    (directory / "adapter").mkdir()
    (directory / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    state = {}
    for i in range(2):
        module = f"base_model.model.model.layers.{i}.self_attn.o_proj"
        state[f"{module}.so8t_rotation_gate.theta"] = torch.from_numpy(_theta(i))
        state[f"{module}.lora_A.weight"] = torch.ones(2, 32) / 9
        state[f"{module}.lora_B.weight"] = torch.ones(32, 2) / 9
    save_file(state, directory / "adapter" / "adapter_model.safetensors")


def _make_head(directory: Path) -> None:
    import torch

    (directory / "base").mkdir()
    _make_checkpoint(directory / "base")
    turned = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3))).Q
    torch.save({"so8_rotation": turned, "alpha": torch.tensor(0.3)}, directory / "head.pt")


def _bake_trained(base: str, rotations: str | None, **told: object) -> Read:
    def read(directory: Path) -> object:
        from so8tqc.config import BakeConfig
        from so8tqc.services.bake import bake

        paths = {"base": directory / base, "out": directory / "out" / "baked"}
        if rotations is not None:
            paths["rotations"] = directory / rotations
        return bake(BakeConfig.model_validate({**paths, "lora_alpha": 4, **told}))

    return read


def _read_rotations(name: str) -> Read:
    def read(directory: Path) -> object:
        from so8tqc.rotations.options import RotationOptions
        from so8tqc.rotations.read import read_rotations

        told = RotationOptions.model_validate(STATED) if name == "gates.pt" else None
        return read_rotations(directory / name if name else directory, told)

    return read


def _make_native(directory: Path) -> None:
    from so8tqc.rotations.enums import Convention, Parametrization, Site
    from so8tqc.rotations.files.native import write_native
    from so8tqc.rotations.rotation_set import Target

    write_native(
        directory / "gates.safetensors",
        {Target(i): _theta(i) for i in range(2)},
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet={"weight": 0.1, "kind": "l2"},
    )


def _make_adapter(directory: Path) -> None:
    from safetensors.numpy import save_file

    config = {
        "peft_type": "OFT",
        "peft_version": "0.21.0",
        "oft_block_size": 8,
        "r": 0,
        "bias": "none",
        "coft": True,
        "eps": 6e-5,
        "block_share": False,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "target_modules": ["o_proj"],
        "modules_to_save": None,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers"
    vectors = {
        f"{prefix}.{i}.self_attn.o_proj.oft_R.weight": np.full((4, 28), 0.01, np.float32)
        for i in range(2)
    }
    save_file(vectors, str(directory / "adapter_model.safetensors"))


def _make_checkpoint(directory: Path) -> None:
    import torch
    from safetensors.torch import save_file

    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in TENSORS.items()
    }
    shards = {"model-00001-of-00002.safetensors": list(tensors)[:2]}
    shards["model-00002-of-00002.safetensors"] = list(tensors)[2:]
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, directory / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.numel() * 2 for t in tensors.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


CHECKPOINT_FILES = {
    "config.json": "json",
    "model.safetensors.index.json": "json",
    "model-00001-of-00002.safetensors": "safetensors",
    "model-00002-of-00002.safetensors": "safetensors",
}


def _read_checkpoint(directory: Path) -> None:
    from so8tqc.checkpoints.baking import sha256_tensor
    from so8tqc.checkpoints.safetensors_index import ITEM_BYTES, load_tensor, open_checkpoint
    from so8tqc.checkpoints.sites import text_layers

    checkpoint = open_checkpoint(directory)
    text_layers(checkpoint.tensors.keys())
    for entry in checkpoint.tensors.values():
        sha256_tensor(entry)
        if entry.dtype in ITEM_BYTES:
            load_tensor(entry)


def _make_bake(directory: Path) -> None:
    (directory / "base").mkdir()
    _make_checkpoint(directory / "base")
    _make_native(directory)


def _bake(directory: Path) -> None:
    from so8tqc.config import BakeConfig
    from so8tqc.services.bake import bake

    bake(
        BakeConfig(
            base=directory / "base",
            rotations=directory / "gates.safetensors",
            out=directory / "out" / "baked",
            force=True,
        )
    )


def _make_baked(directory: Path) -> None:
    _make_bake(directory)
    _bake(directory)
    for path in (directory / "out" / "baked").iterdir():
        path.rename(directory / path.name)


def _read_provenance(directory: Path) -> object:
    from so8tqc.checkpoints.provenance import read_provenance

    return read_provenance(directory)


def _make_capture(directory: Path) -> None:
    from safetensors.numpy import save_file

    tokens = np.arange(12, dtype=np.int64)
    logits = np.random.default_rng(0).normal(size=(12, 64)).astype(np.float16)
    facts = [{"id": "a", "language": "en"}, {"id": "b", "category": "x"}]
    save_file(
        {"tokens.0": tokens, "logits.0": logits, "tokens.1": tokens + 9, "logits.1": logits},
        str(directory / "capture.safetensors"),
        {"so8t.capture_version": "1", "so8t.texts": json.dumps(facts), "so8t.source": "x"},
    )


def _read_capture(directory: Path) -> None:
    from so8tqc.sources.capture import CaptureSource, open_capture

    capture = open_capture(directory / "capture.safetensors")
    source = CaptureSource(capture, "capture")
    for text in capture.texts:
        for block in source.logits(text.tokens, 8):
            block.sum()


def _make_gguf(directory: Path) -> None:
    from tiny_gguf import write_llama

    write_llama(directory / "model.gguf", dtype=np.float16)


def _read_gguf(directory: Path) -> None:
    from so8tqc.gguf.file import open_gguf
    from so8tqc.gguf.norm import require_scalable_norm

    gguf = open_gguf(directory / "model.gguf")
    require_scalable_norm(gguf)
    assert gguf.bits_per_weight >= 0
    for tensor in gguf.tensors.values():
        tensor.values()
        assert tensor.sha256


def _rewrite_gguf(directory: Path) -> None:
    from so8tqc.gguf.norm import scale_norm
    from so8tqc.gguf.rewrite import key_values

    key_values(directory / "model.gguf")
    scale_norm(directory / "model.gguf", directory / "out" / "scaled.gguf", 1.5)


def _run_gguf(directory: Path) -> None:
    from so8tqc.sources.gguf import GGUFSource

    source = GGUFSource(directory / "model.gguf", "model", threads=1, context=16)
    try:
        for block in source.logits(np.arange(8, dtype=np.int64), 8):
            block.sum()
    finally:
        source.close()


def _make_imatrix(directory: Path) -> None:
    from so8tqc.llama.imatrix import write_imatrix

    sums = np.random.default_rng(0).random((1, 32))
    names = [f"blk.{i}.attn_output.weight" for i in range(2)]
    write_imatrix(
        directory / "imatrix.gguf",
        dict.fromkeys(names, sums),
        dict.fromkeys(names, np.array([40])),
        datasets=["x"],
        chunks=3,
        chunk_size=64,
    )


def _make_dat(directory: Path) -> None:
    content = struct.pack("<i", 2)
    for i in range(2):
        name = f"blk.{i}.attn_output.weight".encode()
        values = np.random.default_rng(i).random(32).astype("<f4").tobytes()
        content += struct.pack("<i", len(name)) + name + struct.pack("<ii", 5, 32) + values
    (directory / "imatrix.dat").write_bytes(content + struct.pack("<i", 3))


def _read_imatrix(name: str) -> Read:
    def read(directory: Path) -> object:
        from so8tqc.llama.imatrix import read_imatrix

        return read_imatrix(directory / name)

    return read


CONFIG = """\
name: x
base: base
rotations: gates.safetensors
extends: low.yaml
out: out
quantize: &a
  types: [Q5_K_M, Q8_0]
qc:
  max_tokens: 128
  resamples: 500
longtext:
  min_tokens: 2048
  png: false
"""


def _make_config(directory: Path) -> None:
    (directory / "run.yaml").write_text(CONFIG)
    (directory / "low.yaml").write_text("qc: {profile: default}\nout: elsewhere\n")


def _read_config(directory: Path) -> object:
    from so8tqc.config import RunConfig
    from so8tqc.config.load import load_options

    return load_options(RunConfig, file=directory / "run.yaml")


def _make_profiles(directory: Path) -> None:
    from so8tqc.services.qc.profiles import BUILTIN_PROFILES

    (directory / "profiles.yaml").write_bytes(BUILTIN_PROFILES.read_bytes())


def _read_profiles(directory: Path) -> object:
    from so8tqc.services.qc.profiles import load_profile

    return load_profile(str(directory / "profiles.yaml")).for_gguf("Q8_0")


def _make_texts(directory: Path) -> None:
    value = {
        "texts": ["One two.", "日本語の文。", "Three"],
        "ids": ["a", "b", "c"],
        "language": "en",
        "prompts": ["p", "", ""],
        "categories": ["x", "y", "z"],
    }
    (directory / "texts.json").write_text(json.dumps(value, ensure_ascii=False), "utf-8")
    lines = [json.dumps({"id": i, "text": t}) for i, t in enumerate(value["texts"])]
    (directory / "texts.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (directory / "texts.txt").write_text("\n\n".join(value["texts"]), "utf-8")


def _read_texts(name: str) -> Read:
    def read(directory: Path) -> None:
        from so8tqc.sources.inputs.texts import concatenated, load_texts

        texts = load_texts([str(directory / name)])
        assert texts
        assert len({text.id for text in texts}) == len(texts)
        concatenated(texts).encode("utf-8")

    return read


def _make_run(directory: Path) -> None:
    """A run directory with the real record of a real bake."""
    from so8tqc.config import BakeConfig
    from so8tqc.record_files import write_record
    from so8tqc.services.bake import bake
    from so8tqc.services.run.directory import RunDirectory

    _make_bake(directory)
    config = BakeConfig(
        base=directory / "base",
        rotations=directory / "gates.safetensors",
        out=directory / "bake" / "baked_model",
    )
    write_record(directory / "bake" / "record.json", bake(config))
    run = RunDirectory(directory)
    run.ref(directory / "gates.safetensors")
    run.commit("bake", "0" * 64, [directory / "bake" / "baked_model"])


def _read_record(directory: Path) -> object:
    from so8tqc.record_files import read_record

    return read_record(directory / "bake" / "record.json").model_dump_json()


def _report(directory: Path) -> None:
    from so8tqc.reports.html import page
    from so8tqc.services.report import read_stages, render

    assert page
    render(directory, read_stages(directory))


def _read_manifest(directory: Path) -> object:
    from so8tqc.services.run.directory import RunDirectory

    return RunDirectory(directory).reusable("bake", "0" * 64)


def _make_tokens(directory: Path) -> None:
    from so8tqc.metrics.columns import COLUMNS
    from so8tqc.metrics.divergence import TokenTable
    from so8tqc.services.qc.token_file import write_tokens

    n = 20
    table = TokenTable(
        {name: np.linspace(0, 1, n) for name in COLUMNS},
        np.repeat(np.arange(2, dtype=np.int32), n // 2),
        np.arange(n, dtype=np.int32),
        64,
        ("a", "b"),
    )
    write_tokens(directory / "tokens.npz", {"candidate": table})


def _read_tokens(directory: Path) -> None:
    from so8tqc.metrics.divergence import summarise
    from so8tqc.services.qc.token_file import read_tokens

    for table in read_tokens(directory / "tokens.npz").values():
        table.per_text("kl", "nll_reference")
        summarise(table)


def _make_temperature(directory: Path) -> None:
    value = {
        "temperature": 1.1,
        "bounds": [0.5, 3.0],
        "entropy_temperature": {"significant": True, "a": 1.0, "b": 0.1, "bounds": [0.5, 3.0]},
        "group_temperatures": {
            "language": {"significant": True, "temperatures": {"en": {"temperature": 1.2}}},
            "category": {"significant": False, "temperatures": {}},
        },
    }
    (directory / "temperature_config.json").write_text(json.dumps(value))


def _read_temperature(directory: Path) -> None:
    from so8tqc.adaptive import AdaptiveTemperature

    path = directory / "temperature_config.json"
    AdaptiveTemperature.from_config(path)
    AdaptiveTemperature.from_config(path, language="en")


def _make_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(["one two three, one two", "three two one"] * 3, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(str(directory))


def _read_tokenizer(directory: Path) -> object:
    from so8tqc.sources.inputs.texts import Text, encode, encode_plain, load_tokenizer

    tokenizer = load_tokenizer(directory)
    encode_plain("one two three", tokenizer)
    return encode([Text("a", "one two three")], tokenizer, 10)


def _make_model(directory: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from so8tqc.sources.quiet import quiet_transformers

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    with quiet_transformers():
        LlamaForCausalLM(config).save_pretrained(str(directory))


def _run_model(directory: Path) -> None:
    from so8tqc.sources.hf import HFModel, HFSource

    source = HFSource(HFModel.load(directory), "model")
    try:
        for block in source.logits(np.arange(8, dtype=np.int64), 8):
            block.sum()
    finally:
        source.close()


def _make_package(directory: Path) -> None:
    import zipfile

    with zipfile.ZipFile(directory / "package.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/text.txt", "One two.\n\nThree." * 20)
        archive.writestr("x/data.json", json.dumps({"a": {"text": "One."}}))


def _read_package(directory: Path) -> None:
    from so8tqc.corpus.archives import members

    content = (directory / "package.whl").read_bytes()
    list(members(content, ("x/*", "*.zip!/*"), "package.whl"))


READERS = (
    Reader("PyTorch gates", {"gates.pt": "zip"}, _make_pt, _read_rotations("gates.pt")),
    Reader("PyTorch gates, old format", {"gates.pt": ""},
           lambda directory: _make_pt(directory, legacy=True), _read_rotations("gates.pt")),
    Reader("trained checkpoint", {"trained.bin": "zip"}, _make_trained_file,
           _bake_trained("base", "trained.bin"), or_exit_code=ExitCode.USAGE, share=0.3,
           writes=True),
    Reader("trained directory",
           {f"trained/{name}": kind for name, kind in CHECKPOINT_FILES.items()},
           _make_trained_directory, _bake_trained("trained", None), or_exit_code=ExitCode.USAGE,
           share=0.5, writes=True),
    Reader("adapter with gates",
           {"adapter/adapter_config.json": "json",
            "adapter/adapter_model.safetensors": "safetensors"},
           _make_gated_adapter, _bake_trained("base", "adapter", lora_alpha=None),
           or_exit_code=ExitCode.USAGE, share=0.5, writes=True),
    Reader("rotation of the head", {"head.pt": "zip"}, _make_head,
           _bake_trained("base", "head.pt", site="head", convention="row",
                         parametrization="matrix"),
           or_exit_code=ExitCode.USAGE, share=0.2, writes=True),
    Reader("native gates", {"gates.safetensors": "safetensors"}, _make_native,
           _read_rotations("gates.safetensors"), or_exit_code=ExitCode.USAGE),
    Reader("PEFT adapter",
           {"adapter_config.json": "json", "adapter_model.safetensors": "safetensors"},
           _make_adapter, _read_rotations(""), or_exit_code=ExitCode.USAGE),
    Reader("checkpoint", CHECKPOINT_FILES, _make_checkpoint, _read_checkpoint, share=2),
    Reader("bake", {f"base/{name}": kind for name, kind in CHECKPOINT_FILES.items()}, _make_bake,
           _bake, share=0.3, writes=True),
    Reader("provenance", {"so8tqc.json": "json"}, _make_baked, _read_provenance),
    Reader("capture", {"capture.safetensors": "safetensors"}, _make_capture, _read_capture),
    Reader("GGUF", {"model.gguf": "gguf"}, _make_gguf, _read_gguf, share=2),
    Reader("GGUF rewritten", {"model.gguf": "gguf"}, _make_gguf, _rewrite_gguf, share=0.5,
           writes=True),
    Reader("GGUF run by libllama", {"model.gguf": "gguf"}, _make_gguf, _run_gguf, share=0.4,
           spawns=True),
    Reader("importance matrix", {"imatrix.gguf": "gguf"}, _make_imatrix,
           _read_imatrix("imatrix.gguf")),
    Reader("importance matrix, old format", {"imatrix.dat": ""}, _make_dat,
           _read_imatrix("imatrix.dat")),
    Reader("config", {"run.yaml": "yaml", "low.yaml": "yaml"}, _make_config, _read_config,
           ExitCode.USAGE),
    Reader("profiles", {"profiles.yaml": "yaml"}, _make_profiles, _read_profiles, ExitCode.USAGE,
           share=0.3),
    Reader("texts .json", {"texts.json": "json"}, _make_texts, _read_texts("texts.json")),
    Reader("texts .jsonl", {"texts.jsonl": "jsonl"}, _make_texts, _read_texts("texts.jsonl")),
    Reader("texts .txt", {"texts.txt": ""}, _make_texts, _read_texts("texts.txt")),
    Reader("record", {"bake/record.json": "json"}, _make_run, _read_record),
    Reader("report", {"bake/record.json": "json"}, _make_run, _report, share=0.3),
    Reader("manifest", {"manifest.json": "json"}, _make_run, _read_manifest),
    Reader("token table", {"tokens.npz": "zip"}, _make_tokens, _read_tokens),
    Reader("temperature config", {"temperature_config.json": "json"}, _make_temperature,
           _read_temperature),
    Reader("tokenizer", {"tokenizer.json": "json", "tokenizer_config.json": "json"},
           _make_tokenizer, _read_tokenizer, share=0.3),
    Reader("transformers model", {"config.json": "json", "model.safetensors": "safetensors"},
           _make_model, _run_model, share=0.1),
    Reader("package of texts", {"package.whl": "zip"}, _make_package, _read_package),
)  # fmt: skip

BY_NAME = {reader.name: reader for reader in READERS}
