"""The set is built from checked packages, is the same every time, and is found by its name."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from so8tqc.corpus import fetch, manifest, store
from so8tqc.corpus.manifest import Domain, Source, read_corpus_manifest
from so8tqc.errors import ConfigError, DataError, ExitCode, MissingToolError, ToolError
from so8tqc.resources import data_file
from so8tqc.services import data as service
from so8tqc.services.data import calibration_data
from so8tqc.sources.inputs.texts import load_texts
from tiny_packages import debian, tarball, wheel


def english(*names: str) -> str:
    """A paragraph of about 120 words for each name, of invented nouns, the name among them."""
    return "\n\n".join(" ".join(english_sentence(name, i) for i in range(7)) for name in names)


def english_sentence(name: str, number: int) -> str:
    draw = random.Random(f"{name} {number}")
    a, b, c, d = ("".join(draw.choices(["ba", "do", "ki", "lu"], k=5)) for _ in "abcd")
    return f"The {name} of the {a} was {b} in the {c}, and it had been with {d} for a day."


def japanese(*names: str) -> str:
    """A paragraph of some 300 characters for each name."""
    return "\n\n".join("".join(japanese_sentence(name, i) for i in range(9)) for name in names)


def japanese_sentence(name: str, number: int) -> str:
    draw = random.Random(f"{name} {number}")
    a, b, c, d = (
        "".join(draw.choice("山川空海森丘谷池島岸波風") for _ in range(3)) for _ in "abcd"
    )
    return f"{name}の{a}は{b}から{c}までを{d}とともに見ていたのでした。"


class Bench:
    """A manifest of two packages and one written file, in place of the real ones."""

    def __init__(self, root: Path) -> None:
        self.data, self.packages = root / "data", root / "packages"
        self.data.mkdir()
        self.packages.mkdir()
        self.sources: list[dict[str, Any]] = []
        self.add(
            "one.whl",
            "pip",
            wheel({"LICENSE": b"MIT License", "a/text.txt": self.english()}),
            [{"reader": "text", "files": ["a/*.txt"], "language": "en", "domain": "medicine"}],
        )
        self.add(
            "two.deb",
            "apt",
            debian({"LICENSE": b"MIT License", "b/text.txt": japanese("山", "森", "丘").encode()}),
            [{"reader": "text", "files": ["b/*.txt"], "language": "ja", "domain": "literature"}],
        )
        self.write_texts("calibration_a.json", categories=["language", "physics"])
        self.save()

    @staticmethod
    def english() -> bytes:
        return english("river", "lake", "pond", "brook", "stream").encode()

    def add(self, file: str, client: str, content: bytes, parts: list[dict[str, Any]]) -> None:
        (self.packages / file).write_bytes(content)
        self.sources.append(
            {
                "client": client,
                "package": file.partition(".")[0],
                "version": "1.0",
                "file": file,
                "sha256": hashlib.sha256(content).hexdigest(),
                "licence": "MIT",
                "licence_file": "LICENSE",
                "licence_phrase": "MIT License",
                "parts": parts,
            }
        )

    def write_texts(self, name: str, **columns: Any) -> None:
        value = {
            "texts": ["A written text.", "書いた文章。"],
            "languages": ["en", "ja"],
            "ids": ["x", "y"],
        }
        (self.data / name).write_text(json.dumps({**value, **columns}))

    def save(self, **changes: Any) -> None:
        value = {
            "seed": 1,
            "quota": {"en": 3, "ja": 3},
            "written": ["calibration_*.json"],
            "categories": {"physics": "mathematics_physics"},
            "sources": self.sources,
            "result": {"sha256": "0" * 64, "samples": 0, "counts": {}},
        }
        (self.data / manifest.MANIFEST).write_text(json.dumps({**value, **changes}))

    def pin(self) -> None:
        calibration_data(self.packages, update=True)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = made.data / manifest.MANIFEST
    monkeypatch.setattr(manifest, "manifest_path", lambda: path)
    monkeypatch.setattr(service, "manifest_path", lambda: path)
    return made


def test_the_manifest_is_valid_and_holds_what_was_asked_for() -> None:
    """At least 1,000 samples, both languages, every domain; each licence has its place."""
    real = read_corpus_manifest()
    counts = real.result.counts
    assert real.result.samples == sum(sum(cells.values()) for cells in counts.values()) >= 1000
    assert set(counts) == {"en", "ja"}
    assert all(sum(cells.values()) >= 350 for cells in counts.values())
    assert set(counts["en"]) == set(counts["ja"]) == set(Domain)
    for source in real.sources:
        assert source.licence
        assert source.licence_file
        # what is fetched says which version it is
        assert source.version.split(":")[-1] in source.file


def test_the_readme_has_the_manifests_numbers() -> None:
    counts = read_corpus_manifest().result.counts
    table = data_file("README.md").read_text(encoding="utf-8").partition("English, packages")[2]
    rows = dict(
        re.findall(r"^\| ([a-zA-Z ]+) \| ((?:\d+ \| ){3}\d+) \|$", table, flags=re.MULTILINE)
    )
    for domain in Domain:
        name = domain.replace("_", " and ").replace(" ai", " AI")
        english, own_english, japanese, own_japanese = map(int, rows[name].split(" | "))
        assert english + own_english == counts["en"][domain]
        assert japanese + own_japanese == counts["ja"][domain]


def test_a_build_is_stored_where_its_name_finds_it(bench: Bench) -> None:
    bench.pin()
    record = calibration_data(bench.packages)
    texts = load_texts(["builtin:calibration"])
    assert record.metrics["samples"] == len(texts) == 8
    assert record.metrics["counts"] == {
        "en": {"language": 1, "medicine": 3},
        "ja": {"literature": 3, "mathematics_physics": 1},
    }
    written = next(text for text in texts if text.text == "書いた文章。")
    assert (written.language, written.category) == ("ja", "mathematics_physics")
    content = Path(record.outputs["texts"].path).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in content.splitlines()]
    assert {line["source"] for line in lines} == {"written", "pip:one", "apt:two"}
    assert all(line["licence"] for line in lines)


def test_the_same_inputs_give_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    bench.pin()
    code = (
        "import sys; from pathlib import Path; from so8tqc.corpus import manifest\n"
        "from so8tqc.services import data as s\n"
        "path = Path(sys.argv[1]); s.manifest_path = manifest.manifest_path = lambda: path\n"
        "s.calibration_data(Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    digests = set()
    for seed in ("0", "1", "77"):  # of Python's own hashes
        out = tmp_path / f"{seed}.jsonl"
        subprocess.run(
            [sys.executable, "-c", code, bench.data / manifest.MANIFEST, bench.packages, out],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert digests == {read_corpus_manifest(bench.data / manifest.MANIFEST).result.sha256}


def test_the_order_of_the_packages_does_not_matter(bench: Bench) -> None:
    """Two packages have more texts for one cell than it takes."""
    more = {"LICENSE": b"MIT License", "a/text.txt": english("hill", "plain", "moor").encode()}
    bench.add("three.tgz", "npm", tarball(more), bench.sources[0]["parts"])
    bench.save()
    bench.pin()
    bench.sources.reverse()
    bench.save(result=json.loads((bench.data / manifest.MANIFEST).read_text())["result"])
    calibration_data(bench.packages)  # else: the set is not the pinned one


def test_a_packages_text_that_was_written_for_the_project_too_goes(bench: Bench) -> None:
    (bench.data / "calibration_b.json").write_text(
        json.dumps(
            {"texts": [english("lake")], "language": "en", "categories": ["ethics_philosophy"]}
        )
    )
    bench.save(quota={"en": 9, "ja": 9})
    bench.pin()
    texts = load_texts(["builtin:calibration"])
    assert [t.category for t in texts if english_sentence("lake", 3) in t.text] == [
        "ethics_philosophy"
    ]
    assert sum(t.category == "medicine" for t in texts) == 4


def test_another_package_file_is_refused(bench: Bench) -> None:
    (bench.packages / "one.whl").write_bytes(wheel({"a/text.txt": bench.english()}))
    with pytest.raises(ToolError, match=r"SHA-256 is .* pinned is"):
        calibration_data(bench.packages)


def test_another_result_is_refused_and_nothing_is_stored(bench: Bench) -> None:
    bench.pin()
    store.calibration_file().unlink()
    bench.write_texts("calibration_a.json", categories=["language", "medicine"])
    with pytest.raises(ToolError, match="pinned is"):
        calibration_data(bench.packages)
    with pytest.raises(MissingToolError):
        load_texts(["builtin:calibration"])


def test_a_package_with_another_licence_is_refused(bench: Bench) -> None:
    bench.sources[0]["licence_phrase"] = "Apache License"
    bench.save()
    with pytest.raises(DataError, match="does not say 'Apache License'"):
        calibration_data(bench.packages)
    bench.sources[0]["licence_file"] = "COPYING"
    bench.save()
    with pytest.raises(DataError, match="states the licence is not there"):
        calibration_data(bench.packages)


def test_a_part_that_gives_nothing_is_refused(bench: Bench) -> None:
    bench.sources[0]["parts"][0]["files"] = ["absent/*"]
    bench.save()
    with pytest.raises(DataError, match="nothing was found in absent"):
        calibration_data(bench.packages)


def test_missing_packages_are_named(bench: Bench, tmp_path: Path) -> None:
    (bench.packages / "two.deb").unlink()
    with pytest.raises(ToolError, match=r"apt:two 1.0 .*no two.deb") as error:
        calibration_data(bench.packages)
    assert error.value.exit_code == ExitCode.TOOL
    with pytest.raises(ConfigError, match="is not builtin:calibration"):
        calibration_data(bench.packages, allow_missing=True)
    record = calibration_data(bench.packages, tmp_path / "part.jsonl", allow_missing=True)
    assert "Without apt:two: no two.deb." in record.notices
    assert {t.category for t in load_texts([str(tmp_path / "part.jsonl")])} == {
        "language",
        "medicine",
        "mathematics_physics",
    }


def test_what_is_not_built_says_how_to_build_it(bench: Bench) -> None:
    with pytest.raises(MissingToolError, match="Run: so8tqc data"):
        load_texts(["builtin:calibration"])


def test_what_was_changed_since_is_refused_and_built_anew(bench: Bench) -> None:
    bench.pin()
    path = store.calibration_file()
    path.write_text(path.read_text() + '{"text": "More."}\n')
    with pytest.raises(DataError, match="is not what was built"):
        load_texts(["builtin:calibration"])
    calibration_data(bench.packages)
    assert store.calibration_file() == path


def test_what_is_there_is_not_fetched_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.pin()

    def no_network(*_: object) -> Path:
        raise AssertionError

    monkeypatch.setattr(service, "download", no_network)
    assert "already here" in calibration_data().notices[0]


def test_an_unknown_category_or_language_is_named(bench: Bench) -> None:
    bench.write_texts("calibration_a.json", categories=["language", "cooking"])
    with pytest.raises(DataError, match="'cooking' is none of the ten domains"):
        calibration_data(bench.packages, update=True)
    bench.write_texts(
        "calibration_a.json", categories=["language", "physics"], languages=["en", "fr"]
    )
    with pytest.raises(DataError, match="'fr', not en or ja"):
        calibration_data(bench.packages, update=True)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"sha256": "abc"}, "sha256"),
        ({"client": "curl"}, "client"),
        ({"package": "--evil"}, "package"),
        ({"version": "-o"}, "version"),
        ({"file": "../one.whl"}, "file"),
        ({"parts": []}, "parts"),
    ],
)
def test_a_wrong_manifest_is_a_data_error(bench: Bench, change: dict[str, Any], key: str) -> None:
    bench.sources[0] |= change
    bench.save()
    with pytest.raises(DataError, match=rf"sources\.0\.{key}"):
        calibration_data(bench.packages)


def test_rules_decide_the_domain(bench: Bench) -> None:
    entries = {
        name: {"t": english(name), "k": "Science", "d": about}
        for name, about in [("flu", "An illness"), ("oak", "A tree"), ("duke", "A noble")]
    }
    entries["duke"]["k"] = "People"
    bench.add(
        "three.tgz",
        "npm",
        tarball({"LICENSE": b"MIT License", "all.json": json.dumps(entries).encode()}),
        [
            {
                "reader": "json-text",
                "files": ["all.json"],
                "language": "en",
                "keys": ["*", "t:k,d"],
                "rules": [
                    {"domain": "ethics_philosophy", "tag": "Science", "pattern": "science"},
                    {"domain": "engineering", "tag": "Science", "pattern": "ILLNESS"},
                    {"domain": "biology_chemistry", "tag": "Science"},
                ],
            }
        ],
    )
    bench.save()
    bench.pin()
    texts = load_texts(["builtin:calibration"])
    found = {t.text.split()[1]: t.category for t in texts if t.language == "en"}
    assert found["flu"] == "engineering"
    assert found["oak"] == "biology_chemistry"
    assert "duke" not in found


def source(client: str, package: str) -> Source:
    return Source.model_validate(
        {
            "client": client,
            "package": package,
            "version": "1.0",
            "file": "file-1.0.tgz",
            "sha256": hashlib.sha256(b"content").hexdigest(),
            "licence": "MIT",
            "licence_file": "LICENSE",
            "licence_phrase": "MIT",
            "parts": [{"reader": "text", "files": ["*"], "language": "en", "domain": "language"}],
        }
    )


@pytest.mark.parametrize("client", ["pip", "npm", "apt"])
def test_no_client_may_run_a_packages_code(client: str, tmp_path: Path) -> None:
    command = " ".join(fetch.download_command(source(client, "name"), tmp_path))
    assert {
        "pip": "--no-deps --only-binary :all:",
        "npm": "--ignore-scripts",
        "apt": "download",
    }[client] in command


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a shell script in npm's place; returns the directory to download to."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "packages").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    def make(script: str) -> Path:
        path = tmp_path / "bin" / "npm"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return tmp_path / "packages"

    return make


def test_download(client: Callable[[str], Path]) -> None:
    directory = client("printf content > file-1.0.tgz")
    found = fetch.download(source("npm", "@scope/name"), directory)
    assert found == directory / "file-1.0.tgz"


def test_a_download_of_something_else_is_refused(client: Callable[[str], Path]) -> None:
    with pytest.raises(ToolError, match="it is not read"):
        fetch.download(source("npm", "name"), client("printf other > file-1.0.tgz"))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo first >&2; echo no such host >&2; exit 1", "no such host"),
        ("exit 7", "exit code 7"),
        ("printf content > other.tgz", "gave another file"),
    ],
)
def test_a_download_that_fails_says_why(
    client: Callable[[str], Path], script: str, reason: str
) -> None:
    found = fetch.download(source("npm", "name"), client(script))
    assert isinstance(found, fetch.Missing)
    assert reason in found.reason


def test_a_client_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = fetch.download(source("npm", "name"), tmp_path)
    assert isinstance(found, fetch.Missing)
    assert found.reason == "npm is not installed"


def built() -> bool:
    try:
        store.calibration_file()
    except MissingToolError:
        return False
    return True


@pytest.mark.skipif(not built(), reason="so8tqc data has not been run on this machine")
def test_the_real_set_is_the_pinned_one() -> None:
    pinned = read_corpus_manifest().result
    texts = load_texts(["builtin:calibration"])
    counts: dict[str, dict[str, int]] = {}
    for text in texts:
        cell = counts.setdefault(text.language, {})
        cell[text.category] = cell.get(text.category, 0) + 1
    assert counts == pinned.counts
    assert len(texts) == pinned.samples


@pytest.mark.network
def test_the_real_build_gives_the_pinned_set(tmp_path: Path) -> None:
    record = calibration_data(out=tmp_path / "set.jsonl")
    assert record.outputs["texts"].sha256 == read_corpus_manifest().result.sha256
    assert record.metrics["gzip_bytes"] < 8 * 2**20
