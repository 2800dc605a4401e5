"""Pages of a stage's own, from what it left alone: in any language, whole or refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from so8tqc.errors import InputError
from so8tqc.languages import Language
from so8tqc.metrics.spectra import spectrum
from so8tqc.records import FileRef, Record, Stopwatch, Verdict
from so8tqc.services.longtext.series import (
    SERIES_FILE,
    SHOWN,
    Arrays,
    attention_key,
    read_series,
    spectrum_arrays,
    write_series,
)
from so8tqc.services.pages import draw_pages

ENGLISH = re.compile(r"[a-z]{3,}(?: [a-z]{2,})+")


def left(out: Path, **changed: object) -> Record:
    """What a long-text stage with a reference leaves of one text."""
    generator = np.random.default_rng(0)
    arrays: Arrays = {name: generator.random(191) for name in SHOWN}
    arrays |= {"position": np.arange(191, dtype=np.int32)}
    for name in ("candidate", "reference"):
        arrays[attention_key(name)] = generator.random((3, 192)).astype(np.float32)
        arrays |= spectrum_arrays(name, spectrum(generator.random(192), seed=0, surrogates=20))
    arrays |= changed  # type: ignore[arg-type]
    kept = {key: values for key, values in arrays.items() if values is not None}
    write_series(out / SERIES_FILE, {"../a b": kept}, np.array([6.28, 40.0]))
    reference = FileRef(path="x", sha256="0" * 64, bytes=1)
    return Record(
        kind="longtext",
        verdict=Verdict.PASS,
        metrics={"cases": {"../a b": {}}},
        inputs={"reference": reference},
        outputs={SERIES_FILE: reference},
        run=Stopwatch().info(),
    )


def test_pages_of_long_text_speak_the_language_asked_for(tmp_path: Path) -> None:
    record = left(tmp_path)
    pages = draw_pages(record, tmp_path, Language.JAPANESE)
    assert [p.name for p in pages.files] == [".._a_b_oscillation.html", ".._a_b_entropy.html"]
    for page in pages.files:
        html = page.read_text(encoding="utf-8")
        assert '<html lang="ja">' in html
        said = re.findall(r'"(?:text|name)":"([^"]*)"', html[html.index("Plotly.newPlot") :])
        assert len(said) > 3
        assert [text for text in said if ENGLISH.search(re.sub(r"<[^>]+>", "", text))] == []
    draw_pages(record, tmp_path)
    html = pages.files[1].read_text(encoding="utf-8")
    assert '<html lang="en">' in html
    assert "next-token entropy" in html


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    left(tmp_path)
    series, wavelengths = read_series(tmp_path / SERIES_FILE, ["../a b"])
    case = series["../a b"]
    generator = np.random.default_rng(0)
    np.testing.assert_array_equal(case.columns[SHOWN[0]], generator.random(191))
    np.testing.assert_array_equal(wavelengths, [6.28, 40.0])
    assert case.spectra.keys() == {"candidate", "reference"}
    assert case.attention is not None
    assert case.attention.shape == (3, 192)


@pytest.mark.parametrize(
    "changed",
    [
        {"kl": None},
        {"position": np.arange(190)},
        {"position": np.arange(191.0)},
        {"kl": np.array(["x"] * 191)},
        {attention_key("candidate"): np.zeros(5)},
        {"spectrum_power": np.zeros(2)},
    ],
)
def test_a_broken_series_is_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    record = left(tmp_path, **changed)
    with pytest.raises(InputError, match=r"series\.npz: no series of these texts.*Run the stage"):
        draw_pages(record, tmp_path)


def test_no_series_is_refused_and_a_gguf_has_no_attention(tmp_path: Path) -> None:
    names = ("candidate", "reference")
    none = {
        key: None
        for name in names
        for key in spectrum_arrays(
            name, spectrum(np.random.default_rng(1).random(64), seed=0, surrogates=20)
        )
    }
    record = left(tmp_path, **none, **{attention_key(name): None for name in names})
    assert len(draw_pages(record, tmp_path).files) == 2
    (tmp_path / SERIES_FILE).write_bytes(b"PK")
    with pytest.raises(InputError):
        draw_pages(record, tmp_path)


def test_a_record_that_measured_nothing_has_no_page(tmp_path: Path) -> None:
    for kind in ("calibrate", "longtext", "qc"):
        record = Record(kind=kind, verdict=Verdict.SKIP, run=Stopwatch().info())
        assert draw_pages(record, tmp_path).files == ()
    assert list(tmp_path.iterdir()) == []
