"""Models a layer at a time: as fast as resident ones where they fit, and where they do not.

    python benchmarks/stream.py fits MODEL     streamed against resident, every column of every text
    python benchmarks/stream.py large FOLDER   a 7B Llama of sparse files, under a limit of memory

``large`` writes a checkpoint of Llama 7B's shapes (13.5 GB in BF16), gates, a bake of it and two
GGUF files, all holes, runs their layers in a process of its own whose control group (or, where
there is none, its data) may hold 4 GiB, and prints the peak, the bytes read of each file over its
size, and the time over that of reading and of the passes' own flops, measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "scale"))
sys.path.insert(0, str(ROOT / "tests"))

LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LIMIT = 4 << 30
GROUP = Path("/sys/fs/cgroup/memory/so8tqc-stream")


def fits(model: Path, texts: int, tokens: int) -> None:
    """A gated model, its base and both folds: streamed against resident."""
    from so8tqc.rotations.enums import Convention, Parametrization, Site
    from so8tqc.rotations.files.native import write_native
    from so8tqc.rotations.read import read_rotations
    from so8tqc.rotations.rotation_set import Target
    from so8tqc.sources.compare import compare
    from so8tqc.sources.layerwise.choice import (
        ModelLoader,
        folded_source,
        gated_source,
        plain_source,
    )
    from so8tqc.sources.protocol import EncodedText

    config = json.loads((model / "config.json").read_text())
    heads = int(config["num_attention_heads"])
    width = heads * int(config.get("head_dim") or config["hidden_size"] // heads)
    generator = np.random.default_rng(0)
    gates = Path(f"/tmp/so8tqc-stream-{os.getpid()}.safetensors")
    layers = range(int(config["num_hidden_layers"]))
    write_native(
        gates,
        {Target(i): generator.normal(size=(width // 8, 8, 8)) * 0.1 for i in layers},
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )
    rotations = read_rotations(gates)
    gates.unlink()
    ids = [
        EncodedText(f"t{i}", generator.integers(10, int(config["vocab_size"]) - 10, size=tokens))
        for i in range(texts)
    ]
    pairs = [("gated", "base"), ("gated", "rounded"), ("gated", "exact")]
    times: dict[bool, list[float]] = {True: [], False: []}
    tables = {}
    for stream in (False, True) * 2:
        begin = time.perf_counter()
        loader = ModelLoader(Path(f"/tmp/so8tqc-stream-{os.getpid()}"), stream=stream)

        def build(loader: ModelLoader = loader) -> list:  # type: ignore[type-arg]
            loaded = loader.load(model)
            return [
                gated_source(loaded, rotations, "gated"),
                plain_source(loaded, "base"),
                folded_source(loaded, rotations, "rounded", "bfloat16"),
                folded_source(loaded, rotations, "exact", None),
            ]

        from so8tqc.progress import SILENT

        sources = loader.built(build, lambda made: made, ids, SILENT)
        tables[stream] = compare(sources, pairs, ids)
        for source in sources:
            source.close()
        times[stream].append(time.perf_counter() - begin)
        print(f"{'streamed' if stream else 'resident'}: {times[stream][-1]:.1f} s", flush=True)
    worst = max(
        float(np.abs(tables[True][p].columns[c] - tables[False][p].columns[c]).max())
        for p in pairs
        for c in tables[True][p].columns
    )
    print(f"largest difference in any column: {worst:.3g} (limit 1e-9)")
    print(f"streamed / resident: {min(times[True]) / min(times[False]):.3f} (limit 1.10)")


def large(folder: Path, tokens: int) -> None:
    """Write the files, run the pass in a process of its own, compare with reading and flops."""
    from sparse_gguf import write_sparse_gguf
    from sparse_model import shapes_of, write_gates, write_sparse

    from conftest import train_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "gates.safetensors").is_file():
        for name in ("base", "baked"):
            write_sparse(folder / name, dict(LLAMA_7B), shards=30)
        for file in train_tokenizer(folder / "tokenizer").iterdir():
            shutil.copy(file, folder / "base" / file.name)  # the converter asks for one
        shapes = shapes_of(dict(LLAMA_7B))
        for kind in ("Q8_0", "Q4_K"):
            write_sparse_gguf(folder / f"{kind}.gguf", dict(LLAMA_7B), shapes, kind)
        write_gates(folder / "gates.safetensors", dict(LLAMA_7B))
    limit = "none"
    try:
        GROUP.mkdir(exist_ok=True)
        (GROUP / "memory.limit_in_bytes").write_text(str(LIMIT))
        limit = "control group"
    except OSError:
        limit = "RLIMIT_DATA"
    child = subprocess.Popen(
        [sys.executable, __file__, "pass", str(folder), "--tokens", str(tokens), "--limit", limit],
        stdout=subprocess.PIPE,
        text=True,
    )
    said, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"the pass ended with {child.returncode}")
    found = json.loads(said.splitlines()[-1])
    print(f"limit: 4 GiB by {limit}; peak resident {found['peak'] / 2**30:.2f} GiB")
    for name, ratio in found["read"].items():
        print(f"{name}: {ratio:.4f} × its tensors read (limit 1.02)")
    print(f"wall {found['wall']:.0f} s, reading {found['reading']:.0f} s, flops "
          f"{found['flops']:.0f} s: {found['wall'] / (found['reading'] + found['flops']):.2f} × "
          "(limit 1.3)")  # fmt: skip
    if limit == "control group":
        GROUP.rmdir()


def one_pass(folder: Path, tokens: int, limit: str) -> None:
    """Gated, baked, and two GGUF by their weights, layer by layer (the process that is limited)."""
    if limit == "control group":
        (GROUP / "cgroup.procs").write_text(str(os.getpid()))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    from so8tqc.progress import SILENT
    from so8tqc.rotations.read import read_rotations
    from so8tqc.services.qc.readings import FileModels
    from so8tqc.sources.compare import compare
    from so8tqc.sources.layerwise.choice import ModelLoader, gated_source, plain_source
    from so8tqc.sources.protocol import EncodedText

    rotations = read_rotations(folder / "gates.safetensors")
    generator = np.random.default_rng(0)
    each = min(tokens, 500)
    texts = [
        EncodedText(f"t{i}", generator.integers(10, 31990, size=each))
        for i in range(max(1, tokens // each))
    ]
    loader = ModelLoader(folder / "states", stream=True)
    files = FileModels(loader)

    def build() -> list:  # type: ignore[type-arg]
        return [
            gated_source(loader.load(folder / "base"), rotations, "gated"),
            plain_source(loader.load(folder / "baked"), "baked"),
            *(
                plain_source(files.load(folder / f"{kind}.gguf", folder / "base"), kind)
                for kind in ("Q8_0", "Q4_K")
            ),
        ]

    begin = time.perf_counter()
    sources = loader.built(build, lambda made: made, texts, SILENT)
    compare(sources, [("gated", s.name) for s in sources[1:]], texts)
    wall = time.perf_counter() - begin
    sizes = {s.name: _stored(folder, s.name) for s in sources}
    read = {s.name: s.model.bytes_read / sizes[s.name] for s in sources}
    with Path("/proc/self/status").open() as status:
        peak = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    for source in sources:
        source.close()
    print(
        json.dumps(
            {
                "peak": peak,
                "wall": wall,
                "read": read,
                "reading": _reading(folder),
                "flops": _flops(sum(t.tokens.size for t in texts), len(sources)),
            }
        )
    )


def _stored(folder: Path, name: str) -> int:
    from so8tqc.checkpoints.safetensors_index import open_checkpoint
    from so8tqc.gguf.file import open_gguf

    if name in ("gated", "baked"):
        return open_checkpoint(folder / ("base" if name == "gated" else name)).bytes
    return sum(t.bytes for t in open_gguf(folder / f"{name}.gguf").tensors.values())


def _reading(folder: Path) -> float:
    """Seconds to read every file once, plainly."""
    buffer = bytearray(8 << 20)
    begin = time.perf_counter()
    for path in [*folder.glob("ba*/*.safetensors"), *folder.glob("*.gguf")]:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - begin


def _flops(tokens: int, passes: int) -> float:
    """Seconds of one layer's matrix products here, times layers and passes, and the heads'."""
    import torch as t

    width, inner, vocabulary = 4096, 11008, 32000
    x, y = t.rand(min(tokens, 500), width), t.rand(min(tokens, 500), inner)
    square, up, down = t.rand(width, width), t.rand(inner, width), t.rand(width, inner)
    head = t.rand(vocabulary, width)
    begin = time.perf_counter()
    for _ in range(4):
        x @ square.T
    for _ in range(2):
        x @ up.T
    y @ down.T
    layer = time.perf_counter() - begin
    begin = time.perf_counter()
    x @ head.T
    last = time.perf_counter() - begin
    return (32 * layer + last) * passes * max(1, tokens // min(tokens, 500))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["fits", "large", "pass"])
    parser.add_argument("place", type=Path)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--texts", type=int, default=25)
    parser.add_argument("--limit", default="none")
    given = parser.parse_args()
    if given.what == "fits":
        fits(given.place, given.texts, given.tokens or 256)
    elif given.what == "large":
        large(given.place, given.tokens or 2000)
    else:
        one_pass(given.place, given.tokens or 2000, given.limit)


if __name__ == "__main__":
    main()
