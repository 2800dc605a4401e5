"""Rows of what was seen, the checks that follow, and what is wrong in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from so8tqc.check_guide import DIAGNOSES
from so8tqc.record_kinds.locate import LayerRow, OperationRow, RuntimeRow
from so8tqc.records import Check, Diagnosis, judge, skipped
from so8tqc.services.locate.causes import Case, cause_of
from so8tqc.services.locate.measure import Difference, limits
from so8tqc.services.locate.names import INTO, Names, module_name
from so8tqc.services.locate.sides import Sides
from so8tqc.services.locate.walk import START, Stage, differences, uncalled

_SHOWN = 4
CODE, RUNTIME_CODE = "wrong_operation", "runtime_differs"


class Rows:
    """The rows of all stages, made while their weights are there.

    Args:
        sides: the models.
        eps: unit of the compute dtype.
        only: layers whose operations are looked at; None: all.
    """

    def __init__(self, sides: Sides, eps: float, only: Collection[int] | None) -> None:
        self.layers: list[LayerRow] = []
        self.operations: list[OperationRow] = []
        self.uncompared: dict[str, None] = {}
        self._sides = sides
        self._names = Names(sides.candidate.model.module, sides.stack)
        self._eps = eps
        self._only = only
        self._count = len(sides.candidate.model.layers)

    def look(self, stage: Stage) -> None:
        """Add a stage's rows."""
        if START < stage.index < self._count:
            self.layers.append(self._layer(stage))
        elif stage.index == self._count:
            self.layers.append(self._logits(stage))
        inside = START < stage.index < self._count
        if inside and self._only is not None and stage.index not in self._only:
            return
        self.uncompared |= dict.fromkeys(uncalled(stage.played, stage.recorded))
        wrong: set[str] = set()
        for name, found in differences(stage.played, stage.recorded).items():
            if module_name(name) in wrong:  # what else it makes follows from that
                continue
            row = self._operation(stage, name, found)
            if row.wrong or not name.startswith(INTO):
                self.operations.append(row)
            if row.wrong:
                wrong.add(name)

    def _layer(self, stage: Stage) -> LayerRow:
        limit = limits(stage.honest_by_layer, self._eps, product=False)
        return LayerRow(
            layer=stage.index,
            error=stage.free.error,
            explained=stage.honest_free.error,
            own=stage.by_layer.error,
            own_explained=stage.honest_by_layer.error,
            limit=limit.error,
            wrong=not limit.explain(stage.by_layer),
        )

    def _logits(self, stage: Stage) -> LayerRow:
        return LayerRow(
            layer=None, error=stage.free.error, explained=stage.honest_free.error, wrong=False
        )

    def _operation(self, stage: Stage, name: str, found: Difference) -> OperationRow:
        honest = stage.honest.get(name, Difference())
        product = self._names.is_product(name)
        allowed = limits(honest, self._eps, product=product)
        wrong = not allowed.explain(found)
        cause = None
        if wrong:
            cause = cause_of(Case(self._sides, self._names, stage, name, found, allowed))
        return OperationRow(
            layer=self._names.layer(name),
            operation=self._names.word(name),
            module=self._names.short(name),
            error=found.error,
            explained=honest.error,
            limit=allowed.error,
            gain=found.gain if product else None,
            gain_limit=allowed.gain,
            wrong=wrong,
            cause=cause.words if cause else "",
        )


def locate_checks(rows: Rows, unseen: Iterable[str]) -> list[Check]:
    """``locate.operations``, ``locate.layers`` and ``locate.seen``."""
    wrong = [row for row in rows.operations if row.wrong]
    bad = [row for row in rows.layers if row.wrong]
    layers = [row for row in rows.layers if row.layer is not None]
    checks = [
        judge(
            "locate.operations",
            len(wrong),
            0,
            detail=f"{len(rows.operations) - len(wrong)} of {len(rows.operations)} operations are "
            "what the stored types and the arithmetic make of the reference's."
            + (f" First: {sentence(wrong[0])}." if wrong else ""),
        ),
        judge(
            "locate.layers",
            len(bad),
            0,
            detail=f"{len(layers) - len(bad)} of {len(layers)} layers, each given what the "
            "reference's is given, make what rounding explains."
            + (f" First: {_layer_sentence(bad[0])}." if bad else ""),
        ),
    ]
    left = [*unseen]
    if rows.uncompared:
        names = list(rows.uncompared)
        left.append(f"{len(names)} operations are not called alike on both sides, first {names[0]}")
    if left:
        checks.append(skipped("locate.seen", "; ".join(left) + "."))
    return checks


def runtime_checks(rows: Sequence[RuntimeRow], unseen: Iterable[str]) -> list[Check]:
    """``locate.runtime``, and a skip for what libllama calls otherwise."""
    wrong = [row for row in rows if row.wrong]
    checks = []
    if rows:
        first = f" First: {runtime_sentence(wrong[0])}." if wrong else ""
        detail = (
            f"{len(rows) - len(wrong)} of {len(rows)} of libllama's values are what rounding "
            f"activations makes of the file's weights.{first}"
        )
        checks.append(judge("locate.runtime", len(wrong), 0, detail=detail))
    if left := list(unseen):
        names = ", ".join(left[:_SHOWN]) + (" …" if len(left) > _SHOWN else "")
        checks.append(
            skipped("locate.runtime_seen", f"Not found among libllama's values: {names}.")
        )
    return checks


def runtime_sentence(row: RuntimeRow) -> str:
    """Where libllama's value is, and how far it is off."""
    layer = "" if row.layer is None else f"layer {row.layer}, "
    said = f"{layer}{row.operation} ({row.node})"
    return f"{said}: error {row.error:.2g}, of which rounding explains {row.limit:.2g}"


def diagnose_runtime(rows: Sequence[RuntimeRow]) -> list[Diagnosis]:
    """Values of libllama's that are not explained, the first one's layer first."""
    wrong = [row for row in rows if row.wrong]
    if not wrong:
        return []
    fault = DIAGNOSES[RUNTIME_CODE]
    shown = "; ".join(runtime_sentence(row) for row in wrong[:_SHOWN])
    more = f"; {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    layers = tuple(sorted({row.layer for row in wrong if row.layer is not None}))
    text = f"{fault.finding}: {shown}{more}."
    return [Diagnosis(code=RUNTIME_CODE, layers=layers, text=text, remedy=fault.remedy)]


def sentence(row: OperationRow) -> str:
    """Where it is, how far it is off, and what explains it."""
    said = f"{row.place}: error {row.error:.2g}, of which rounding explains {row.limit:.2g}"
    if row.gain is not None and row.error <= row.limit:
        said = (
            f"{row.place}: {row.gain:.5g} times the reference's, where rounding explains 1 ± "
            f"{row.gain_limit:.2g}"
        )
    return f"{said}; {row.cause}" if row.cause else said


def _layer_sentence(row: LayerRow) -> str:
    return f"layer {row.layer}: error {row.own:.2g}, of which rounding explains {row.limit:.2g}"


def diagnose_operations(rows: Sequence[OperationRow]) -> list[Diagnosis]:
    """One diagnosis for each cause, the first place's first; those without a known one together."""
    fault = DIAGNOSES[CODE]
    wrong = [row for row in rows if row.wrong]
    found = []
    for cause in dict.fromkeys(row.cause for row in wrong):
        mine = [row for row in wrong if row.cause == cause]
        shown = "; ".join(sentence(row) for row in mine[:_SHOWN])
        more = f"; {len(mine) - _SHOWN} more" if len(mine) > _SHOWN else ""
        found.append(
            Diagnosis(
                code=CODE,
                layers=tuple(sorted({row.layer for row in mine if row.layer is not None})),
                text=f"{fault.finding}: {shown}{more}.",
                remedy=fault.remedy,
            )
        )
    return found
