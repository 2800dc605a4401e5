"""The shell blocks of the documentation are run, on a tiny model under the names they use.

Each page has a directory of its own, in which its blocks run in order, line by line. ``so8tqc``
runs in this process; everything else in a shell. A line that begins with ``!`` must fail. How much
text, how many resamples and which limits comes from the environment, so that a block takes seconds.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from blocks import PAGES, ROOT, blocks_of, lines_of

from so8tqc.cli.main import run
from so8tqc.llama.vendor import is_vendored
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target

ENVIRONMENT = {
    "SO8TQC_ALLOW_SMALL": "true",
    "SO8TQC_MAX_EVALUATIONS": "6",
    "SO8TQC_MAX_NEW_TOKENS": "4",
    "SO8TQC_MIN_TOKENS": "192",
    "SO8TQC_PNG": "false",
    "SO8TQC_REPEATS": "1",
    "SO8TQC_RESAMPLES": "100",
}
"""Options of single commands; max_tokens, data and profile are added where a command has them."""

_PLAIN = re.compile(r"^(?P<fails>!\s+)?(?P<assignments>(?:[A-Z0-9_]+=\S*\s+)*)so8tqc\s")
_NEEDS_LIBLLAMA = re.compile(r"gguf|so8tqc (export|quantize|calibrate)")
_RUN_PAGES = [
    page
    for page in PAGES
    if page != "README.ja.md"  # its blocks are those of README.md, by another test
    and any(b.language == "bash" and not b.reason for b in blocks_of(page))
]


@pytest.fixture(scope="session")
def world(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its gates and texts, under the names of the documentation."""
    directory = tmp_path_factory.mktemp("world")
    shutil.copytree(make_model("llama"), directory / "model")
    theta = {Target(i): np.random.default_rng(i).normal(size=(8, 8, 8)) * 0.3 for i in range(3)}
    write_native(
        directory / "gates.safetensors",
        theta,
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )
    texts = json.loads((ROOT / "data" / "validation_en.json").read_text(encoding="utf-8"))["texts"]
    lines = [json.dumps({"id": f"t{i}", "text": text[:300]}) for i, text in enumerate(texts[:8])]
    (directory / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    long_texts = json.loads((ROOT / "data" / "longtext_en.json").read_text(encoding="utf-8"))
    (directory / "book.txt").write_text(long_texts["texts"][0], encoding="utf-8")
    # random weights have flat distributions: what is close for a real model flips their top token
    (directory / "loose.yaml").write_text(
        "loose:\n  models: {kl.mean: {target: 1.0e-6}}\n"
        "  gguf: {default: {kl.mean: {limit: 0.5}}}\n"
    )
    shutil.copytree(ROOT / "configs", directory / "configs")
    _run(directory, ["bake", "model", "gates.safetensors", "--out", "baked"])
    return directory


@pytest.fixture(scope="session")
def gguf_world(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with GGUF files."""
    directory = tmp_path_factory.mktemp("gguf") / "world"
    shutil.copytree(world, directory)
    _run(directory, ["export", "baked", "--out", "model-F16.gguf"])
    _run(
        directory,
        ["quantize", "model-F16.gguf", "--type", "Q8_0", "--type", "Q5_K_M", "--out", "quantized"],
    )
    for name in ("model-Q5_K_M.gguf", "q5.gguf", "A.gguf"):
        shutil.copy(directory / "quantized" / "model-Q5_K_M.gguf", directory / name)
    for name in ("model-Q8_0.gguf", "B.gguf"):
        shutil.copy(directory / "quantized" / "model-Q8_0.gguf", directory / name)
    shutil.copy(directory / "model-F16.gguf", directory / "f16.gguf")
    shutil.rmtree(directory / "quantized")
    return directory


@pytest.mark.parametrize("page", _RUN_PAGES)
def test_shell_blocks(
    page: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [b for b in blocks_of(page) if b.language == "bash" and not b.reason]
    name = "world"
    if any(_NEEDS_LIBLLAMA.search(block.text) for block in blocks):
        if not is_vendored():
            pytest.skip("run `so8tqc vendor` first")
        name = "gguf_world"
    here = tmp_path / "page"
    shutil.copytree(request.getfixturevalue(name), here)
    monkeypatch.chdir(here)
    for block in blocks:
        for line in lines_of(block):
            where = f"{page}:{block.line}: {line}"
            match = _PLAIN.match(line)
            if match is None or re.search(r"\s[&|<>]+\s", line):
                subprocess.run(["bash", "-euc", line], check=True)
                continue
            code = _so8tqc(line[match.end("assignments") :], match["assignments"], monkeypatch)
            assert (code != 0) == bool(match["fails"]), f"exit code {code}: {where}"


def test_what_is_not_run_says_why() -> None:
    skipped = [block for page in PAGES for block in blocks_of(page) if block.reason]
    assert len(skipped) >= 5
    assert all(len(block.reason.split()) >= 3 for block in skipped)


def _so8tqc(line: str, assignments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    arguments = shlex.split(line, comments=True)[1:]
    with monkeypatch.context() as patch:
        for name, value in _environment(arguments[0]).items():
            patch.setenv(name, value)
        for assignment in assignments.split():
            patch.setenv(*assignment.split("=", 1))
        return run(arguments)


def _environment(command: str) -> dict[str, str]:
    """Small sizes, for the commands that take them; ``config`` shows what a user would see."""
    if command == "config":
        return {}
    if command == "quantize":  # what a comparison takes if no type is named
        few = {"SO8TQC_MAX_TOKENS": "48", "SO8TQC_HESSIAN_TOKENS": "2048"}
        return {**ENVIRONMENT, **few, "SO8TQC_TYPES": "[Q5_K_M, Q8_0]"}
    if command == "qc":
        return {**ENVIRONMENT, "SO8TQC_MAX_TOKENS": "48", "SO8TQC_PROFILE": "loose.yaml"}
    return {**ENVIRONMENT, "SO8TQC_MAX_TOKENS": "48"}


def _run(directory: Path, arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert run([*arguments, "--quiet"]) == 0, arguments
