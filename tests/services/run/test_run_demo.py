"""The demo is the config file that comes along."""

from __future__ import annotations

from pathlib import Path

from so8tqc.config import RunConfig
from so8tqc.config.load import load_options
from so8tqc.services.run.demo import DEMO_OUT, demo_config, quick_demo_config
from so8tqc.sources.inputs.texts import load_texts

CONFIGS = Path(__file__).parents[3] / "configs"


def test_the_demo_command_and_its_config_file_are_the_same() -> None:
    assert load_options(RunConfig, file=CONFIGS / "demo.yaml") == demo_config()


def test_the_quick_demo_and_its_config_file_are_the_same() -> None:
    assert load_options(RunConfig, file=CONFIGS / "demo-quick.yaml") == quick_demo_config()


def test_the_quick_demo_has_less_of_everything_and_every_stage() -> None:
    quick, full = quick_demo_config(), demo_config()
    assert len(load_texts(quick.data)) == 10
    assert len(load_texts(quick.long_data)) == 1
    assert {text.language for text in load_texts(quick.data)} == {"en", "ja"}
    assert {text.id for text in load_texts(quick.data)} < {t.id for t in load_texts(full.data)}
    assert set(quick.quantize.types) < set(full.quantize.types)
    assert len(quick.quantize.types) == 2
    assert quick.calibrated_type == full.calibrated_type
    assert "--full" in quick.note
    assert quick.longtext.min_tokens == full.longtext.min_tokens


def test_only_the_place_may_be_another(tmp_path: Path) -> None:
    assert demo_config().out == DEMO_OUT
    elsewhere = demo_config(tmp_path)
    assert elsewhere.out == tmp_path
    assert elsewhere.model_copy(update={"out": DEMO_OUT}) == demo_config()
