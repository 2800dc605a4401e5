"""Config loading: order of origins, and errors that name file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from so8tqc.config import QCOptions, RunConfig
from so8tqc.config_file import load_options
from so8tqc.errors import ConfigError, ExitCode
from so8tqc.services.demo import demo_config

CONFIGS = Path(__file__).parent.parent / "configs"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    assert load_options(RunConfig, file=path).base


def test_the_demo_command_and_its_config_file_are_the_same() -> None:
    assert load_options(RunConfig, file=CONFIGS / "demo.yaml") == demo_config()


def test_flag_beats_set_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\nprofile: strict\nlevel: files\nresamples: 300\n")
    got = load_options(
        QCOptions,
        file=path,
        environment={"SO8TQC_SEED": "2", "SO8TQC_PROFILE": "env", "SO8TQC_LEVEL": "full"},
        overrides=["seed=3", "profile=set"],
        flags={"seed": 4},
    )
    assert (got.seed, got.profile, got.level, got.resamples) == (4, "set", "full", 300)
    assert got.max_tokens == QCOptions().max_tokens


def test_nested_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "base: m\nrotations: r\nquantize:\n  types: [Q8_0]\n")
    got = load_options(
        RunConfig,
        file=path,
        overrides=["quantize.types=[Q4_K_M, Q6_K]", "calibrate_type=Q6_K", "qc.seed=5"],
    )
    assert got.quantize.types == ("Q4_K_M", "Q6_K")
    assert got.qc.seed == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: m\nrotations: r\nqunatize: {}\n", (":3", "unknown key qunatize", "quantize")),
        ("base: m\nrotations: r\nqc:\n  max_token: 5\n", (":4", "qc.max_token", "max_tokens")),
        ("base: m\nrotations: r\nqc:\n  seed: many\n", (":4", "qc.seed", "many")),
        ("base: m\nbase: n\nrotations: r\n", (":2", "base is given twice")),
        ("base: [unclosed\n", ("run.yaml", "not YAML")),
        ("- a\n- b\n", ("expected a mapping",)),
        ("rotations: r\n", ("base is missing",)),
        ("base: m\nrotations: r\ncalibrate_type: Q2_K\n", ("Q2_K", "quantize.types")),
    ],
)
def test_errors_name_file_line_and_key(
    tmp_path: Path, text: str, expected: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_options(RunConfig, file=write(tmp_path, text))
    assert caught.value.exit_code == ExitCode.USAGE
    for part in expected:
        assert part in str(caught.value)


def test_errors_name_the_override_they_came_from() -> None:
    with pytest.raises(ConfigError, match=r"--set qc\.sed=1.*unknown key qc\.sed.*seed"):
        load_options(RunConfig, overrides=["base=m", "rotations=r", "qc.sed=1"])
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        load_options(RunConfig, overrides=["nonsense"])
    with pytest.raises(ConfigError, match=r"SO8TQC_SEED.*seed"):
        load_options(QCOptions, environment={"SO8TQC_SEED": "many"})


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_options(RunConfig, file=tmp_path / "absent.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_options(RunConfig, file=binary)
    bomb = "a: &a [x, x]\n" + "".join(
        f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '*a'] * 9)}]\n" for i in range(12)
    )
    with pytest.raises(ConfigError, match="aliases"):
        load_options(RunConfig, file=write(tmp_path, bomb))
