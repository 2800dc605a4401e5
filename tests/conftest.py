"""Tiny real models: right architecture, random weights, a tokenizer of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target

VOCABULARY = 512
LAYERS = 3

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    # q, k and v are one matrix, gate and up another
    "phi3": {"pad_token_id": 0, "sliding_window": 64},
    "qwen2": {},
    # heads × head_dim differs from hidden_size in these two
    "qwen3": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32},
    # experts, which transformers runs as one 3D parameter and stores one by one
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_vl": {
        "text_config": {
            **_COMMON,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3],
            },
        },
        "vision_config": {
            "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
        },
    },
}  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def _offline() -> None:
    """No test may ask a hub for anything."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests compute what they assert, but those of what is kept."""
    monkeypatch.setattr("so8tqc.services.qc.evaluations.default_folder", lambda: None)


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests marked ``gpu`` need one; all others are about the CPU's numbers, and see none."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a sentencepiece tokenizer that transformers and the converter both read."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def train_tokenizer(directory: Path) -> Path:
    """Train that tokenizer on the built-in English texts."""
    import sentencepiece
    from transformers import LlamaTokenizer

    directory.mkdir(exist_ok=True)
    root = Path(__file__).parent.parent / "data"
    texts = json.loads((root / "validation_en.json").read_text(encoding="utf-8"))["texts"]
    (directory / "corpus.txt").write_text("\n".join(texts), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    for leftover in ("corpus.txt", "tokenizer.vocab"):
        (directory / leftover).unlink()
    LlamaTokenizer.from_pretrained(str(directory)).save_pretrained(str(directory))
    return directory


ModelMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def make_model(tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """Build (once each) a tiny model directory of an architecture and storage dtype."""
    made: dict[tuple[str, str, str], Path] = {}

    def make(architecture: str = "llama", dtype: str = "bfloat16", shard: str = "5GB") -> Path:
        key = (architecture, dtype, shard)
        if key not in made:
            made[key] = _build(architecture, dtype, shard, tmp_path_factory, tokenizer_files)
        return made[key]

    return make


def _build(
    architecture: str,
    dtype: str,
    shard: str,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_files: Path,
) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    own = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(architecture, **(own if "text_config" in own else _COMMON | own))
    torch.manual_seed(1)
    auto = AutoModelForImageTextToText if "text_config" in own else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # livelier than the default 0.02: attention must matter
        if parameter.ndim == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    # the directory names the GGUF, and libllama expects more tokens of whatever is named phi3
    directory = tmp_path_factory.mktemp(f"tiny-{dtype}")
    model.to(getattr(torch, dtype)).save_pretrained(str(directory), max_shard_size=shard)
    for file in tokenizer_files.iterdir():
        shutil.copy(file, directory / file.name)
    return directory


@pytest.fixture(scope="session")
def make_vision_model(
    tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Build (once each) a tiny model that sees, with its processor: see ``vision_models``."""
    from vision_models import build

    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("seeing") / kind.replace("_", "-")
            made[kind] = build(kind, folder, tokenizer_files)
        return made[kind]

    return make


@pytest.fixture
def llama(make_model: ModelMaker) -> Path:
    """A tiny bfloat16 Llama directory (shared: do not write into it)."""
    return make_model("llama")


GateMaker = Callable[..., Path]


@pytest.fixture
def make_gates(tmp_path: Path) -> GateMaker:
    """Write a native gate file for a model directory."""

    def make(
        model: Path,
        name: str = "gates.safetensors",
        *,
        seed: int = 0,
        scale: float = 0.3,
        convention: Convention = Convention.COLUMN,
        parametrization: Parametrization = Parametrization.EXP,
        layers: int = LAYERS,
    ) -> Path:
        blocks = attention_width(model) // 8
        generator = np.random.default_rng(seed)
        theta = {Target(i): generator.normal(size=(blocks, 8, 8)) * scale for i in range(layers)}
        path = tmp_path / name
        write_native(
            path,
            theta,
            parametrization=parametrization,
            convention=convention,
            site=Site.INPUT,
            pet=None,
        )
        return path

    return make


@pytest.fixture
def texts_file(tmp_path: Path) -> Path:
    """Six short passages as JSONL."""
    root = Path(__file__).parent.parent / "data"
    texts = json.loads((root / "validation_en.json").read_text(encoding="utf-8"))["texts"]
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"id": f"t{i}", "text": text[:300]}) for i, text in enumerate(texts[:6])]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def long_texts(tmp_path: Path) -> Path:
    """The first of the built-in long texts, with its prompt."""
    root = Path(__file__).parent.parent / "data"
    texts = json.loads((root / "longtext_en.json").read_text(encoding="utf-8"))
    path = tmp_path / "long.json"
    path.write_text(json.dumps({k: texts[k][:1] for k in ("ids", "texts", "prompts")}))
    return path


def attention_width(model: Path) -> int:
    """Input width of the attention output projection: heads × head_dim."""
    config = json.loads((model / "config.json").read_text())
    config = config.get("text_config", config)
    heads = int(config["num_attention_heads"])
    return heads * int(config.get("head_dim") or config["hidden_size"] // heads)


@pytest.fixture
def baked(llama: Path, make_gates: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """(base, gates, correct bake) of a tiny bfloat16 Llama."""
    from so8tqc.config import BakeConfig
    from so8tqc.services.bake import bake

    gates = make_gates(llama)
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked"))
    return llama, gates, tmp_path / "baked"
