"""tokens.npz: what is written is read, and what is no table is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from so8tqc.errors import InputError
from so8tqc.metrics.columns import COLUMNS
from so8tqc.metrics.divergence import TokenTable
from so8tqc.services.qc.token_file import read_tokens, write_tokens


def table(seed: int) -> TokenTable:
    make = np.random.default_rng(seed)
    columns = {name: make.normal(size=5) for name in COLUMNS}
    text, position = np.array([0, 0, 0, 1, 1], np.int32), np.array([0, 1, 2, 0, 1], np.int32)
    return TokenTable(columns, text, position, 77, ("one", "二/two"))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tables = {"baked": table(0), "dir/x-Q4_K_M.gguf": table(1)}
    write_tokens(tmp_path / "tokens.npz", tables)
    read = read_tokens(tmp_path / "tokens.npz")
    assert list(read) == list(tables)
    for name, one in tables.items():
        assert read[name].texts == one.texts
        assert read[name].vocab_size == 77
        np.testing.assert_array_equal(read[name].text, one.text)
        np.testing.assert_array_equal(read[name].position, one.position)
        for column in COLUMNS:
            np.testing.assert_array_equal(read[name].columns[column], one.columns[column])


def arrays(path: Path) -> dict[str, Any]:
    write_tokens(path, {"baked": table(0)})
    with np.load(path) as stored:
        return dict(stored)


@pytest.mark.parametrize(
    "change",
    [
        {"baked/kl": None},
        {"baked/kl": np.zeros(4)},
        {"baked/kl": np.zeros((5, 1))},
        {"baked/kl": np.zeros(5, np.float32)},
        {"text": np.array([0, 0, 0, 1, 2], np.int32)},
        {"text": np.array([0, 0, 0, 1, -1], np.int32)},
        {"text": np.zeros(5)},
        {"vocab": np.array(0)},
        {"vocab": None},
        {"baked/kl": np.array([{}] * 5)},
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tokens.npz"
    kept = {k: v for k, v in (arrays(path) | change).items() if v is not None}
    np.savez(path, **kept)
    with pytest.raises(InputError, match="not a token table of this version"):
        read_tokens(path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npz"
    arrays(path)
    content = path.read_bytes()
    for damaged in (b"", content[:100], content[: len(content) // 2], b"PK" + content[40:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError):
            read_tokens(path)
    with pytest.raises(InputError):
        read_tokens(tmp_path / "absent.npz")
