"""One type for each tensor, so that the sum of what they cost is least and their bytes fit.

A knapsack of which one item of each class is taken (multiple-choice knapsack). It is solved as the
integer program that it is, to optimality, by HiGHS through scipy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from so8tqc.errors import InputError, ToolError

_GAP = 1e-9
"""How much better another choice may be, as a share: costs are known to a tenth at best."""

_SECONDS = 60.0
"""A choice for two thousand options takes a tenth of one."""


class Option(NamedTuple):
    """A tensor in one type.

    Attributes:
        type: GGML type.
        bytes: that it takes in the file.
        cost: what it loses, not negative.
    """

    type: str
    bytes: int
    cost: float


def worth_having(options: Sequence[Option]) -> list[Option]:
    """The options that no other beats in bytes and in cost, the smallest first.

    Of two that are alike the one whose type's name comes first stays.
    """
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.cost, o.type)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def cheapest(tensors: Mapping[str, Sequence[Option]], limit: int) -> dict[str, Option]:
    """The choice of one option for each tensor that costs least, within ``limit`` bytes.

    Of tensors whose options are the very same, those whose names come first get the larger ones.

    Args:
        tensors: name → its options, at least one.
        limit: bytes of all together.

    Raises:
        InputError: the smallest options do not fit.
        ToolError: HiGHS found none in time.
    """
    options = {name: worth_having(tensors[name]) for name in sorted(tensors)}
    least = sum(some[0].bytes for some in options.values())
    if least > limit:
        raise InputError(f"{limit} bytes are less than the {least} of the smallest types")
    if sum(some[-1].bytes for some in options.values()) <= limit:
        return {name: options[name][-1] for name in tensors}
    chosen = dict(zip(options, _solved(list(options.values()), limit), strict=True))
    _in_order_of_names(options, chosen)
    return {name: chosen[name] for name in tensors}


def _solved(classes: Sequence[Sequence[Option]], limit: int) -> list[Option]:
    """One option of each class; the smallest of all fit, the largest do not."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = list(chain.from_iterable(classes))
    owners = np.repeat(np.arange(len(classes)), [len(some) for some in classes])
    one_of_each = csr_array(
        (np.ones(len(flat)), (owners, np.arange(len(flat)))), shape=(len(classes), len(flat))
    )
    costs = np.array([option.cost for option in flat], dtype=np.float64)
    # whole numbers, as small as can be: HiGHS allows a constraint to be missed by 1e-6
    extra = [option.bytes - some[0].bytes for some in classes for option in some]
    unit = math.gcd(*extra)
    room = (limit - sum(some[0].bytes for some in classes)) // unit
    sizes = np.array([[size // unit for size in extra]], dtype=np.float64)
    found = milp(
        costs / float(costs.max()),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_of_each, 1, 1), LinearConstraint(sizes, -np.inf, room)],
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if found.x is None:
        raise ToolError(f"HiGHS found no choice of types: {found.message}")
    starts = np.cumsum([0, *map(len, classes)])
    return [
        some[int(np.argmax(found.x[start : start + len(some)]))]
        for some, start in zip(classes, starts, strict=False)
    ]


def _in_order_of_names(options: Mapping[str, list[Option]], chosen: dict[str, Option]) -> None:
    """Hand out again what tensors with the same options have been given."""
    alike: dict[tuple[Option, ...], list[str]] = {}
    for name, some in options.items():
        alike.setdefault(tuple(some), []).append(name)
    for names in alike.values():
        given = sorted((chosen[name] for name in names), key=lambda o: -o.bytes)
        chosen.update(zip(names, given, strict=True))
