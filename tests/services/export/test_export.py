"""The converter is run: what it must not leave, do or take for a template."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from so8tqc.config import ExportConfig
from so8tqc.errors import ModelError, ToolError
from so8tqc.llama.vendor import is_vendored
from so8tqc.records import Verdict
from so8tqc.services.export import service as module
from so8tqc.services.export.service import export

needs_converter = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]


@pytest.fixture
def converter(tmp_path: Path) -> Callable[[str], ExportConfig]:
    """A model directory and a stand-in converter whose script is given."""

    def make(script: str) -> ExportConfig:
        model, fake = tmp_path / "model", tmp_path / "llama.cpp"
        model.mkdir()
        fake.mkdir()
        weight = np.ones((4, 4), dtype=np.float32)
        name = "model.layers.0.self_attn.o_proj.weight"
        save_file({name: weight}, str(model / "model.safetensors"))
        (model / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
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
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["tok.T", None]}, "tokenizer_class": "T"},
        ),
        (
            "config.json",
            {"architectures": ["DreamModel"], "model_type": "Dream", "rope_theta": 1e4},
        ),
    ):
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
