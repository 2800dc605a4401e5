"""What an id means: of a check, a diagnosis, a profile, a file type or an exit code."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from functools import cache
from typing import Literal

from so8tqc.check_guide import DIAGNOSES, EXIT_CODES, FILE_TYPE, GUIDE, PROFILES
from so8tqc.errors import ConfigError
from so8tqc.records import Frozen
from so8tqc.services.qc.profiles import HIGHER_IS_BETTER, Limit, Profile, builtin_profiles

MODELS = "models"
"""Stands in place of a file type for a profile's limits of model directories."""

OTHER_TYPES = "default"
"""Stands for the GGUF file types that a profile does not name."""

_SUBJECT = re.compile(r"@|\s*\[|\s+of\s+")
"""What stands between a check's id and what was judged: ``kl.mean@F16``, ``kl.mean [F16]``."""

_NEAREST = 3
_ALIKE = 0.4
"""difflib's ratio; below it two ids have little in common."""


class Kind(StrEnum):
    """The kinds of ids that can be explained."""

    CHECK = "check"
    DIAGNOSIS = "diagnosis"
    PROFILE = "profile"
    FILE_TYPE = "file type"
    EXIT_CODE = "exit code"


class ProfileLimit(Frozen):
    """One limit of one profile.

    Attributes:
        check: id.
        profile: name.
        files: a GGUF file type, :data:`MODELS` or :data:`OTHER_TYPES`.
        comparison: how the value must stand to it.
        limit: fixed, or None.
        target: widened by ``floor_factor`` times the noise floor, or None.
        floor_factor: None where the limit is fixed.
    """

    check: str
    profile: str
    files: str
    comparison: Literal["<=", ">="]
    limit: float | None
    target: float | None
    floor_factor: float | None


class Explanation(Frozen):
    """What one id means; "" where a kind has no such sentence.

    Attributes:
        id: as it is written in records.
        kind: what it is an id of.
        title: a few words.
        meaning: what is measured, found or told.
        failure: what it says about the file when the check fails.
        remedy: what to do then.
        limits: of the profiles that come along.
    """

    id: str
    kind: Kind
    title: str
    meaning: str = ""
    failure: str = ""
    remedy: str = ""
    limits: tuple[ProfileLimit, ...] = ()


def explain(name: str) -> list[Explanation]:
    """What an id means, whatever its letters' case.

    Args:
        name: a check's id, alone or with what was judged (``kl.mean@Q5_K_M``,
            ``kl.mean@model-Q5_K_M.gguf``: then only the limits of that type), the group of several
            (``kl``, ``kl.*``), a diagnosis code, a profile, a GGUF file type or an exit code.

    Returns:
        One explanation; of a group, one for each of its checks.

    Raises:
        ConfigError: nothing has this name; the message has the ids most like it.
    """
    wanted, *subject = _SUBJECT.split(name.strip(), maxsplit=1)
    wanted = wanted.strip().casefold()
    for known in everything():
        if known.id.casefold() == wanted:
            return [_of(known, subject[0].rstrip("]")) if subject else known]
    group = [known for known in everything() if known.id.startswith(f"{wanted.rstrip('.*')}.")]
    if group:
        return group
    alike = nearest(wanted)
    raise ConfigError(
        f"no check, diagnosis, profile, file type or exit code is called {name!r}",
        remedy=(f"Nearest: {', '.join(alike)}. " if alike else "")
        + "All are listed by: so8tqc explain",
    )


@cache
def everything() -> tuple[Explanation, ...]:
    """All that can be explained, each kind by itself."""
    limits = tuple(_limits(builtin_profiles()))
    return (*_checks(limits), *_diagnoses(), *_profiles(limits), *_file_types(limits), *_codes())


def nearest(name: str) -> list[str]:
    """The ids most like this one, best first; of a number, the exit codes next to it."""
    ids = [known.id for known in everything()]
    if name.lstrip("+-").isdigit():
        codes = [i for i in ids if i.isdigit()]
        return sorted(codes, key=lambda code: abs(int(code) - int(name)))[:_NEAREST]
    # the part behind the dot is what people remember: ``top1`` is ``kl.top1``
    forms = {form: i for i in ids for form in (i.casefold(), i.casefold().rpartition(".")[2])}
    found = difflib.get_close_matches(name.casefold(), forms, n=2 * _NEAREST, cutoff=_ALIKE)
    return list(dict.fromkeys(forms[form] for form in found))[:_NEAREST]


def _checks(limits: Sequence[ProfileLimit]) -> Iterator[Explanation]:
    for check_id, guide in GUIDE.items():
        yield Explanation(
            id=check_id,
            kind=Kind.CHECK,
            title=guide.title,
            meaning=guide.meaning,
            failure=guide.failure,
            remedy=guide.remedy,
            limits=_where(limits, check=check_id),
        )


def _diagnoses() -> Iterator[Explanation]:
    for code, (finding, evidence, remedy) in DIAGNOSES.items():
        yield Explanation(
            id=code, kind=Kind.DIAGNOSIS, title=finding, meaning=evidence, remedy=remedy
        )


def _profiles(limits: Sequence[ProfileLimit]) -> Iterator[Explanation]:
    for name, (title, meaning, remedy) in PROFILES.items():
        yield Explanation(
            id=name,
            kind=Kind.PROFILE,
            title=title,
            meaning=meaning,
            remedy=remedy,
            limits=_where(limits, profile=name),
        )


def _codes() -> Iterator[Explanation]:
    for code, (title, meaning, remedy) in EXIT_CODES.items():
        yield Explanation(
            id=str(int(code)), kind=Kind.EXIT_CODE, title=title, meaning=meaning, remedy=remedy
        )


def _file_types(limits: Sequence[ProfileLimit]) -> Iterator[Explanation]:
    named = dict.fromkeys(limit.files for limit in limits)
    for file_type in named:
        if file_type not in (MODELS, OTHER_TYPES):
            own = _where(limits, files=file_type)
            yield Explanation(id=file_type, kind=Kind.FILE_TYPE, title=FILE_TYPE, limits=own)


def _where(limits: Iterable[ProfileLimit], **fields: str) -> tuple[ProfileLimit, ...]:
    """Those limits whose fields have these values."""
    return tuple(
        limit
        for limit in limits
        if all(getattr(limit, name) == value for name, value in fields.items())
    )


def _of(known: Explanation, subject: str) -> Explanation:
    """An explanation with the limits of one file's type alone, where its name says the type."""
    types = {limit.files for limit in known.limits} - {MODELS, OTHER_TYPES}
    named = [t for t in types if re.search(rf"(?<![A-Z0-9_]){t}(?![A-Z0-9_])", subject.upper())]
    if named:
        wanted = max(named, key=len)
    elif subject.casefold().endswith(".gguf"):
        wanted = OTHER_TYPES
    else:
        return known
    return known.model_copy(update={"limits": _where(known.limits, files=wanted)})


def _limits(profiles: dict[str, Profile]) -> Iterator[ProfileLimit]:
    for name, profile in profiles.items():
        for files, limits in ((MODELS, profile.models), *profile.gguf.items()):
            for check_id, limit in limits.items():
                yield _limit(name, files, check_id, limit)


def _limit(profile: str, files: str, check_id: str, limit: Limit) -> ProfileLimit:
    fixed = limit.limit is not None
    return ProfileLimit(
        check=check_id,
        profile=profile,
        files=files,
        comparison=">=" if check_id in HIGHER_IS_BETTER else "<=",
        limit=limit.limit,
        target=limit.target,
        floor_factor=None if fixed else limit.floor_factor,
    )
