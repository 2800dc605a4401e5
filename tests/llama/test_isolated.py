"""The worker gives libllama's own numbers, and its death is a message."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from so8tqc.errors import DataError, ModelError, ToolError
from so8tqc.llama import isolated
from so8tqc.llama.isolated import IsolatedModel
from so8tqc.llama.libllama import LlamaModel
from so8tqc.sources.gguf import open_together

pytestmark = pytest.mark.llama


@pytest.fixture
def file(tiny_gguf: Callable[[int], Path]) -> Path:
    return tiny_gguf(64)


def test_the_numbers_are_those_of_libllama_in_this_process(file: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 64, size=40)
    here, there = LlamaModel(file, threads=1), IsolatedModel(file, threads=1)
    assert there.vocab_size == here.vocab_size
    assert there.trained_context == here.trained_context
    assert there.file_type == here.file_type
    for model in (here, there):
        model.begin(40)
    for start, stop, first in ((0, 10, 0), (10, 40, 12)):  # the second asks for more rows
        ours = here.decode(tokens[start:stop], start, first)
        assert ours.shape == (stop - start - first, 64)
        np.testing.assert_array_equal(there.decode(tokens[start:stop], start, first), ours)
    here.close()
    there.close()
    there.close()


def test_what_it_refuses_is_refused_here(file: Path) -> None:
    model = IsolatedModel(file)
    with pytest.raises(DataError, match="65 tokens are more than the model's context of 64"):
        model.begin(65)
    model.begin(2)
    with pytest.raises(DataError, match="token 64 is not in the model's vocabulary"):
        model.decode(np.array([1, 64]), 0)
    assert model.decode(np.array([1, 2]), 0).shape == (2, 64)  # it is still there
    model.close()


def test_a_file_that_is_none_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        IsolatedModel(tmp_path / "absent.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError):
        IsolatedModel(tmp_path / "bad.gguf")


@pytest.mark.parametrize("when", ["open", "decode", "tokenize"])
def test_an_abort_of_libllama_is_a_message(
    when: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker in which the call says something and aborts, as GGML_ASSERT does."""
    site = tmp_path / "site"
    site.mkdir()
    method = "__init__" if when == "open" else "decode"
    (site / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if any('model_worker' in argument for argument in sys.orig_argv):\n"
        "    from so8tqc.llama.libllama import LlamaModel\n"
        "    def die(*_):\n"
        "        os.write(2, b'ggml.c:1: GGML_ASSERT(x) failed\\n'); os.abort()\n"
        f"    LlamaModel.{method} = lambda *a, **b: die()\n"
        "    from so8tqc.llama import libllama\n"
        f"    if {when == 'tokenize'}: libllama.tokenize = lambda *a: die()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    said = r"SIGABRT.*GGML_ASSERT\(x\) failed"
    if when == "open":
        with pytest.raises(ModelError, match=said):
            IsolatedModel(file)
        return
    if when == "tokenize":
        with pytest.raises(ModelError, match=said):
            isolated.tokenize(file, "one")
        return
    model = IsolatedModel(file)
    model.begin(2)
    with pytest.raises(ToolError, match=said):
        model.decode(np.array([1, 2]), 0)
    model.close()


def test_an_illegal_instruction_is_not_the_files_fault(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if any('model_worker' in argument for argument in sys.orig_argv):\n"
        "    from so8tqc.llama.libllama import LlamaModel\n"
        "    LlamaModel.__init__ = lambda *a, **b: os.kill(os.getpid(), signal.SIGILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(ToolError, match=r"SIGILL.*CMAKE_ARGS='-DGGML_NATIVE=OFF'"):
        IsolatedModel(file)


def test_no_worker_and_no_memory_is_left_behind(file: Path) -> None:
    def left() -> set[Path]:
        return set(isolated._SHARED_MEMORY.glob("so8tqc-logits-*"))

    before = left()
    model = IsolatedModel(file)
    model.begin(1)
    model.decode(np.array([1]), 0)
    assert left() == before
    worker = model._worker._process.pid
    model.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_of_files_opened_together_none_stays_open_when_one_is_bad(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"first": file, "second": file}
    opened = open_together(files, threads=1)
    assert [source.name for source in opened] == list(files)
    tokens = np.arange(5)
    first, second = (next(source.logits(tokens, 8)).clone() for source in opened)
    np.testing.assert_array_equal(first, second)
    for source in opened:
        source.close()

    closed: list[Path] = []
    real = IsolatedModel.close
    monkeypatch.setattr(IsolatedModel, "close", lambda m: (closed.append(m.path), real(m)))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        open_together({"good": file, "bad": tmp_path / "bad.gguf", "other": file}, threads=1)
    assert closed.count(file) == 2


def test_the_worker_ends_with_us(file: Path) -> None:
    """Its input ends when we die, however we do."""
    import subprocess
    import sys

    code = (
        "import sys, os, signal\nfrom pathlib import Path\n"
        "from so8tqc.llama.isolated import IsolatedModel\n"
        "model = IsolatedModel(Path(sys.argv[1]))\n"
        "print(model._worker._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    worker = Path(f"/proc/{done.stdout.strip()}")
    deadline = time.monotonic() + 30
    while worker.exists() and time.monotonic() < deadline:
        if "Z" in (worker / "stat").read_text().rsplit(")", 1)[1].split()[0]:
            return  # ended, not yet reaped by its new parent
        time.sleep(0.05)
    assert not worker.exists()


def test_memory_that_does_not_fit_is_taken_elsewhere(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers often have 64 MB of shared memory."""
    real = os.posix_fallocate
    asked = []

    def small(handle: int, offset: int, size: int) -> None:
        asked.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        if len(asked) == 1:
            raise OSError(28, "No space left on device")
        real(handle, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", small)
    model = IsolatedModel(file)
    model.begin(1)
    assert model.decode(np.array([1]), 0).shape == (1, 64)
    model.close()
    assert asked[0].startswith("/dev/shm")
    assert not asked[1].startswith("/dev/shm")
