"""A run's own files compared by what its qc measured: as if they had been evaluated again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captured_gguf import write_capture, write_model
from so8tqc.config import ChooseAmongConfig, ChooseConfig, QCConfig, QuantizeConfig
from so8tqc.errors import InputError
from so8tqc.metrics.columns import COLUMNS
from so8tqc.metrics.divergence import TokenTable
from so8tqc.record_files import write_record
from so8tqc.records import Record, Verdict
from so8tqc.reports.summary import summarise_run
from so8tqc.services.choose.among import choose_among
from so8tqc.services.choose.service import choose
from so8tqc.services.qc.service import qc
from so8tqc.services.qc.token_file import read_tokens, write_tokens
from so8tqc.services.quantize.service import quantize

TYPES = ("Q8_0", "Q2_K", "Q4_K_M")
OPTIONS: dict[str, Any] = {"resamples": 200, "threads": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the input, a recorded reference, and both stages' folders."""
    out = tmp_path_factory.mktemp("run")
    model = write_model(out / "tiny-F16.gguf")
    write_capture(out / "reference.safetensors", model)
    made = quantize(QuantizeConfig(gguf=model, out=out / "quantize", types=TYPES, threads=1))
    write_record(out / "quantize" / "record.json", made)
    files = tuple(Path(ref.path) for ref in made.outputs.values())
    (out / "qc").mkdir()
    judged = qc(
        QCConfig(
            reference=out / "reference.safetensors", candidates=files, out=out / "qc", **OPTIONS
        )
    )
    write_record(out / "qc" / "record.json", judged)
    return out


def among(run: Path, **options: object) -> Record:
    return choose_among(
        ChooseAmongConfig(
            gguf=run / "tiny-F16.gguf",
            quantized=run / "quantize",
            judged=run / "qc",
            threads=1,
            repeats=1,
            **options,  # type: ignore[arg-type]
        )
    )


@pytest.mark.llama
def test_the_rows_are_those_of_a_comparison_from_scratch(run: Path, tmp_path: Path) -> None:
    record = among(run)
    again = choose(
        ChooseConfig(
            gguf=run / "tiny-F16.gguf",
            reference=run / "reference.safetensors",
            out=tmp_path,
            types=TYPES,
            repeats=1,
            **OPTIONS,
        )
    )
    ours: Any = record.metrics["rows"]
    theirs: Any = again.metrics["rows"]
    assert list(ours) == list(theirs) == ["Q2_K", "Q4_K_M", "Q8_0"]  # by size
    for name, row in theirs.items():
        for key, value in row.items():
            if key != "path":
                assert ours[name][key] == value, (name, key)
    assert record.metrics["recommended"] == again.metrics["recommended"]
    assert record.metrics["reason"] == again.metrics["reason"]
    speed: Any = record.run.measured["speed"]
    assert speed["files"].keys() == set(TYPES)
    assert speed["repeats"] == 1
    cards = summarise_run("x", {"choose": record})["headline"]
    assert cards[0]["label"] == "Recommended"
    assert cards[0]["value"] == record.metrics["recommended"]
    assert "of 3 files compared" in cards[0]["note"]


@pytest.mark.llama
def test_a_budget_that_no_file_meets_fails(run: Path) -> None:
    record = among(run, max_kl=1e-9)
    assert record.verdict is Verdict.FAIL
    assert [check.id for check in record.checks] == ["budget.kl"]
    assert "None of the 3 files tried keeps the budget" in str(record.metrics["reason"])


@pytest.mark.llama
def test_a_file_that_the_qc_has_not_run_is_named(run: Path, tmp_path: Path) -> None:
    tables = read_tokens(run / "qc" / "tokens.npz")
    tables.pop("tiny-Q2_K.gguf")
    (tmp_path / "record.json").write_bytes((run / "qc" / "record.json").read_bytes())
    write_tokens(tmp_path / "tokens.npz", tables)
    config = ChooseAmongConfig(
        gguf=run / "tiny-F16.gguf", quantized=run / "quantize", judged=tmp_path, repeats=1
    )
    with pytest.raises(InputError, match=r"tiny-Q2_K\.gguf: the qc has not run this file"):
        choose_among(config)


def test_token_tables_come_back_as_they_were(tmp_path: Path) -> None:
    make = np.random.default_rng(0)
    text = np.array([0, 0, 1], dtype=np.int32)
    tables = {
        name: TokenTable(
            {column: make.normal(size=3) for column in COLUMNS},
            text,
            np.array([0, 1, 0], dtype=np.int32),
            7,
            ("a", "b"),
        )
        for name in ("model.gguf", "folder/model.gguf")
    }
    write_tokens(tmp_path / "tokens.npz", tables)
    found = read_tokens(tmp_path / "tokens.npz")
    assert list(found) == list(tables)
    for name, table in tables.items():
        assert (found[name].texts, found[name].vocab_size) == (table.texts, table.vocab_size)
        np.testing.assert_array_equal(found[name].text, table.text)
        np.testing.assert_array_equal(found[name].position, table.position)
        for column in COLUMNS:
            np.testing.assert_array_equal(found[name].columns[column], table.columns[column])


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no zip", b"plain text"])
def test_what_is_no_token_table_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokens.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="token table"):
        read_tokens(path)


def test_a_token_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokens\.npz: no such file"):
        read_tokens(tmp_path / "tokens.npz")
