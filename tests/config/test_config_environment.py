"""Environment variables: which command takes which, and what is refused."""

from __future__ import annotations

import pytest

from so8tqc.config import QCConfig, RunConfig
from so8tqc.config.environment import environment_values
from so8tqc.config.load import load_options
from so8tqc.errors import ConfigError

PATHS = {"reference": "m", "candidates": ["c"], "out": "o"}


def test_a_command_takes_its_name_in_a_run_before_the_plain_one() -> None:
    environment = {"SO8TQC_SEED": "1", "SO8TQC_QC__SEED": "2", "SO8TQC_LONGTEXT__SEED": "3"}
    assert load_options(QCConfig, flags=PATHS, environment=environment).seed == 2
    assert load_options(QCConfig, flags=PATHS, environment={"SO8TQC_SEED": "1"}).seed == 1
    run = {"base": "m", "rotations": "r"}
    got = load_options(RunConfig, flags=run, environment=environment)
    assert (got.qc.seed, got.longtext.seed, got.calibrate.seed) == (2, 3, 0)


def test_what_another_command_knows_is_left_to_it() -> None:
    environment = {"SO8TQC_QC__REFERENCE": "m", "SO8TQC_VERIFY__RECORD": "x", "HOME": "/"}
    assert environment_values(RunConfig, environment) == []


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("SO8TQC_QC__SED", "SO8TQC_QC__SEED"),
        ("SO8TQC_ZZZZZZZZ", "Unset it"),
        ("SO8TQC_QC__SEED__X", "SO8TQC_QC__SEED"),
    ],
)
@pytest.mark.parametrize("model", [RunConfig, QCConfig])
def test_what_no_command_knows_is_refused(model: type, name: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: sets no option.*{remedy}"):
        environment_values(model, {name: "1"})


def test_an_empty_variable_is_not_set() -> None:
    empty = {"SO8TQC_QC__SEED": "", "SO8TQC_NONSENSE": ""}
    assert environment_values(QCConfig, empty) == []
