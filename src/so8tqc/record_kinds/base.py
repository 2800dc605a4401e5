"""What the structures of all kinds have in common: writing, and reading what is older.

A field without default is written always. A key that an old record lacks reads as nothing: an
empty list or mapping, or None where the field may be None; another field that is missing makes
the record unreadable. A field with a default of None is written only where it was measured. Keys
that this version does not know are passed over in reading, and refused in writing.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationInfo, model_validator

from so8tqc.records import Record, jsonable

Interval = tuple[float, float]
"""95 %, lower and upper end."""

_READING = "reading"


class Entry(BaseModel):
    """A part of what was measured; frozen. Numbers that are not finite are text in a record."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _of_an_old_record(cls, data: Any, info: ValidationInfo) -> Any:
        """While reading, what is missing is nothing, and what is unknown is passed over."""
        if not (info.context and info.context.get(_READING)) or not isinstance(data, dict):
            return data
        if data.keys() == cls.model_fields.keys():
            return data
        known = {name: value for name, value in data.items() if name in cls.model_fields}
        return {name: make() for name, make in _nothing(cls).items() if name not in data} | known

    def as_json(self) -> dict[str, JsonValue]:
        """Plain JSON in the order of the fields, without what was not measured."""
        return {k: jsonable(v) for k, v in self.model_dump(exclude_defaults=True).items()}


class Metrics(Entry):
    """What stands in ``Record.metrics``."""

    @classmethod
    def of(cls, record: Record) -> Self:
        """Read a record's metrics.

        Raises:
            ValidationError: they are not those of this kind.
        """
        return cls.model_validate(record.metrics, context={_READING: True})


class OnThisMachine(Entry):
    """What stands in ``Record.run.measured``: it depends on the machine."""

    @classmethod
    def of(cls, record: Record) -> Self:
        """Read what a record's run measured.

        Raises:
            ValidationError: it is not that of this kind.
        """
        return cls.model_validate(record.run.measured, context={_READING: True})


def plain_metrics(record: Record) -> Mapping[str, JsonValue]:
    """The metrics of a record of whatever kind, as they are."""
    return record.metrics


@cache
def _nothing(kind: type[Entry]) -> dict[str, Callable[[], object]]:
    """Required field → what makes its value where an old record lacks it."""
    made: dict[str, Callable[[], object]] = {}
    for name, field in kind.model_fields.items():
        origin = get_origin(field.annotation)
        if not field.is_required():
            continue
        if origin in (list, dict):
            made[name] = origin
        elif origin in (Union, types.UnionType) and type(None) in get_args(field.annotation):
            made[name] = types.NoneType
    return made
