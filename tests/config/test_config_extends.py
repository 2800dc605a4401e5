"""`extends:`: what hides what, where it came from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from so8tqc.config import RunConfig
from so8tqc.config.extends import read_layers
from so8tqc.config.load import load_options
from so8tqc.config.yaml_file import read_yaml
from so8tqc.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_mappings_are_merged_lists_replaced_and_later_files_win(tmp_path: Path) -> None:
    one = write(tmp_path / "one.yaml", "base: m\nqc:\n  seed: 1\n  ctx: 64\ndata: [a, b]\n")
    write(tmp_path / "two.yaml", "rotations: r\nqc: {seed: 2}\n")
    top = write(tmp_path / "d" / "top.yaml", "extends: [../one.yaml, ../two.yaml]\ndata: [c]\n")
    values, origins = read_layers(top)
    assert values == {"base": "m", "rotations": "r", "qc": {"seed": 2, "ctx": 64}, "data": ["c"]}
    assert Path(origins[("qc", "ctx")].rpartition(":")[0]).samefile(one)
    assert origins[("qc", "ctx")].endswith("one.yaml:4")
    assert origins[("qc", "seed")].endswith("two.yaml:2")
    assert origins[("data", "0")] == f"{top}:2"
    assert ("data", "1") not in origins
    assert load_options(RunConfig, file=top).data == ("c",)


def test_a_mistake_is_told_where_it_stands(tmp_path: Path) -> None:
    write(tmp_path / "low.yaml", "base: m\nrotations: r\nqc:\n  sed: 1\n")
    top = write(tmp_path / "top.yaml", "extends: low.yaml\n")
    with pytest.raises(ConfigError, match=r"low\.yaml:4: unknown key qc\.sed"):
        load_options(RunConfig, file=top)


def test_a_cycle_is_named(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "\nextends: ./a.yaml\n")
    with pytest.raises(ConfigError, match=r"b\.yaml:2: .*a\.yaml → .*b\.yaml → .*a\.yaml"):
        read_layers(first)


def test_the_same_file_twice_is_no_cycle_but_many_are_too_many(tmp_path: Path) -> None:
    write(tmp_path / "0.yaml", "base: m\n")
    for i in range(1, 30):
        write(tmp_path / f"{i}.yaml", f"extends: [{i - 1}.yaml, {i - 1}.yaml]\n")
    assert read_layers(tmp_path / "3.yaml")[0] == {"base": "m"}
    with pytest.raises(ConfigError, match="more than 32 files"):
        read_layers(tmp_path / "29.yaml")


@pytest.mark.parametrize(
    ("value", "message"),
    [("/etc/hostname", "not relative"), ("file:///x.yaml", "not relative"),
     ("'C:x'", "not relative"),
     ("absent.yaml", "no such file"), (".", "no such file"), ("x" * 5000, "no such file"),
     ("[a.yaml, 7]", "a path or a list"), ("{a: b}", "a path or a list"), ("", "a path or a list")],
    ids=["absolute", "url", "drive", "absent", "folder", "long", "number", "mapping", "nothing"],
)  # fmt: skip
def test_what_is_no_plain_file_is_refused(tmp_path: Path, value: str, message: str) -> None:
    write(tmp_path / "a.yaml", "base: m\n")
    with pytest.raises(ConfigError, match=rf"top\.yaml:1: .*{message}"):
        read_layers(write(tmp_path / "top.yaml", f"extends: {value}\n"))


EXTENDING = [path for path in CONFIGS.glob("*.yaml") if "extends" in read_yaml(path)[0]]


@pytest.mark.parametrize("path", EXTENDING, ids=lambda p: p.name)
def test_a_shipped_file_takes_something_from_what_it_extends_and_repeats_nothing(
    path: Path,
) -> None:
    own, _ = read_yaml(path)
    low, _ = read_layers(path.parent / own.pop("extends"))
    merged, _ = read_layers(path)
    assert merged not in (own, low)
    kept = {key for key, value in low.items() if merged[key] == value}
    assert kept - own.keys()
    for key, value in own.items():
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        for name, stated in inner:
            below = low.get(key) if name is None else low.get(key, {}).get(name)
            assert stated != below, f"{key} {name or ''} is the same in both files"
