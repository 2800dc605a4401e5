"""Two processes on the CPU judge as one does; what stops one of them stops both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from so8tqc.config import BakeConfig
from so8tqc.services.bake import bake
from so8tqc.sources import ranks
from so8tqc.sources.protocol import EncodedText


def texts(lengths: list[int]) -> list[EncodedText]:
    return [EncodedText(str(i), np.zeros(n, dtype=np.int64)) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_every_text_is_somebodys_and_the_loads_are_even(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [5, 100, 7, 100, 60, 40, 3]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    shares = []
    for number in range(processes):
        monkeypatch.setenv("RANK", str(number))
        shares.append(ranks.share(texts(lengths)))
    assert sorted(i for part in shares for i in part) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in part) for part in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_one_process_is_the_first() -> None:
    assert (ranks.rank(), ranks.count(), ranks.is_first()) == (0, 1, True)


def launched(processes: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else ["-m"]), "so8tqc", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def without_run(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what may differ: its folder, times and versions."""
    return {k: v for k, v in record.items() if k not in ("run", "config")}


def test_two_processes_give_the_record_of_one(
    make_model: Callable[..., Path],
    make_gates: Callable[..., Path],
    texts_file: Path,
    tmp_path: Path,
) -> None:
    base = make_model("llama", "bfloat16")
    gates, baked = make_gates(base), tmp_path / "baked"
    bake(BakeConfig(base=base, rotations=gates, out=baked))
    records, tokens = [], []
    for processes in (1, 2):
        out = tmp_path / f"qc{processes}"
        done = launched(
            processes,
            [
                "qc",
                "--reference",
                str(base),
                "--rotations",
                str(gates),
                "--candidate",
                str(baked),
                "--data",
                str(texts_file),
                "--out",
                str(out),
                "--json",
            ],
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('"kind": "qc"') == 1  # only one of them speaks
        records.append(json.loads((out / "record.json").read_text()))
        tokens.append(dict(np.load(out / "tokens.npz")))
    assert without_run(records[0]) == without_run(records[1])
    assert tokens[0].keys() == tokens[1].keys()
    for name, values in tokens[0].items():
        np.testing.assert_array_equal(values, tokens[1][name])


def test_a_failed_verdict_is_shown_before_anybody_ends(
    llama: Path, make_gates: Callable[..., Path], texts_file: Path, tmp_path: Path
) -> None:
    """A launcher ends every process as soon as one exits with 1, even one that is still writing."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time\nfrom so8tqc.cli.main import main\nfrom so8tqc.services import report\n"
        "write = report.write_stage_reports\n"
        "def write_slowly(*arguments):\n    time.sleep(4)\n    write(*arguments)\n"
        "report.write_stage_reports = write_slowly\nsys.exit(main())\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            str(slow),
            "qc",
            "--reference",
            str(llama),
            "--rotations",
            str(make_gates(llama)),
            "--candidate",
            str(llama),
            "--data",
            str(texts_file),
            "--out",
            str(tmp_path / "qc"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
        },
    )
    assert done.returncode == 1, done.stderr
    assert "FAIL" in done.stdout.upper()
    for name in ("record.json", "report.md", "report.html", "junit.xml"):
        assert (tmp_path / "qc" / name).stat().st_size > 0, name
    assert (tmp_path / "summary").read_text() == (tmp_path / "qc/report.md").read_text() + "\n"


def test_an_error_in_one_process_is_told_and_none_waits_forever(tmp_path: Path) -> None:
    """Rank 1 fails before the others' results come together."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import os\nfrom so8tqc.errors import DataError\n"
        "from so8tqc.sources import ranks\n"
        "error = DataError('spoilt', where='text 7') if ranks.rank() == 1 else None\n"
        "try:\n    ranks.together({ranks.rank(): 1}, error)\n"
        "except DataError as told:\n    os.write(1, f'{ranks.rank()} {told}\\n'.encode())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert sorted(done.stdout.splitlines()) == ["0 text 7: spoilt.", "1 text 7: spoilt."]
