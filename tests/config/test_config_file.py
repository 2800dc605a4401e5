"""Config loading: order of origins, and errors that name file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from so8tqc.config import QCConfig, QCOptions, RunConfig
from so8tqc.config.batch import Batch, load_runs
from so8tqc.config.load import load_options
from so8tqc.errors import ConfigError, ExitCode

CONFIGS = Path(__file__).parents[2] / "configs"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    runs = load_runs(file=path)
    assert runs.combinations if isinstance(runs, Batch) else runs.base


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
        ("base: m\nrotations: r\n7: x\n", (":3", "key 7")),
        ("base: m\nrotations: r\nname: 2024-13-45\n", ("not YAML", "month")),
        ("base: m\nrotations: r\ndata: [a, {b: " + "c" * 500 + "}]\n", (":3", "data.1", "ccc…")),
        ("base: m\nrotations: r\n? [a]\n: x\n", (":3", "not YAML")),
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
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "rotations: r\nexport:\n  typ: f16\nqc:\n  seed: x\n")
    with pytest.raises(ConfigError) as caught:
        load_options(RunConfig, file=path, overrides=["name=-"])
    message = str(caught.value)
    assert message.startswith(f"{path}:3: unknown key export.typ")
    for part in (
        "Did you mean type?",
        f"{path}:5: key qc.seed",
        "--set name=-: key name",
        "key base is missing",
    ):
        assert part in message


def test_a_flag_leaves_its_neighbours_in_the_file_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "rotation_options: {parametrization: cayley, convention: column}\n")
    flags = {
        "reference": "m",
        "candidates": ["c"],
        "out": "o",
        "rotation_options": {"convention": "row"},
    }
    got = load_options(QCConfig, file=path, flags=flags).rotation_options
    assert (got.parametrization, got.convention) == ("cayley", "row")


def test_errors_name_the_override_they_came_from() -> None:
    with pytest.raises(ConfigError, match=r"--set qc\.sed=1.*unknown key qc\.sed.*seed"):
        load_options(RunConfig, overrides=["base=m", "rotations=r", "qc.sed=1"])
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        load_options(RunConfig, overrides=["nonsense"])
    with pytest.raises(ConfigError, match=r"SO8TQC_SEED.*seed"):
        load_options(QCOptions, environment={"SO8TQC_SEED": "many"})
    with pytest.raises(ConfigError, match=r"command line.*key seed.*many"):
        load_options(QCOptions, flags={"seed": "many"})
    with pytest.raises(ConfigError, match=r"--set seed=2024-13-45: .*not a YAML value"):
        load_options(QCOptions, overrides=["seed=2024-13-45"])
    with pytest.raises(ConfigError, match=r"--set qc\.seed\.x=1: key qc\.seed"):
        load_options(RunConfig, overrides=["base=m", "rotations=r", "qc.seed.x=1"])


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_options(RunConfig, file=tmp_path / "absent.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_options(RunConfig, file=binary)
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_options(RunConfig, file=write(tmp_path, "#" * (1 << 20) + "\n"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_options(RunConfig, file=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # 2^40 values in forty lines, in values and in merged keys
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 41)),
         "more than 10,000 values"),
        ("a0: &a0 {k: x}\n"
         + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 41)),
         "more than 10,000 values"),
        ("data: &a [*a]\n", ":1: an alias stands inside what it names"),
        ("data: " + "[" * 20_000 + "]" * 20_000, "recursion"),
        ("name: !!python/object/apply:os.system [true]\n", ":1: not YAML: could not determine"),
    ],
    ids=["aliases", "merges", "itself", "depth", "object"],
)  # fmt: skip
def test_a_hostile_file_is_refused_before_it_is_built(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_options(RunConfig, file=write(tmp_path, text))
