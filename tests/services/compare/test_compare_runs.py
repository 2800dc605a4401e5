"""Two runs side by side: what changed, what is chance, and what cannot be told."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from so8tqc.cli.main import run as run_main
from so8tqc.languages import Language
from so8tqc.metrics.columns import COLUMNS
from so8tqc.metrics.divergence import TokenTable
from so8tqc.record_files import read_record, write_record
from so8tqc.records import Check, FileRef, Record, RunInfo, Verdict, judge, overall, skipped
from so8tqc.services.compare.service import compare_runs
from so8tqc.services.qc.token_file import write_tokens

TEXTS, LENGTH = 12, 30
GGUF = "tiny-Q5_K_M.gguf"


def table(kl: np.ndarray, *, reference: float = 2.0, texts: int = TEXTS) -> TokenTable:
    """A table whose column kl is given, [texts × tokens of each]; all else is the same."""
    columns = {name: np.full(kl.size, reference) for name in COLUMNS}
    columns |= {
        "kl": kl.ravel(),
        "nll_candidate": columns["nll_reference"] + kl.ravel() / 2,
        "same_top": (kl.ravel() < 0.1).astype(float),
    }
    length = kl.size // texts
    return TokenTable(
        columns,
        np.repeat(np.arange(texts, dtype=np.int32), length),
        np.tile(np.arange(length, dtype=np.int32), texts),
        512,
        tuple(f"t{i}" for i in range(texts)),
    )


def record(kind: str, *checks: Check, **fields: object) -> Record:
    run = RunInfo(started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.0)
    return Record(kind=kind, verdict=overall(checks), checks=checks, run=run, **fields)  # type: ignore[arg-type]


def write_run(
    out: Path,
    kl: np.ndarray | None = None,
    *checks: Check,
    config: dict[str, object] | None = None,
    inputs: dict[str, str] | None = None,
    versions: dict[str, str] | None = None,
    written: TokenTable | None = None,
    name: str = "tiny",
) -> Path:
    """A run directory with a ``qc`` stage, as ``run`` leaves it."""
    if kl is not None or written is not None:
        made = written or table(kl)  # type: ignore[arg-type]
        mean = float(made.columns["kl"].mean())
        checks = (
            judge(
                "kl.mean",
                mean,
                1.0,
                subject=f"{name}-Q5_K_M.gguf",
                detail="Near.",
                ci95=(0.9 * mean, 1.1 * mean),
                unit="nats",
            ),
            *checks,
        )
        (out / "qc").mkdir(parents=True)
        write_tokens(out / "qc" / "tokens.npz", {f"{name}-Q5_K_M.gguf": made})
    files = {"reference": "r", "data: t.jsonl": "d"} | (inputs or {})
    write_record(
        out / "qc" / "record.json",
        record(
            "qc",
            *checks,
            config={"resamples": 2000, "seed": 0, "out": f"{out}/qc"},
            inputs={
                key: FileRef(path=f"{key}.bin", sha256=digest * 64, bytes=10)
                for key, digest in files.items()
            },
            outputs={"tokens": FileRef(path=f"{out}/qc/tokens.npz", sha256="e" * 64, bytes=9)},
            versions={"so8tqc": "0.1.0", **(versions or {})},
        ),
    )
    whole = {"base": "m", "out": str(out), "qc": {"seed": 0}} | (config or {})
    write_record(out / "record.json", record("run", *checks, config=whole, metrics={"name": name}))
    return out


def gamma(seed: int, mean: float = 0.05, texts: int = TEXTS) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2, mean / 2, size=(texts, LENGTH))


def compared(a: Path, b: Path) -> Record:
    return compare_runs(a, b, b / "comparison")


def test_whether_a_difference_is_chance_agrees_with_a_permutation_test(tmp_path: Path) -> None:
    told = undecided = 0
    for seed, effect in enumerate(np.repeat([0.0, 0.002, 0.02], 5)):
        generator = np.random.default_rng(100 + seed)
        before = gamma(seed)
        after = before + generator.normal(effect, 0.005, size=(TEXTS, 1))
        a = write_run(tmp_path / f"{seed}a", before)
        b = write_run(tmp_path / f"{seed}b", after)
        (value,) = (v for v in compared(a, b).metrics["values"] if v["id"] == "kl.mean")
        # an oracle of another kind: signs of the texts' differences flipped, by scipy
        means = (after - before).mean(axis=1)
        p = stats.permutation_test(
            (means,), np.mean, permutation_type="samples", n_resamples=9999, rng=generator
        ).pvalue
        assert value["difference"] == pytest.approx(means.mean())
        low, high = value["ci95"]
        alone = stats.ttest_1samp(means, 0).confidence_interval(0.95)
        # three measures at once: a little wider than one alone
        assert low < alone.low < alone.high < high
        assert high - low < 2 * (alone.high - alone.low)
        if p < 0.005:
            told += 1
            assert value["outcome"] == ("worse" if means.mean() > 0 else "better"), (seed, p)
        elif p > 0.05:
            undecided += 1
            assert value["outcome"] == "undecided", (seed, p)
    assert told >= 4
    assert undecided >= 4


def test_pairing_tells_what_the_intervals_cannot(tmp_path: Path) -> None:
    hard = np.linspace(0.01, 0.2, TEXTS)[:, None] + np.zeros((TEXTS, LENGTH))
    a, b = write_run(tmp_path / "a", hard), write_run(tmp_path / "b", 0.97 * hard)
    (value,) = compared(a, b).metrics["values"]
    assert value["a"]["ci95"][0] < value["b"]["ci95"][1]  # the intervals overlap
    assert value["outcome"] == "better"
    assert value["how"].startswith("paired over texts, p = 0.0")
    # without the token table nobody can tell
    (b / "qc" / "tokens.npz").unlink()
    (value,) = compared(a, b).metrics["values"]
    assert value["outcome"] == "undecided"
    assert value["how"] == "not paired: B has no token table; the 95 % intervals overlap"


def test_a_comparison_is_told_in_the_language_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or in that of the second run; all of it but what a record measured, and names."""
    a = write_run(tmp_path / "a", gamma(0), judge("kl.mean", 0.1, 0.2, detail=""))
    told = {"report": {"language": "ja"}}
    b = write_run(tmp_path / "b", gamma(1), judge("kl.mean", 0.4, 0.2, detail=""), config=told)
    pages = []
    for flags in ([], ["--lang", "ja"]):
        assert run_main(["report", str(a), str(b), *flags]) == 1
        assert "不合格" in capsys.readouterr().out
        pages.append((b / "comparison" / "comparison.html").read_text(encoding="utf-8"))
        assert "# a → b: 不合格" in (b / "comparison" / "comparison.md").read_text("utf-8")
    assert '<html lang="ja">' in pages[0]
    for english in ("Verdicts", "Token by token", "directory", "Changed:", ">fail<", "nearer"):
        assert english not in re.sub(r"<style>.*?</style>", "", pages[0], flags=re.DOTALL)
    assert '<span class="verdict fail">不合格</span>' in pages[0]
    compare_runs(a, b, tmp_path / "english", language=Language.ENGLISH)
    assert "Token by token" in (tmp_path / "english" / "comparison.md").read_text("utf-8")


def test_nothing_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a", gamma(0), judge("structure.files", 3, 3, detail=""))
    b = tmp_path / "elsewhere" / "b"
    shutil.copytree(a, b)
    found = compared(a, b)
    assert found.verdict is Verdict.PASS
    m = found.metrics
    assert not m["changed"]
    assert [m[key] for key in ("config", "versions", "files", "verdicts", "values")] == [[]] * 5
    assert m["same"] == {"values": 2, "files": 3}
    assert "Nothing changed" in (b / "comparison" / "comparison.md").read_text(encoding="utf-8")
    shutil.rmtree(b / "comparison")
    assert run_main(["report", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert (
        "Nothing changed: config and versions are the same, files (3) and measured values (2), too."
        in (" ".join(out.split()))
    )
    assert {p.name for p in (b / "comparison").iterdir()} == {
        "comparison.html",
        "comparison.json",
        "comparison.md",
    }
    # a run made again elsewhere, under another name, is the same run
    c = write_run(tmp_path / "c", gamma(0), judge("structure.files", 3, 3, detail=""), name="big")
    assert not compared(a, c).metrics["changed"]


def test_everything_that_changed_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    a = write_run(
        tmp_path / "a",
        gamma(0),
        judge("kl.max", 1.0, 2.0, subject=GGUF, detail="Peak."),
        judge("calibration.ece", 0.01, 0.1, subject=GGUF, ci95=(0.0, 0.02), detail="Gap."),
        judge("calibration.brier", 0.01, 0.1, subject=GGUF, ci95=(0.0, 0.02), detail="Score."),
        skipped("phase.dips", "too short"),
        judge("rotation.det", 1, 1, detail="Old."),
        inputs={"rotations": "a"},
        versions={"torch": "2.0"},
    )
    b = write_run(
        tmp_path / "b",
        gamma(0) + 0.1,
        judge("kl.max", 3.0, 2.0, subject=GGUF, detail="Peak."),
        judge("calibration.ece", 0.05, 0.1, subject=GGUF, ci95=(0.03, 0.06), detail="Gap."),
        judge("calibration.brier", 0.02, 0.1, subject=GGUF, ci95=(0.0, 0.03), detail="Score."),
        judge("phase.dips", 0, 0, detail="None <b>."),
        config={"qc": {"seed": 7}, "extra": [1]},
        inputs={"rotations": "b", "imatrix": "i"},
        versions={"torch": "2.1"},
    )
    assert run_main(["report", str(a), str(b)]) == 1
    shown = capsys.readouterr().out
    found = read_record(b / "comparison" / "comparison.json")
    m = found.metrics
    assert m["config"] == [
        {"name": "qc.seed", "a": 0, "b": 7},
        {"name": "extra", "a": None, "b": [1]},
    ]
    assert m["versions"] == [{"name": "torch", "a": "2.0", "b": "2.1"}]
    files = {f["name"]: [f[side] and f[side]["sha256"] for side in "ab"] for f in m["files"]}
    assert files == {"rotations": ["a" * 64, "b" * 64], "imatrix": [None, "i" * 64]}
    assert [(v["id"], v["a"], v["b"]) for v in m["verdicts"]] == [
        ("kl.max", "pass", "fail"),
        ("phase.dips", "skip", "pass"),
        ("rotation.det", "pass", None),
    ]
    assert {v["id"]: v["outcome"] for v in m["values"]} == {
        "kl.mean": "worse",
        "kl.max": "not comparable",
        "calibration.ece": "worse",
        "calibration.brier": "undecided",
    }
    assert "B and did not fail in A: kl.max of Q5_K_M.gguf." in found.checks[0].detail
    page = (b / "comparison" / "comparison.html").read_text(encoding="utf-8")
    markdown = (b / "comparison" / "comparison.md").read_text(encoding="utf-8")
    for text in (shown, page, markdown):
        for word in ("kl.max of Q5_K_M.gguf", "qc.seed", "torch", "undecided", "rotations"):
            assert word in text
    assert "intervals overlap" in markdown
    assert "src=" not in page
    assert "href=" not in page
    HTMLParser().feed(page)
    assert markdown.strip() in (tmp_path / "summary.md").read_text(encoding="utf-8")
    # a failure that was there before is no new one
    c = write_run(tmp_path / "c", None, judge("kl.max", 4.0, 2.0, subject=GGUF, detail="Peak."))
    assert compared(b, c).verdict is Verdict.PASS
    # the other way round the failure is mended
    assert run_main(["report", str(b), str(a), "--quiet"]) == 0


def other(one: TokenTable, **changed: object) -> TokenTable:
    fields = {
        name: getattr(one, name) for name in ("columns", "text", "position", "vocab_size", "texts")
    }
    return TokenTable(**(fields | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: other(t, vocab_size=99), "the vocabularies have 512 and 99 tokens"),
        (lambda t: other(t, texts=tuple("abcdefghijkl")), "the texts are not the same"),
        (lambda t: other(t, position=t.position + 1), "cut or tokenized in another way"),
        (lambda _: table(gamma(1)[:, :20]), "cut or tokenized in another way"),
        (lambda _: table(gamma(1), reference=2.5), "the text files have other digests"),
        (lambda t: other(t, columns=t.columns | {"kl": t.columns["kl"] * 2}), None),
    ],
)
def test_tables_over_other_tokens_are_not_paired(
    tmp_path: Path, change: Callable[[TokenTable], TokenTable], reason: str | None
) -> None:
    one = table(gamma(0))
    a = write_run(tmp_path / "a", written=one)
    b = write_run(tmp_path / "b", written=change(one), inputs={"data: t.jsonl": "f"})
    paired = compared(a, b).metrics["paired"]
    if reason is None:  # the reference says of every token what it said: they are the same
        assert paired["reason"] is None
        assert paired["comparisons"]["pairs"][0]["winner"] == "A's Q5_K_M.gguf"
    else:
        assert reason in paired["reason"]
        assert paired["comparisons"] is None
        assert reason in (b / "comparison" / "comparison.md").read_text(encoding="utf-8")


def test_another_reference_is_said_to_be_one(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", gamma(0))
    b = write_run(tmp_path / "b", written=table(gamma(0) + 0.1, reference=2.5))
    paired = compared(a, b).metrics["paired"]
    assert paired["comparisons"]["pairs"][0]["winner"] == "A's Q5_K_M.gguf"
    assert paired["note"] == "The references differ: each KL is to its own run's reference."


def test_few_texts_tell_nothing(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", written=table(gamma(0, texts=4), texts=4))
    b = write_run(tmp_path / "b", written=table(gamma(0, texts=4) + 1e-4, texts=4))
    found = compared(a, b).metrics
    assert found["paired"]["reason"] == "fewer than 5 texts"
    assert found["values"][0]["outcome"] == "undecided"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a", "a"], 3, "compared with itself"),
        (["a", "gone"], 3, "no such run directory"),
        (["a", "empty"], 3, "no stage has left a record"),
        (["a", "--out", "x"], 2, "--out is for a comparison"),
    ],
)
def test_what_cannot_be_compared_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", gamma(0))
    (tmp_path / "empty").mkdir()
    assert run_main(["report", *arguments]) == code
    assert message in " ".join(capsys.readouterr().err.split())


def test_two_real_judgements_of_one_model(
    llama: Path,
    make_gates: Callable[..., Path],
    texts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gates = make_gates(llama)
    for dtype in ("bfloat16", "float32"):
        baked, out = tmp_path / dtype / "baked", tmp_path / dtype / "qc"
        assert (
            run_main(
                [
                    "bake",
                    str(llama),
                    str(gates),
                    "--out",
                    str(baked),
                    "--baked-dtype",
                    dtype,
                    "--quiet",
                ]
            )
            == 0
        )
        assert (
            run_main(
                [
                    "qc",
                    "--reference",
                    str(llama),
                    "--rotations",
                    str(gates),
                    "--candidate",
                    str(baked),
                    "--data",
                    str(texts_file),
                    "--max-tokens",
                    "48",
                    "--out",
                    str(out),
                    "--quiet",
                ]
            )
            == 0
        )
    assert (
        run_main(
            [
                "report",
                str(tmp_path / "bfloat16" / "qc"),
                str(tmp_path / "float32" / "qc"),
                "--json",
                "--quiet",
            ]
        )
        == 0
    )
    m = json.loads(capsys.readouterr().out)["metrics"]
    (pair,) = m["paired"]["comparisons"]["pairs"]
    assert pair["winner"] == "B's baked"  # it was not rounded to 16 bits
    assert {v["id"]: v["outcome"] for v in m["values"]}["kl.mean"] == "better"
    assert [(f["role"], f["name"]) for f in m["files"]][:1] == [("input", "candidate_1")]
    assert {"reference", "rotations"} & {f["name"] for f in m["files"]} == set()
