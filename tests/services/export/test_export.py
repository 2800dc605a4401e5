"""What the export proof accepts, and what it must not."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.config import ExportConfig
from so8tqc.errors import ModelError, ToolError
from so8tqc.gguf.file import open_gguf
from so8tqc.llama.vendor import is_vendored
from so8tqc.records import Verdict
from so8tqc.services.export import service as module
from so8tqc.services.export.proof import TensorComparison, compare_tensors, proof_checks
from so8tqc.services.export.service import export

needs_converter = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]
HEADS, WIDTH, EXPERTS = 2, 16, 3


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row by row what llama.cpp's NORM rope needs: an oracle without reshapes."""
    size = rows.shape[0] // heads
    order = [h * size + i + half * size // 2 for h in range(heads) for i in range(size // 2)
             for half in (0, 1)]  # fmt: skip
    return rows[order]


def write_pair(
    directory: Path, architecture: str = "llama", **replace: np.ndarray
) -> tuple[Checkpoint, Path]:
    """A one-layer checkpoint and the GGUF a right converter makes of it, but for ``replace``."""
    make = np.random.default_rng(0).normal
    names = {
        "self_attn.q_proj.weight": ("attn_q", make(size=(WIDTH, WIDTH))),
        "self_attn.o_proj.weight": ("attn_output", make(size=(WIDTH, WIDTH))),
        "input_layernorm.weight": ("attn_norm", make(size=WIDTH)),
    }
    for expert in range(EXPERTS):
        names[f"block_sparse_moe.experts.{expert}.w1.weight"] = (
            "ffn_gate_exps", make(size=(8, WIDTH)),
        )  # fmt: skip
    source = {f"model.layers.0.{n}": v.astype(np.float32) for n, (_, v) in names.items()}
    save_file(source, str(directory / "model.safetensors"))
    config = {"num_hidden_layers": 1, "num_attention_heads": HEADS, "model_type": architecture}
    (directory / "config.json").write_text(json.dumps(config))

    stored: dict[str, np.ndarray] = {}
    experts = []
    for name, (short, values) in names.items():
        values = values.astype(np.float32)
        if ".experts." in name:
            experts.append(values)
        elif short == "attn_q" and architecture == "llama":
            stored[short] = permuted(values, HEADS)
        else:
            stored[short] = values
    stored["ffn_gate_exps"] = np.stack(experts)
    path = directory / "model.gguf"
    writer = gguf.GGUFWriter(str(path), architecture)
    for short, values in (stored | replace).items():
        kind = np.float16 if values.ndim > 1 else np.float32
        writer.add_tensor(f"blk.0.{short}.weight", np.ascontiguousarray(values.astype(kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(directory), path


def source_values(directory: Path, name: str) -> np.ndarray:
    return load_file(str(directory / "model.safetensors"))[f"model.layers.0.{name}"]


def compared(pair: tuple[Checkpoint, Path]) -> TensorComparison:
    return compare_tensors(pair[0], open_gguf(pair[1]))


def test_a_right_file_is_explained_tensor_by_tensor(tmp_path: Path) -> None:
    found = compared(write_pair(tmp_path))
    assert found.different == found.missing == found.extra == found.unmapped == []
    assert found.arrangements == {"rope rows interleaved": 1, "unchanged": 2 + EXPERTS}
    assert {c.verdict for c in proof_checks(found)} == {Verdict.PASS}


@pytest.mark.parametrize("fault", ["q in transformers' order", "one added", "transposed"])
def test_an_arrangement_that_is_wrong_for_the_architecture_is_different(
    fault: str, tmp_path: Path
) -> None:
    """The same values in another order: each of these is right for some other model."""
    write_pair(tmp_path)
    wrong = {
        "q in transformers' order": ("self_attn.q_proj.weight", "attn_q", lambda v: v),
        "one added": ("input_layernorm.weight", "attn_norm", lambda v: v + 1),
        "transposed": ("self_attn.o_proj.weight", "attn_output", lambda v: v.T),
    }
    name, short, change = wrong[fault]
    values = change(source_values(tmp_path, name))
    found = compared(write_pair(tmp_path, **{short: values}))
    assert found.different == [f"model.layers.0.{name}"]
    assert proof_checks(found)[0].verdict is Verdict.FAIL


def test_exchanged_experts_are_different(tmp_path: Path) -> None:
    write_pair(tmp_path)
    name = "block_sparse_moe.experts.{}.w1.weight"
    stack = np.stack([source_values(tmp_path, name.format(e)) for e in (0, 2, 1)])
    found = compared(write_pair(tmp_path, ffn_gate_exps=stack))
    assert found.different == [f"model.layers.0.{name.format(e)}" for e in (1, 2)]


def test_a_lost_expert_makes_all_of_its_stack_different(tmp_path: Path) -> None:
    write_pair(tmp_path)
    stack = np.stack(
        [source_values(tmp_path, f"block_sparse_moe.experts.{e}.w1.weight") for e in (0, 1)]
    )
    assert len(compared(write_pair(tmp_path, ffn_gate_exps=stack)).different) == EXPERTS


def test_an_architecture_whose_layout_is_unknown_is_a_skip_never_silence(tmp_path: Path) -> None:
    found = compared(write_pair(tmp_path, "orion"))
    assert found.different == []
    check = next(c for c in proof_checks(found) if c.id == "export.layout")
    assert check.verdict is Verdict.SKIP
    assert "'orion'" in check.detail


def test_an_added_tensor_fails_and_a_dropped_one_is_missing(tmp_path: Path) -> None:
    found = compared(write_pair(tmp_path, ffn_up=np.ones((4, 4), dtype=np.float32)))
    assert found.extra == ["blk.0.ffn_up.weight"]
    tensors = load_file(str(tmp_path / "model.safetensors"))
    tensors["model.layers.0.self_attn.v_proj.weight"] = np.ones((4, 4), dtype=np.float32)
    save_file(tensors, str(tmp_path / "model.safetensors"))
    found = compare_tensors(open_checkpoint(tmp_path), open_gguf(tmp_path / "model.gguf"))
    assert found.missing == ["model.layers.0.self_attn.v_proj.weight"]


def test_an_added_tensor_is_excused_only_by_an_unknown_source_of_its_layer(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, ffn_up=np.ones((4, 4), dtype=np.float32))
    tensors = load_file(str(tmp_path / "model.safetensors"))
    for name, excused in (
        ("model.layers.1.mlp.fused_odd.weight", False),
        ("visual.layers.0.mlp.fused_odd.weight", False),
        ("model.layers.0.mlp.fused_odd.weight", True),
    ):
        odd = {name: np.ones((4, 4), dtype=np.float32)}
        save_file(tensors | odd, str(tmp_path / "model.safetensors"))
        found = compare_tensors(open_checkpoint(tmp_path), open_gguf(pair[1]))
        assert found.unmapped == [name]
        assert (found.unattributed == ["blk.0.ffn_up.weight"]) is excused
        assert (found.extra == ["blk.0.ffn_up.weight"]) is not excused


@pytest.fixture
def converter(tmp_path: Path) -> Callable[[str], ExportConfig]:
    """A model directory and a stand-in converter whose script is given."""

    def make(script: str) -> ExportConfig:
        model, fake = tmp_path / "model", tmp_path / "llama.cpp"
        model.mkdir()
        fake.mkdir()
        write_pair(model)
        (fake / "convert_hf_to_gguf.py").write_text(script)
        return ExportConfig(model=model, out=tmp_path / "out" / "x.gguf", llama_cpp=fake)

    return make


@pytest.mark.parametrize(
    ("script", "error", "says"),
    [
        ("raise ValueError('no such model')", ToolError, "exit 1.*ValueError: no such model"),
        ("import os; os.abort()", ToolError, "SIGABRT"),
        ("pass", ToolError, "exit 0"),
        ("import sys; open(sys.argv[-1], 'w').write('GGUF rubbish')", ModelError, "malformed"),
    ],
)
def test_a_converter_that_fails_leaves_no_file(
    script: str, error: type[Exception], says: str, converter: Callable[[str], ExportConfig]
) -> None:
    config = converter(script)
    with pytest.raises(error, match=says):
        export(config)
    assert [p.name for p in config.out.parent.iterdir()] == ["x.gguf.log"]


def test_a_full_disk_and_an_unusable_directory_are_found_before_the_converter_runs(
    converter: Callable[[str], ExportConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = converter("raise SystemExit('must not run')")
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolError, match="cannot write here"):
        export(config.model_copy(update={"out": tmp_path / "file" / "x.gguf"}))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(ToolError, match="the export needs about"):
        export(config)


def test_interruption_kills_the_converter(
    converter: Callable[[str], ExportConfig], tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    config = converter(
        f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        "print('INFO:hf-to-gguf:a.weight, x', flush=True)\ntime.sleep(600)"
    )

    class Interrupting:
        def advance(self, amount: float = 1.0, item: str | None = None) -> None:
            raise KeyboardInterrupt

    class Progress(type(module.SILENT)):  # type: ignore[misc]
        def task(self, *_: object, **__: object) -> contextlib.nullcontext[Interrupting]:
            return contextlib.nullcontext(Interrupting())

    with pytest.raises(KeyboardInterrupt):
        export(config, Progress())
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert [p.name for p in config.out.parent.iterdir()] == ["x.gguf.log"]


@pytest.mark.parametrize("_marked", [pytest.param(0, marks=needs_converter)])
def test_python_code_of_a_model_directory_is_never_run(
    _marked: int, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Through a path of the real converter that asks transformers to trust the code."""
    model, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(make_model("qwen2"), model)
    (model / "tokenizer.model").unlink()
    (model / "tok.py").write_text(
        f"open({str(trace)!r}, 'w').close()\nfrom transformers import LlamaTokenizer\n"
        "class T(LlamaTokenizer): pass\n"
    )
    for file, values in (
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tok.T", None]},
                                   "tokenizer_class": "T"}),
        ("config.json", {"architectures": ["DreamModel"], "model_type": "Dream",
                         "rope_theta": 1e4}),
    ):  # fmt: skip
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(content | values))
    with pytest.raises(ToolError, match="Python code of its own"):
        export(ExportConfig(model=model, out=tmp_path / "x.gguf"))
    assert not trace.exists()


@pytest.mark.parametrize("_marked", [pytest.param(0, marks=needs_converter)])
def test_braces_in_a_path_are_no_template(_marked: int, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "a{b}-{ftype}.gguf"
    assert export(ExportConfig(model=llama, out=out)).verdict is Verdict.PASS
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name, out.name + ".log"]
