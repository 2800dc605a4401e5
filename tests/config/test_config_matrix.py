"""`matrix:`: which combinations there are, what they are called, and what is refused."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from so8tqc.cli.main import run as run_main
from so8tqc.config.batch import Batch, load_runs
from so8tqc.config.matrix import check_matrix, expand, names_of
from so8tqc.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def batch(file: Path, **options: object) -> Batch:
    runs = load_runs(file=file, **options)  # type: ignore[arg-type]
    assert isinstance(runs, Batch)
    return runs


def test_include_does_what_github_documents() -> None:
    # the example and its result are those of GitHub's documentation of jobs.<id>.strategy.matrix
    matrix = {
        "fruit": ["apple", "pear"],
        "animal": ["cat", "dog"],
        "include": [
            {"color": "green"},
            {"color": "pink", "animal": "cat"},
            {"fruit": "apple", "shape": "circle"},
            {"fruit": "banana"},
            {"fruit": "banana", "animal": "cat"},
        ],
    }
    assert expand(matrix) == [
        {"fruit": "apple", "animal": "cat", "color": "pink", "shape": "circle"},
        {"fruit": "apple", "animal": "dog", "color": "green", "shape": "circle"},
        {"fruit": "pear", "animal": "cat", "color": "pink"},
        {"fruit": "pear", "animal": "dog", "color": "green"},
        {"fruit": "banana"},
        {"fruit": "banana", "animal": "cat"},
    ]


def test_exclude_takes_away_what_agrees_in_part() -> None:
    # likewise GitHub's: two of twelve are excluded by three values, one of six by two
    matrix = {
        "os": ["macos", "windows"],
        "version": [12, 14, 16],
        "environment": ["staging", "production"],
        "exclude": [
            {"os": "macos", "version": 12, "environment": "production"},
            {"os": "windows", "version": 16},
        ],
    }
    found = [tuple(c.values()) for c in expand(matrix)]
    every = product(["macos", "windows"], [12, 14, 16], ["staging", "production"])
    gone = {("macos", 12, "production"), ("windows", 16, "staging"), ("windows", 16, "production")}
    assert found == [c for c in every if c not in gone]
    assert len(found) == 9


@given(
    st.dictionaries(
        st.sampled_from(["base", "rotations", "quantize.types", "qc.seed"]),
        st.lists(
            st.one_of(st.text(max_size=150), st.integers(), st.lists(st.text(), max_size=2)),
            min_size=1,
            max_size=3,
            unique_by=lambda value: json.dumps(value),
        ),
        min_size=1,
    )
)
def test_every_combination_has_a_name_of_its_own_that_is_one_folder(
    axes: dict[str, list[object]],
) -> None:
    names = names_of(expand(axes))
    assert len({name.casefold() for name in names}) == len(names)
    for name in names:
        assert Path(name).name == name
        assert name not in {"", ".", ".."}
        assert len(name) <= 100
        assert not set(name) & set('\\/:*?"<>| \n')


@pytest.mark.parametrize(
    ("axes", "names"),
    [
        ({"base": ["m/llama-1b", "builtin:smollm2-135m"], "rotations": ["g/pet.safetensors"]},
         ["llama-1b,pet", "smollm2-135m,pet"]),
        ({"base": ["old/model", "new/model"]}, ["old-model", "new-model"]),
        ({"base": ["m/Qwen2.5"], "quantize.types": [["Q4_K_M", "Q8_0"]]},
         ["Qwen2.5,Q4_K_M+Q8_0"]),
        ({"qc.seed": [0, 1], "bake.verify": [True]},
         ["seed=0,verify=true", "seed=1,verify=true"]),
    ],
)  # fmt: skip
def test_names_are_short_and_tell_values_apart(
    axes: dict[str, list[object]], names: list[str]
) -> None:
    assert names_of(expand(axes)) == names


def test_the_matrix_reaches_the_runs_and_their_directories(tmp_path: Path) -> None:
    file = write(
        tmp_path / "b.yaml",
        "rotations: hidden\nquantize: {threads: 2}\n"
        "matrix:\n  base: [m, n]\n  rotations: [r]\n  quantize.types: [[Q8_0], [Q4_K_M, Q6_K]]\n",
    )
    found = batch(file, flags={"out": tmp_path / "o"}, overrides=["qc.seed=3"])
    assert found.out == tmp_path / "o"
    assert [c.name for c in found.combinations] == [
        "m,r,Q8_0",
        "m,r,Q4_K_M+Q6_K",
        "n,r,Q8_0",
        "n,r,Q4_K_M+Q6_K",
    ]
    last = found.combinations[-1].config
    assert (last.base, last.rotations, last.out) == ("n", "r", tmp_path / "o" / "n,r,Q4_K_M+Q6_K")
    assert (last.quantize.types, last.quantize.threads) == (("Q4_K_M", "Q6_K"), 2)
    assert last.calibrated_type == "Q4_K_M"
    assert last.qc.seed == 3
    one = batch(file, overrides=["matrix.base=[x]", "matrix.quantize.types=[[Q8_0]]"])
    assert [c.name for c in one.combinations] == ["x,r,Q8_0"]


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ("[base]", r":1: key matrix: expected options"),
        ("{bas: [m]}", r":1: unknown key matrix\.bas\. Did you mean base\?"),
        ("{qc: [1]}", r"unknown key matrix\.qc\. Name one of its options, such as qc\.profile"),
        ("{out: [a]}", r"matrix\.out: each combination has its own directory"),
        ("{base: m}", r"matrix\.base: expected a list of values"),
        ("{quantize.types: Q8_0}", r"two brackets, such as \[\[Q5_K_M\]\]"),
        ("{base: []}", r"matrix\.base: expected a list of values"),
        ("{base: [m, m]}", r"a combination is given twice"),
        ("{}", r"there is no combination"),
        ("{base: [m], exclude: [{base: m}]}", r"there is no combination"),
        ("{base: [m], exclude: [{base: n}]}", r"matrix\.exclude\.0: takes no combination away"),
        ("{base: [m], exclude: [{qc.seed: 1}]}", r"qc\.seed is no axis"),
        ("{base: [m], include: {qc.seed: 1}}", r"matrix\.include: expected a list of mappings"),
        ("{base: [m], include: [{qc.sed: 1}]}",
         r"unknown key matrix\.include\.0\.qc\.sed\. Did you mean qc\.seed"),
        ("{base: [m], qc.seed: [" + ", ".join(map(str, range(257))) + "]}", r"257 .*256 at most"),
    ],
)  # fmt: skip
def test_what_is_no_matrix_is_refused(tmp_path: Path, matrix: str, message: str) -> None:
    file = write(tmp_path / "b.yaml", f"matrix: {matrix}\nrotations: r\n")
    with pytest.raises(ConfigError, match=message):
        load_runs(file=file)


def test_a_wrong_value_is_told_where_it_stands_in_the_matrix(tmp_path: Path) -> None:
    file = write(
        tmp_path / "b.yaml",
        "rotations: r\nmatrix:\n  base: [m]\n  qc.level:\n    - full\n    - half\n",
    )
    with pytest.raises(ConfigError, match=rf"{file}:6: key qc\.level: .*half"):
        load_runs(file=file)
    write(file, "matrix:\n  base: [m]\n  qc.seed: [x, y]\n")
    with pytest.raises(ConfigError, match=r"2 of 2 combinations are wrong.*\[m,x\].*\[m,y\]"):
        load_runs(file=file)
    # what is wrong in all of them is told once
    write(file, "rotations: r\nqc:\n  sed: 1\nmatrix:\n  base: [m, n]\n")
    with pytest.raises(
        ConfigError, match=rf"^{file}:3: unknown key qc\.sed\. Did you mean seed\?$"
    ):
        load_runs(file=file)


@pytest.mark.parametrize(
    ("overrides", "environment", "where"),
    [
        (["qc.seed=1"], {}, "--set qc.seed=1"),
        (["qc={seed: 1}"], {}, "--set qc="),
        ([], {"SO8TQC_QC__SEED": "1"}, "SO8TQC_QC__SEED"),
    ],
)
def test_what_the_matrix_would_hide_is_refused(
    tmp_path: Path, overrides: list[str], environment: dict[str, str], where: str
) -> None:
    file = write(
        tmp_path / "b.yaml",
        "base: m\nrotations: r\nqc: {seed: 0, resamples: 300}\nmatrix: {qc.seed: [5, 6]}\n",
    )
    with pytest.raises(ConfigError, match=rf"^{where}.*the matrix gives qc\.seed"):
        load_runs(file=file, overrides=overrides, environment=environment)
    assert [c.config.qc.seed for c in batch(file).combinations] == [5, 6]
    assert batch(file, overrides=["qc.resamples=200"]).combinations[0].config.qc.resamples == 200


def test_a_matrix_may_stand_in_the_file_that_is_extended(tmp_path: Path) -> None:
    write(tmp_path / "low.yaml", "rotations: r\nmatrix:\n  base: [m, n]\n  qc.seed: [1]\n")
    top = write(tmp_path / "top.yaml", "extends: low.yaml\nmatrix: {qc.seed: [2, 3]}\n")
    assert [c.name for c in batch(top).combinations] == [
        "m,seed=2",
        "m,seed=3",
        "n,seed=2",
        "n,seed=3",
    ]


def test_other_commands_know_no_matrix(tmp_path: Path) -> None:
    file = write(tmp_path / "qc.yaml", "matrix: {seed: [1]}\n")
    assert run_main(["config", "check", "--stage", "qc", str(file)]) == 2


def test_show_tells_what_is_shared_and_what_each_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(
        tmp_path / "b.yaml",
        "rotations: r\nout: o\nmatrix:\n  base: [m, n]\n  include:\n    - {base: n, qc.seed: 4}\n",
    )
    assert run_main(["config", "show", str(file), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    shared = {row["key"]: row for row in rows if not row["combination"]}
    assert (shared["base"]["value"], shared["base"]["origin"]) == (None, "matrix")
    assert (shared["qc.seed"]["value"], shared["qc.seed"]["origin"]) == (0, "default")
    assert shared["out"]["value"] == "o"
    own = [(r["combination"], r["key"], r["value"], r["origin"]) for r in rows if r["combination"]]
    assert own == [
        ("m", "base", "m", f"{file}:4"),
        ("n,seed=4", "base", "n", f"{file}:4"),
        ("n,seed=4", "qc.seed", 4, f"{file}:6"),
    ]
    assert run_main(["config", "show", str(file)]) == 0
    assert "\n[n,seed=4]\nbase " in capsys.readouterr().out


def test_check_looks_at_every_combination(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "rotations: r\ncalibrate_type: Q8_0\nmatrix:\n  base: [m]\n  quantize.types: [[Q8_0], {}]\n"
    )
    assert (
        run_main(["config", "check", str(write(tmp_path / "a", text.format("[Q8_0, Q6_K]")))]) == 0
    )
    assert run_main(["config", "check", str(write(tmp_path / "b", text.format("[Q6_K]")))]) == 2
    assert "calibrate_type Q8_0 is not among" in capsys.readouterr().err


def test_check_matrix_returns_what_it_was_given() -> None:
    matrix = {"base": ["m"], "include": [{"base": "n"}]}
    assert check_matrix(matrix) is matrix
