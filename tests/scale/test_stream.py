"""Models of 7B's shapes, a layer at a time: two layers' memory, each byte read once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from measured import measured
from sparse_gguf import write_sparse_gguf
from sparse_model import LLAMA_70B, shapes_of, write_gates, write_sparse

GIB = 1 << 30

LLAMA_7B = LLAMA_70B | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}

CODE = """
import json, sys
from pathlib import Path
import numpy as np
from so8tqc.progress import SILENT
from so8tqc.rotations.read import read_rotations
from so8tqc.services.qc.readings import FileModels
from so8tqc.sources.compare import compare
from so8tqc.sources.layerwise.choice import ModelLoader, gated_source, plain_source
from so8tqc.sources.protocol import EncodedText

folder, tokens = Path(sys.argv[1]), int(sys.argv[2])
rotations = read_rotations(folder / "gates.safetensors")
texts = [EncodedText("t", np.random.default_rng(0).integers(10, 3000, size=tokens))]
loader = ModelLoader(folder / "states", stream=True)
files = FileModels(loader)

def build():
    base = loader.load(folder / "base")
    sources = [gated_source(base, rotations, "gated"), plain_source(base, "base")]
    if (folder / "baked").is_dir():
        sources.append(plain_source(loader.load(folder / "baked"), "baked"))
    for path in sorted(folder.glob("*.gguf")):
        sources.append(plain_source(files.load(path, folder / "base"), path.name))
    return sources

sources = loader.built(build, lambda made: made, texts, SILENT)
pairs = [("gated", source.name) for source in sources[1:]]
tables = compare(sources, pairs, texts)
print(json.dumps({
    "read": {s.name: s.model.bytes_read for s in sources},
    "kl": {pair[1]: float(table.columns["kl"].max()) for pair, table in tables.items()},
}))
"""


def test_four_layers_of_7b_take_the_memory_of_two(tmp_path: Path) -> None:
    """3.4 GB in float32, which a resident model holds; here a layer (0.8), the next as stored."""
    config = LLAMA_7B | {"num_hidden_layers": 4, "vocab_size": 4096}
    total = write_sparse(tmp_path / "base", config, shards=3)
    write_gates(tmp_path / "gates.safetensors", config)
    imports = measured(["-c", CODE.partition("\nfolder, tokens")[0] + "\nimport transformers"])
    cost = measured(["-c", CODE, str(tmp_path), "16"])
    assert cost.status == 0
    found = json.loads(cost.said)
    assert found["read"] == {"gated": total, "base": total}
    assert found["kl"] == {"base": 0.0}  # every weight is 0
    assert cost.peak - imports.peak < 2.3 * GIB


@pytest.mark.nightly
def test_a_7b_model_its_bake_and_two_gguf_files(tokenizer_files: Path, tmp_path: Path) -> None:
    totals = {n: write_sparse(tmp_path / n, LLAMA_7B, shards=30) for n in ("base", "baked")}
    for file in tokenizer_files.iterdir():
        shutil.copy(file, tmp_path / "base" / file.name)  # the converter asks for one
    for kind in ("Q8_0", "Q4_K"):
        name = f"{kind}.gguf"
        totals[name] = write_sparse_gguf(tmp_path / name, LLAMA_7B, shapes_of(LLAMA_7B), kind)
    write_gates(tmp_path / "gates.safetensors", LLAMA_7B)
    assert totals["base"] > 13.4e9
    cost = measured(["-c", CODE, str(tmp_path), "64"])
    assert cost.status == 0
    found = json.loads(cost.said)
    for name, read in found["read"].items():
        assert read <= 1.02 * totals["base" if name == "gated" else name]
    assert cost.peak < 4 * GIB
