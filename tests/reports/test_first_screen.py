"""What a decision rests on stands first; what is as it should be takes one sentence."""

from __future__ import annotations

from datetime import UTC, datetime

import plotly.graph_objects as go
import pytest

from so8tqc.records import Record, RunInfo, Verdict
from so8tqc.reports.html import Plot, Section, deciding, page
from so8tqc.reports.kinds.bake import drift_notes, plots
from so8tqc.reports.pairs import short_names
from so8tqc.reports.summary import summarise_run


def record(kind: str, **metrics: object) -> Record:
    run = RunInfo(started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.0)
    return Record(kind=kind, verdict=Verdict.PASS, metrics=metrics, run=run)  # type: ignore[arg-type]


def test_deciding_plots_stand_before_the_sections_and_once() -> None:
    first, other = (Plot(name, "", go.Figure(go.Scatter(y=[1]))) for name in ("Size", "Tail"))
    records = {"qc": record("qc"), "bake": record("bake")}
    sections = [
        Section("qc", records["qc"], plots=deciding([first, other])),
        Section("bake", records["bake"]),
    ]
    html = page(summarise_run("run", records), sections)
    assert html.count("<h3>Size</h3>") == html.count("<h3>Tail</h3>") == 1
    assert html.index("<h3>Size</h3>") < html.index('<section id="bake">')
    assert html.index("<h3>Tail</h3>") > html.index('<section id="qc">')
    alone = page(summarise_run("qc", {"qc": records["qc"]}), sections[:1])
    assert alone.index("<h3>Size</h3>") > alone.index('<section id="qc">')


def test_the_drift_of_sound_gates_is_a_sentence() -> None:
    sound = record("bake", orthogonality=[[1e-15, 2e-15], [3e-15]])
    assert [plot.title for plot in plots(sound)] == []
    (note,) = drift_notes(sound)
    assert "one of 3 blocks" in note
    assert "3.0e-15" in note
    drifted = record("bake", orthogonality=[[1e-15, 2e-2], [3e-15]])
    assert [plot.title for plot in plots(drifted)] == ["Drift of every block"]
    assert drift_notes(drifted) == []


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["m-135m-Q8_0.gguf", "m-135m-Q4_K_M.gguf"], ["Q8_0", "Q4_K_M"]),
        (["m-Q8_0.gguf", "m-Q8_0.gguf (kv q8_0)"], ["Q8_0", "Q8_0 (kv q8_0)"]),
        (["baked", "m-Q8_0.gguf"], ["baked", "m-Q8_0"]),
        (["a/m.gguf", "b/m.gguf"], ["a/m", "b/m"]),
        (["m", "m.gguf"], ["m", "m.gguf"]),  # not to be told apart without the ending
        (["m-x", "m-y-z"], ["x", "y-z"]),
    ],
)
def test_names_of_a_pair_are_what_tells_them_apart(names: list[str], short: list[str]) -> None:
    assert list(short_names(names).values()) == short
