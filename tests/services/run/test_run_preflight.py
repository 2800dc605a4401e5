"""Before the first stage: what would go wrong later goes wrong now, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from so8tqc.config import RunConfig
from so8tqc.errors import ConfigError, DataError, InputError, RotationError
from so8tqc.llama.vendor import is_vendored
from so8tqc.services.run.pipeline import run
from so8tqc.services.run.preflight import preflight

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]


@pytest.fixture
def options(llama: Path, make_gates: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "base": str(llama),
        "rotations": str(make_gates(llama)),
        "out": str(tmp_path / "out"),
        "quantize": {"types": ["Q8_0"]},
        "calibrate_type": "Q8_0",
    }


def test_it_says_what_the_bake_will_write_and_writes_nothing(options: dict[str, Any]) -> None:
    config = RunConfig.model_validate(options)
    size = preflight(config)
    out = Path(options["out"])
    assert not out.exists()
    run(config, only="bake")
    files = (out / "bake" / "baked_model").glob("*.safetensors")
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    assert size == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert preflight(config) == 0  # it is there already


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"base": "absent/"}, InputError),
        ({"rotations": "absent.safetensors"}, RotationError),
        ({"quantize": {"types": ["Q9_Z"]}, "calibrate_type": "Q9_Z"}, InputError),
        ({"data": ["absent.jsonl"]}, DataError),
        ({"long_data": ["absent.jsonl"]}, DataError),
        ({"qc": {"profile": "no-such"}}, ConfigError),
        ({"qc": {"profile": "absent.yaml"}}, (ConfigError, InputError)),
    ],
)  # fmt: skip
def test_what_a_later_stage_would_refuse_is_refused_now(
    change: dict[str, Any], kind: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(kind):
        preflight(RunConfig.model_validate(options | change))
    assert not Path(options["out"]).exists()


def test_only_the_stage_that_will_run_is_looked_at(options: dict[str, Any]) -> None:
    config = RunConfig.model_validate(options | {"qc": {"profile": "no-such"}})
    assert preflight(config, only="bake") > 0
    with pytest.raises(ConfigError):
        preflight(config)
