"""Profiles: which limits a candidate is judged against. Data, not code."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from so8tqc.config.yaml_file import read_yaml
from so8tqc.errors import ConfigError
from so8tqc.resources import package_file

BUILTIN_PROFILES = package_file("profiles.yaml")


LIMITED = (
    "logits.max_abs", "logits.mean_abs", "logits.rms", "kl.mean", "kl.max", "kl.top1",
    "calibration.ece", "calibration.brier", "calibration.nll",
)  # fmt: skip
"""The checks that a profile has limits for; the others have limits of their own."""

HIGHER_IS_BETTER = frozenset({"kl.top1"})
"""Those whose value must not be below its limit; the others' must not be above."""


class Limit(BaseModel):
    """A fixed limit, or a target widened by the measured noise floor."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    limit: float | None = None
    target: float | None = None
    floor_factor: float = 2.0

    @model_validator(mode="after")
    def _one_of_them(self) -> Limit:
        if (self.limit is None) == (self.target is None):
            raise ValueError("give either limit or target")
        return self


class Profile(BaseModel):
    """Limits for model directories and for GGUF files by file type.

    ``skips``: whether a check that could not be computed fails the verdict.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    models: dict[str, Limit]
    gguf: dict[str, dict[str, Limit]]
    skips: Literal["allow", "forbid"] = "allow"

    def for_gguf(self, file_type: str) -> dict[str, Limit]:
        """Limits of a GGUF file type, or the default ones."""
        return self.gguf.get(file_type, self.gguf["default"])

    @model_validator(mode="after")
    def _has_a_default(self) -> Profile:
        if "default" not in self.gguf:
            raise ValueError("gguf needs an entry 'default'")
        for limits in (self.models, *self.gguf.values()):
            if unknown := sorted(set(limits) - set(LIMITED)):
                raise ValueError(
                    f"{unknown[0]} is no check that has its limit here; {', '.join(LIMITED)} are"
                )
        return self


def profile_file(name: str) -> Path:
    """The file that a profile's name stands for (see :func:`load_profile`)."""
    return _locate(name)[0]


def builtin_profiles() -> dict[str, Profile]:
    """The profiles that come along, by name."""
    return _load(BUILTIN_PROFILES)


def load_profile(name: str) -> Profile:
    """A built-in profile by name, or ``FILE.yaml`` or ``FILE.yaml:NAME``.

    Raises:
        ConfigError: unknown name, unreadable file, or a malformed profile.
    """
    file, wanted = _locate(name)
    profiles = _load(file)
    wanted = wanted or next(iter(profiles))
    if wanted not in profiles:
        raise ConfigError(
            f"no profile {wanted!r}; there are {', '.join(profiles)}",
            where=None if file == BUILTIN_PROFILES else str(file),
            remedy="A file's profile is given as FILE.yaml:NAME.",
        )
    return profiles[wanted]


def _locate(name: str) -> tuple[Path, str]:
    """File and profile name; "" stands for the file's first profile."""
    path, _, wanted = name.partition(".yaml:")
    if name.endswith((".yaml", ".yml")) or wanted:
        return Path(f"{path}.yaml" if wanted else name), wanted
    return BUILTIN_PROFILES, name


def _load(file: Path) -> dict[str, Profile]:
    content, _ = read_yaml(file)
    if not content:
        raise ConfigError("expected a mapping of profiles", where=str(file))
    try:
        return {str(name): Profile.model_validate(value) for name, value in content.items()}
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{key}: {first['msg']}", where=str(file)) from None
