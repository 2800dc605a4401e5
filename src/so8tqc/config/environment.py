"""Environment variables as options: ``SO8TQC_KEY__SUBKEY``, or ``SO8TQC_COMMAND__KEY``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from pydantic import BaseModel

from so8tqc.config.stages import COMMAND_CONFIGS, RunConfig, option_paths
from so8tqc.config.yaml_file import Key
from so8tqc.errors import ConfigError

ENVIRONMENT_PREFIX = "SO8TQC_"


def environment_values(
    model: type[BaseModel], environment: Mapping[str, str]
) -> list[tuple[Key, str, str]]:
    """Path, text and name of each variable that sets an option of a model.

    A command takes ``SO8TQC_SEED`` and, which counts more, ``SO8TQC_QC__SEED``, the name it has
    in a run. What only other commands know is left to them; an empty variable is not set.

    Raises:
        ConfigError: a variable that no command knows; misspelt, it would do nothing, silently.
    """
    names = {
        name: tuple(name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"))
        for name, text in sorted(environment.items())
        if name.startswith(ENVIRONMENT_PREFIX) and text
    }
    of_model = set(option_paths(model))
    of_command = {
        (command, *path)
        for command, config in COMMAND_CONFIGS.items()
        if issubclass(model, config)
        for path in of_model
    }
    plain = [(p, environment[name], name) for name, p in names.items() if p in of_model]
    qualified = [(p[1:], environment[name], name) for name, p in names.items() if p in of_command]
    if unknown := [name for name, path in names.items() if path not in _known() | of_model]:
        spelt = [ENVIRONMENT_PREFIX + "__".join(path).upper() for path in sorted(_known())]
        close = difflib.get_close_matches(unknown[0], spelt, n=1)
        raise ConfigError(
            "sets no option of any command",
            where=", ".join(unknown),
            remedy=f"Did you mean {close[0]}?" if close else "Unset it.",
        )
    return plain + qualified


def _known() -> set[Key]:
    """The paths that some command takes."""
    known = set(option_paths(RunConfig))
    for command, config in COMMAND_CONFIGS.items():
        known |= {path for own in option_paths(config) for path in (own, (command, *own))}
    return known
