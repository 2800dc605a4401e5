"""The published schema: what the models give, and agreed with by a validator of another house."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from so8tqc.cli.app import app
from so8tqc.cli.main import run as run_main
from so8tqc.config import COMMAND_CONFIGS
from so8tqc.config.schema import config_schema, schema_text

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = CONFIGS / "so8tqc.schema.json"


def validator(command: str | None = None) -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(config_schema(command))
    return jsonschema.Draft202012Validator(config_schema(command))


def test_the_published_schema_is_what_the_models_give() -> None:
    assert PUBLISHED.read_text(encoding="utf-8") == schema_text(), (
        "run: so8tqc config schema --out configs/so8tqc.schema.json"
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_name_the_schema_and_agree_with_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    reference = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / reference).resolve() == PUBLISHED.resolve()
    assert not Path(reference).is_absolute()
    assert list(validator().iter_errors(yaml.safe_load(text))) == []


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("base: m\nrotations: r\nqunatize: {}\n", []),
        ("base: m\nrotations: r\nqc: {seed: many}\n", ["qc", "seed"]),
        ("base: m\nrotations: r\nexport: {type: f64}\n", ["export", "type"]),
        ("base: m\nrotations: r\nname: ../x\n", ["name"]),
        ("rotations: r\n", []),
        ("matrix: {base: m}\n", ["matrix", "base"]),
        ("matrix: {quantize.types: [Q8_0]}\n", ["matrix", "quantize.types", 0]),
        ("matrix: {qc.seed: [0, many]}\n", ["matrix", "qc.seed", 1]),
        ("matrix: {qc.sed: [0]}\n", ["matrix"]),
        ("matrix: {base: [m], include: [{export.type: f64}]}\n",
         ["matrix", "include", 0, "export.type"]),
    ],
)  # fmt: skip
def test_the_schema_refuses_what_the_tool_refuses(text: str, path: list[str]) -> None:
    errors = list(validator().iter_errors(yaml.safe_load(text)))
    assert [list(error.absolute_path) for error in errors] == [path]


@pytest.mark.parametrize("command", COMMAND_CONFIGS)
def test_a_command_has_a_schema_that_requires_nothing(command: str) -> None:
    result = CliRunner().invoke(app, ["config", "schema", command])
    assert result.exit_code == 0
    schema = json.loads(result.output)
    assert set(schema["properties"]) == {*COMMAND_CONFIGS[command].model_fields, "extends"}
    assert list(validator(command).iter_errors({})) == []
    assert list(validator(command).iter_errors({"sed": 1})) != []


def test_a_file_that_extends_another_may_leave_out_what_that_gives() -> None:
    assert list(validator().iter_errors({"extends": ["a.yaml"], "rotations": "r"})) == []


def test_a_size_may_have_a_unit() -> None:
    assert list(validator("choose").iter_errors({"max_size": "120MB"})) == []


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["config", "schema", "bkae"]) == 2
    assert "bkae reads no config file" in capsys.readouterr().err


def test_out_writes_the_file(tmp_path: Path) -> None:
    out = tmp_path / "schema.json"
    assert run_main(["config", "schema", "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == schema_text()
