"""Equal inputs, equal bytes: in any directory, with any number of threads, without vector units."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stage_cases import Inputs

from so8tqc.llama.vendor import is_vendored

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]
EPOCH = "1700000000"
ENVIRONMENTS = {
    "one thread, no vectors": {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}
CALCULATED = ("export.logits", "export.logits_max")
"""Checks whose value comes from running a model in float32: the last digits are the processor's."""


def chain(inputs: Inputs, out: Path, environment: dict[str, str]) -> None:
    """Bake, export, quantize: each a process of its own."""
    baked, f16 = out / "tiny", out / "export" / "tiny-F16.gguf"
    for command in (
        ("bake", inputs.model, inputs.gates, "--out", baked),
        ("export", baked, "--type", "f16", "--keep-f32", "baked", "--out", f16),
        ("quantize", f16, "--type", "Q8_0", "--type", "Q4_K_M", "--out", out / "quantize"),
    ):
        subprocess.run(
            [sys.executable, "-m", "so8tqc", *map(str, command), "--quiet"],
            check=True,
            env={**os.environ, **environment, "SOURCE_DATE_EPOCH": EPOCH},
        )


def files(out: Path) -> dict[str, str]:
    """Path → digest of what ships: the model, the GGUF files, and the provenance."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.endswith((".log", "record.json"))
    }


def records(out: Path) -> dict[str, Any]:
    """The records, but for ``run`` and for the directory, which is an input."""
    found = {}
    for path in sorted(out.rglob("*record.json")):
        record = json.loads(path.read_text(encoding="utf-8").replace(str(out), "OUT"))
        assert record.pop("run")["started"] == "2023-11-14T22:13:20Z"
        found[path.name if path.parent == out else path.parent.name] = record
    return found


def without_calculated(value: dict[str, Any]) -> dict[str, Any]:
    checks = [check for check in value["checks"] if check["id"] not in CALCULATED]
    return {**value, "checks": checks}


def test_everything_that_ships_and_every_record_is_the_same(inputs: Inputs, tmp_path: Path) -> None:
    outs = {name: tmp_path / name.replace(" ", "-").replace(",", "") for name in ENVIRONMENTS}
    for name, environment in ENVIRONMENTS.items():
        chain(inputs, outs[name], environment)
    first, second = (files(out) for out in outs.values())
    assert len(first) >= 10
    assert first == second
    one, two = (records(out) for out in outs.values())
    assert one.keys() == two.keys()
    for stage, record in one.items():
        assert without_calculated(record) == without_calculated(two[stage]), stage
