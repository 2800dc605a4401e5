"""Data sets: what is asked for, what comes back, and what is said without the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from so8tqc.errors import DataError, ExitCode, MissingToolError, ToolError
from so8tqc.sources.inputs.dataset_texts import DatasetSpec, dataset_file, parse_dataset
from so8tqc.sources.inputs.texts import data_paths, load_texts


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("datasets:org/name", DatasetSpec("org/name", None, None, "test", "text", None)),
        ("datasets:org/name@v1", DatasetSpec("org/name", "v1", None, "test", "text", None)),
        (
            "datasets:./folder?config=en&split=train[:10%25]&column=body&rows=7",
            DatasetSpec("./folder", None, "en", "train[:10%]", "body", 7),
        ),
    ],
)
def test_specs(spec: str, expected: DatasetSpec) -> None:
    assert parse_dataset(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("datasets:", "no data set is named"),
        ("datasets:?split=test", "no data set is named"),
        ("datasets:a/b?rows=0", "rows=0"),
        ("datasets:a/b?rows=ten", "rows=ten"),
        ("datasets:a/b?spilt=test", "no option spilt; there are config, split, column, rows"),
    ],
)
def test_wrong_specs(spec: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_dataset(spec)
    assert message in str(caught.value)
    assert "datasets:org/name?split=test" in str(caught.value)


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(MissingToolError, match=r"pip install .*so8tqc\[datasets\]") as caught:
        data_paths(["datasets:org/name"])
    assert caught.value.exit_code is ExitCode.TOOL


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of three rows in a folder, and a cache of its own."""
    datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(
        "so8tqc.sources.inputs.dataset_texts.user_cache", lambda: tmp_path / "cache"
    )
    rows = [
        {"text": "One two three.", "language": "en", "n": 1},
        {"text": "  ", "language": "en", "n": 2},
        {"text": "一、二、三。", "language": "ja", "n": 3},
    ]
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (data / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return data


def test_a_local_data_set(folder: Path) -> None:
    texts = load_texts([f"datasets:{folder}"])
    assert [(text.text, text.language) for text in texts] == [
        ("One two three.", "en"),
        ("一、二、三。", "ja"),
    ]
    assert [text.text for text in load_texts([f"datasets:{folder}?rows=1"])] == ["One two three."]
    assert dataset_file(f"datasets:{folder}") == dataset_file(f"datasets:{folder}")
    assert dataset_file(f"datasets:{folder}") != dataset_file(f"datasets:{folder}?rows=1")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?column=body", "no column 'body'; there are text, language, n"),
        ("?column=n", "holds no text"),
        ("?split=validation", "datasets cannot load it"),
    ],
)
def test_unusable_data_sets(folder: Path, query: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        dataset_file(f"datasets:{folder}{query}")
    assert message in str(caught.value)


def test_what_is_not_there_is_said(folder: Path) -> None:
    with pytest.raises(ToolError, match=r"org/not-cached: cannot be fetched"):
        dataset_file("datasets:org/not-cached")
    for path in ("./absent", "/absent", "a/b/c"):
        with pytest.raises(DataError, match="no such folder"):
            dataset_file(f"datasets:{path}")
