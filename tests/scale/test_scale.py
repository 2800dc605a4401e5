"""What does not fit into memory is read without trying to: 141 GB, 1,000 shards, 10,000 texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from measured import Cost, measured
from sparse_model import LLAMA_70B, write_gates, write_sparse

from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.errors import ModelError

IMPORTS = (
    "import torch, scipy.linalg, safetensors.torch\n"
    "import so8tqc.cli.app, so8tqc.services.bake, so8tqc.rotations.read\n"
)
MIB = 1 << 20


@pytest.fixture(scope="module")
def imports() -> Cost:
    """What the libraries alone cost."""
    return measured(["-c", IMPORTS])


def run(code: str, *arguments: Path) -> Cost:
    given = "import sys\nfrom pathlib import Path\npaths = list(map(Path, sys.argv[1:]))\n"
    cost = measured(["-c", IMPORTS + given + code, *map(str, arguments)])
    assert cost.status == 0
    return cost


def test_the_plan_of_a_70b_bake(imports: Cost, tmp_path: Path) -> None:
    total = write_sparse(tmp_path / "base", LLAMA_70B, shards=30)
    write_gates(tmp_path / "gates.safetensors", LLAMA_70B)
    assert total > 141e9
    cost = measured(
        [
            "-m",
            "so8tqc",
            "bake",
            str(tmp_path / "base"),
            str(tmp_path / "gates.safetensors"),
            "--out",
            str(tmp_path / "out"),
            "--dry-run",
            "--json",
        ]
    )
    assert cost.status == 0
    record = json.loads(cost.said)
    assert record["metrics"]["bytes_written"] == total
    assert len(record["metrics"]["tensors"]) == 80
    # of which 340 MB are 82,000 rotations in double-double while they are computed
    assert cost.peak - imports.peak < 700 * MIB
    assert not (tmp_path / "out").exists()


def test_structure_checks_hold_a_buffer_not_a_tensor(imports: Cost, tmp_path: Path) -> None:
    """Tensors of 470 MB, two of each: read, compared and searched for NaN."""
    config = LLAMA_70B | {"num_hidden_layers": 1, "vocab_size": 16384}
    for name in ("a", "b"):
        write_sparse(tmp_path / name, config, shards=3)
    cost = run(
        "from so8tqc.checkpoints.safetensors_index import open_checkpoint\n"
        "from so8tqc.services.weights.structure import structure_checks\n"
        "checks = structure_checks(*map(open_checkpoint, paths), ())\n"
        "assert all(check.verdict == 'pass' for check in checks), checks\n",
        tmp_path / "a",
        tmp_path / "b",
    )
    assert cost.peak - imports.peak < 64 * MIB


def test_loading_a_tensor_would_be_seen(imports: Cost, tmp_path: Path) -> None:
    """The measurement itself: a reader that holds a tensor is caught."""
    write_sparse(tmp_path / "a", LLAMA_70B | {"num_hidden_layers": 1, "vocab_size": 16384}, 1)
    cost = run(
        "from so8tqc.checkpoints.safetensors_index import load_tensor, open_checkpoint\n"
        "tensors = open_checkpoint(paths[0]).tensors\n"
        "load_tensor(tensors['model.layers.0.mlp.up_proj.weight'])\n",
        tmp_path / "a",
    )
    assert cost.peak - imports.peak > 256 * MIB


def test_a_thousand_shards(imports: Cost, tmp_path: Path) -> None:
    config = LLAMA_70B | {"num_hidden_layers": 111}  # 1,002 tensors
    total = write_sparse(tmp_path / "a", config, shards=1000)
    checkpoint = open_checkpoint(tmp_path / "a")
    assert (len(checkpoint.files), len(checkpoint.tensors)) == (1000, 1002)
    assert checkpoint.bytes == total
    cost = run(
        "from so8tqc.checkpoints.safetensors_index import open_checkpoint\n"
        "open_checkpoint(paths[0])\n",
        tmp_path / "a",
    )
    assert cost.peak - imports.peak < 64 * MIB
    (tmp_path / "a" / "model-00777-of-01000.safetensors").unlink()
    with pytest.raises(ModelError, match="model-00777-of-01000"):
        open_checkpoint(tmp_path / "a")


def test_ten_thousand_texts(imports: Cost, tokenizer_files: Path, tmp_path: Path) -> None:
    """Read, tokenized, and cut into windows: every token is scored once."""
    generator = np.random.default_rng(0)
    words = np.array(["one", "two", "three", "four", "five", "six"])
    lines = [
        json.dumps({"id": f"t{i}", "text": " ".join(generator.choice(words, 120))})
        for i in range(10_000)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    cost = run(
        "import transformers\n"
        "from so8tqc.sources.inputs.texts import encode, load_texts, load_tokenizer\n"
        "from so8tqc.sources.inputs.windows import overlapping_windows\n"
        "texts = load_texts([str(paths[0])])\n"
        "encoded = encode(texts, load_tokenizer(paths[1]), None)\n"
        "windows = overlapping_windows(encoded, 64, 32, None)\n"
        "assert len(texts) == len(encoded) == 10_000\n"
        "scored = sum(window.tokens.size - 1 - window.first for window in windows)\n"
        "print(scored == sum(text.tokens.size - 1 for text in encoded), len(windows))\n",
        tmp_path / "texts.jsonl",
        tokenizer_files,
    )
    assert cost.said.startswith("True")
    # transformers itself is 200 MB of that
    assert cost.peak - imports.peak < 512 * MIB
