"""Names on a hub: what is one, what is fetched, what is recorded, and when nobody is asked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fake_hub import COMMIT, FakeHub, fake_hub, fill_cache
from so8tqc.config import BakeConfig, QCConfig, RunConfig
from so8tqc.disk.digests import file_ref, hub_source, short_name
from so8tqc.errors import ModelError, RotationError
from so8tqc.paths import anchored
from so8tqc.services.bake import bake
from so8tqc.services.qc.service import qc
from so8tqc.sources.inputs.hub import HubName, hub_name, local_model, local_rotations


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubName("org/name", None)),
        ("org/name@v1.0", HubName("org/name", "v1.0")),
        ("Org-1/Na.me_2@" + COMMIT, HubName("Org-1/Na.me_2", COMMIT)),
        ("name", None),
        ("../name", None),
        ("/org/name", None),
        ("~org/name", None),
        ("a/b/c", None),
        ("org/gates.safetensors", None),
        ("org/model-Q8_0.GGUF", None),
        ("org/", None),
        ("org/name@", None),
        ("org/name@a/b", None),
        ("org/-name", None),
        ("builtin:x/y", None),
    ],
)
def test_what_is_a_name(
    text: str, expected: HubName | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name(Path(text)) == expected


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    assert hub_name(Path("org/name")) is None  # misspelt: the folder is here
    Path("org/name").mkdir()
    assert local_model(Path("org/name")) == Path("org/name")


def test_a_dot_in_front_makes_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = {"base": "./org/name", "rotations": "./org/gates", "out": "x"}
    config = BakeConfig.model_validate(file)
    assert config.base == tmp_path / "org" / "name"
    assert hub_name(config.base) is None
    assert hub_name(config.rotations) is None
    assert hub_name(Path(RunConfig(base="./org/name", rotations="r").base)) is None
    judged = {"reference": "./a/b", "candidates": ["./c/d"], "out": "x"}
    assert hub_name(QCConfig.model_validate(judged).candidates[0]) is None
    assert anchored("org/name") == "org/name"
    (tmp_path / "model").mkdir()
    assert anchored("./model") == "./model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_offline_the_cache_is_used_and_the_commit_recorded(
    cache: Path, llama: Path, make_gates: Callable[..., Path], texts_file: Path
) -> None:
    repository = Path("gates-repository")
    repository.mkdir()
    shutil.copy(make_gates(llama), repository / "gates.safetensors")
    model = fill_cache(cache, "org/tiny", llama)
    gates = fill_cache(cache, "org/gates", repository)
    assert local_model(Path("org/tiny")) == model
    assert local_rotations(Path("org/gates@main")) == gates / "gates.safetensors"

    out = Path("baked")
    record = bake(BakeConfig(base=Path("org/tiny"), rotations=Path("org/gates"), out=out))
    assert record.inputs["base"].source == f"org/tiny@{COMMIT}"
    assert record.inputs["rotations"].source == f"org/gates@{COMMIT}"
    provenance = json.loads((out / "so8tqc.json").read_text())
    assert provenance["base"] == f"org/tiny@{COMMIT}"
    assert provenance["rotations"] == f"org/gates@{COMMIT}"

    shutil.rmtree(cache)
    baked = fill_cache(cache, "org/baked", out)
    judged = qc(
        QCConfig(
            reference=llama,
            rotations=make_gates(llama),
            candidates=(Path("org/baked"),),
            data=(str(texts_file),),
            max_tokens=48,
            resamples=100,
            out=Path("qc"),
            tokenizer=Path("org/baked"),
        )
    )
    assert judged.verdict == "pass"
    assert {check.subject for check in judged.checks} >= {"baked"}
    assert judged.inputs["candidate_1"] == file_ref(baked)
    assert judged.inputs["candidate_1"].source == f"org/baked@{COMMIT}"
    assert judged.inputs["reference"].source is None


def test_names_of_snapshots(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--my-org--a--b" / "snapshots" / COMMIT
    assert hub_source(snapshot) == f"my-org/a--b@{COMMIT}"
    assert hub_source(snapshot / "x.safetensors") == f"my-org/a--b@{COMMIT}"
    assert hub_source(tmp_path / "models--x") is None
    assert short_name(snapshot) == "a--b"
    assert short_name(snapshot / "x.gguf") == "x.gguf"
    assert short_name(tmp_path / "m") == "m"


def test_offline_what_is_not_there_is_said(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"org/name: .*HF_HUB_OFFLINE.*hf download org/name"):
        local_model(Path("org/name"))
    two = cache / "two"
    two.mkdir(parents=True)
    for name in ("a.safetensors", "b.safetensors"):
        (two / name).write_bytes(name.encode())
    fill_cache(cache, "org/two", two)
    with pytest.raises(RotationError, match=r"one gate file .* a.safetensors, b.safetensors"):
        local_rotations(Path("org/two"))


def so8tqc(hub: FakeHub, here: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A process of its own: huggingface_hub reads its environment when it is imported."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(here / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-m", "so8tqc", *map(str, arguments)],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_name_is_fetched_and_nothing_else(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    repository, gates = tmp_path / "repository", make_gates(llama)
    shutil.copytree(llama, repository)
    for name in ("modeling_evil.py", "pytorch_model.bin", "consolidated.safetensors"):
        (repository / name).write_bytes(b"x")
    with fake_hub({"org/tiny": repository}) as hub:
        done = so8tqc(hub, tmp_path, "bake", "org/tiny", gates, "--out", "baked", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["inputs"]["base"]["source"] == f"org/tiny@{COMMIT}"
        fetched = {request.rsplit("/", 1)[1] for request in hub.asked if "/resolve/" in request}
        assert fetched == {path.name for path in llama.iterdir()}

        for name, code, message in (
            ("org/tinny", 3, "neither a path here nor a repository"),
            ("org/tiny@v9", 3, "no such revision"),
        ):
            done = so8tqc(hub, tmp_path, "bake", name, gates, "--out", "baked2")
            assert (done.returncode, message in " ".join(done.stderr.split())) == (code, True)
    done = so8tqc(hub, tmp_path, "bake", "org/other", gates, "--out", "baked2")
    assert done.returncode == 4
    assert "the hub cannot be reached" in " ".join(done.stderr.split())


def test_local_paths_ask_nobody(
    llama: Path, make_gates: Callable[..., Path], texts_file: Path, tmp_path: Path
) -> None:
    gates = make_gates(llama)
    shutil.copytree(llama, tmp_path / "models" / "base")
    with fake_hub({}) as hub:
        for arguments in (
            ("bake", "models/base", gates, "--out", "baked"),
            (
                "qc",
                "--reference",
                "models/base",
                "--rotations",
                gates,
                "--candidate",
                "baked",
                "--data",
                texts_file,
                "--max-tokens",
                "32",
                "--set",
                "resamples=100",
                "--out",
                "qc",
            ),
            (
                "longtext",
                "baked",
                "--reference",
                "models/base",
                "--data",
                texts_file,
                "--out",
                "lt",
                "--min-tokens",
                "64",
                "--max-new-tokens",
                "2",
                "--no-png",
                "--set",
                "resamples=100",
            ),
        ):
            done = so8tqc(hub, tmp_path, *arguments)
            assert done.returncode in (0, 1), done.stderr  # so short a text may fail its checks
        for wrong in ("./org/tiny", "models/bse"):
            done = so8tqc(hub, tmp_path, "bake", wrong, gates, "--out", "baked2")
            assert done.returncode == 3
            assert "config.json is missing" in " ".join(done.stderr.split())
        assert hub.asked == []
