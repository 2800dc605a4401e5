"""What a qc says of an error's parts and of the gates in a quantized file."""

from __future__ import annotations

from datetime import UTC, datetime

from so8tqc.records import Record, RunInfo, Verdict
from so8tqc.reports.kinds.qc import candidate_table, split_table, survival_tables
from so8tqc.reports.kinds.quantize import solved_table


def record(**metrics: object) -> Record:
    run = RunInfo(started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.0)
    return Record(kind="qc", verdict=Verdict.PASS, metrics=metrics, run=run)  # type: ignore[arg-type]


def test_the_error_is_split_into_its_parts() -> None:
    found = record(
        split={"baked": {"algebra_relative_error": 1.7e-3, "storage": "bfloat16"}},
        noise_floor={"kl_mean": 5e-6},
        arithmetic={"kl_mean": 2e-13},
        candidates={"baked": {"kl_mean": 6e-6}},
    )
    table = split_table(found)
    assert table is not None
    assert table.rows == [["baked", "1.7e-03", "bfloat16", "5e-06", "2e-13"]]
    candidates = candidate_table(found)
    assert candidates is not None
    assert [row[0] for row in candidates.rows] == [
        "baked",
        "(rounding alone)",
        "(arithmetic alone)",
    ]
    assert split_table(record()) is None


def test_layers_whose_gate_is_smaller_than_the_quantization_show() -> None:
    layer = {"type": "Q4_K", "error": 0.07, "to_base": 0.1}
    found = record(
        survival={"x.gguf": {"0": layer | {"rotation": 0.09}, "1": layer | {"rotation": 0.01}}}
    )
    (table,) = survival_tables(found)
    assert table.title == "Survival of the gates in x.gguf"
    assert [row[-1] for row in table.rows] == ["yes", "no"]
    assert survival_tables(record()) == []


def test_what_solving_gained_shows() -> None:
    solved = {"type": "Q5_0", "damping": 0.01, "libllama": 0.3, "solved": 0.15}
    other = solved | {"libllama": 0.4, "solved": 0.2}
    metrics = {
        "files": {},
        "library": None,
        "derivation": None,
        "solver": {
            "version": 1,
            "files": {
                "x.gguf": {
                    "tensors": {"a": solved, "b": other},
                    "left": {"token_embd.weight": "Q6_K"},
                },
            },
        },
    }
    table = solved_table(record(**metrics))
    assert table is not None
    assert table.rows == [["x.gguf", "2", "0.3536", "0.1768", "1 Q6_K"]]
    assert solved_table(record(**{k: v for k, v in metrics.items() if k != "solver"})) is None
