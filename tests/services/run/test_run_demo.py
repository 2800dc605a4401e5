"""The demo is the config file that comes along."""

from __future__ import annotations

from pathlib import Path

from so8tqc.config import RunConfig
from so8tqc.config.load import load_options
from so8tqc.services.run.demo import DEMO_OUT, demo_config

CONFIGS = Path(__file__).parents[3] / "configs"


def test_the_demo_command_and_its_config_file_are_the_same() -> None:
    assert load_options(RunConfig, file=CONFIGS / "demo.yaml") == demo_config()


def test_only_the_place_may_be_another(tmp_path: Path) -> None:
    assert demo_config().out == DEMO_OUT
    elsewhere = demo_config(tmp_path)
    assert elsewhere.out == tmp_path
    assert elsewhere.model_copy(update={"out": DEMO_OUT}) == demo_config()
