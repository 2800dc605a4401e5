"""Profiles: limits as data, refused where they are not limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from so8tqc.errors import ConfigError
from so8tqc.services.qc.profiles import BUILTIN_PROFILES, LIMITED, load_profile, profile_file


def test_profiles_are_data(tmp_path: Path) -> None:
    assert load_profile("default").for_gguf("IQ1_S") == load_profile("default").gguf["default"]
    own = tmp_path / "own.yaml"
    own.write_text("mine:\n  models: {kl.mean: {limit: 0.5}}\n  gguf: {default: {}}\n")
    assert load_profile(f"{own}:mine").models["kl.mean"].limit == 0.5
    assert load_profile(str(own)) == load_profile(f"{own}:mine")
    own.write_text("mine:\n  models: {kl.mean: {limit: 0.5, target: 1}}\n  gguf: {default: {}}\n")
    with pytest.raises(ConfigError, match=r"own.yaml.*either limit or target"):
        load_profile(str(own))
    own.write_text("mine:\n  models: {}\n  gguf: {default: {kl.revrse: {limit: 0.5}}}\n")
    with pytest.raises(ConfigError, match=r"own.yaml.*kl.revrse is no check .* calibration.nll"):
        load_profile(str(own))


def test_a_name_is_built_in_and_an_ending_is_a_file(tmp_path: Path) -> None:
    assert profile_file("strict") == BUILTIN_PROFILES
    for name, file in (("a.yaml", "a.yaml"), ("a.yaml:b", "a.yaml"), ("d/a.yml", "d/a.yml")):
        assert profile_file(name) == Path(file)
    with pytest.raises(ConfigError, match="no profile 'none'; there are default, strict"):
        load_profile("none")
    own = tmp_path / "own.yaml"
    own.write_text("mine: {models: {}, gguf: {default: {}}}\n")
    with pytest.raises(ConfigError, match=r"own.yaml: no profile 'other'; there are mine"):
        load_profile(f"{own}:other")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "mapping of profiles"),
        ("mine: {models: {}, gguf: {F16: {}}}", "needs an entry 'default'"),
        ("mine: {models: {}, gguf: {default: {}}, skip: forbid}", "skip"),
        ("mine: {models: {kl.mean: {}}, gguf: {default: {}}}", "either limit or target"),
        ("mine: {models: {kl.mean: {limit: near}}, gguf: {default: {}}}", "kl.mean"),
        ("mine: {models: {structure.finite: {limit: 0}}, gguf: {default: {}}}", "is no check"),
    ],
)
def test_what_is_no_profile_is_refused(content: str, message: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_profile(str(own))


def test_every_limited_check_has_a_limit_for_models() -> None:
    for name in ("default", "strict"):
        assert set(load_profile(name).models) == set(LIMITED)
