"""PET in long text: are the hidden states as calm as the gates' training should have made them?"""

from __future__ import annotations

import json
from typing import Any

from so8tqc.config import LongTextConfig
from so8tqc.metrics.oscillation import Change
from so8tqc.metrics.smoothness import ENERGY, HIGH, FloatArray, mean_change, share
from so8tqc.records import Check, judge, skipped
from so8tqc.sources.probe import Probe

LAYER_LIMIT = 0.05
"""A layer's energy or high-frequency share may be five per cent above the gated reference's."""

EFFECT_LIMIT = -0.03
"""Gates trained with PET must have calmed the base's hidden states by three per cent. Measured on
SmolLM2-135M: −5.0 to −8.3 % with PET, −0.3 to −1.5 % without (docs/longtext.md)."""

_NAMES = {ENERGY: "second-difference energy", HIGH: "high-frequency share"}
_IDS = {ENERGY: "pet.energy", HIGH: "pet.high_frequency"}


def fidelity_checks(subject: str, candidate: Probe, reference: Probe) -> list[Check]:
    """Each layer of the candidate against the reference's: what the bake may have stirred up."""
    checks = []
    for column, check_id in _IDS.items():
        increase = share(candidate.sums, column) / share(reference.sums, column) - 1
        layer = int(increase.argmax())
        checks.append(
            judge(
                check_id,
                float(increase[layer]),
                LAYER_LIMIT,
                subject=subject,
                detail=f"Largest relative increase of a layer's {_NAMES[column]} over the "
                f"reference, in layer {layer}.",
            )
        )
    return checks


def changes_from_base(base: Probe, gated: Probe, config: LongTextConfig) -> dict[str, Change]:
    """Energy and share, as geometric means over layers, relative to the base model."""
    return {
        _IDS[column].removeprefix("pet."): mean_change(
            base.sums, gated.sums, column, resamples=config.resamples, seed=config.seed
        )
        for column in (ENERGY, HIGH)
    }


def effect_check(subject: str, changes: dict[str, Change], record: str | None) -> Check:
    """Whether the gates have the effect that their PET record promises.

    Without a record there is no promise: then what was measured is said, and nothing judged.

    Args:
        subject: the text.
        changes: see :func:`changes_from_base`.
        record: the gate file's PET record, None if it says nothing.
    """
    worst = max(changes.values(), key=lambda change: change.ci95[1])
    measured = " and ".join(
        f"{_NAMES[column]} {_percent(change)}"
        for column, change in zip((ENERGY, HIGH), changes.values(), strict=True)
    )
    promise = pet_record(record)
    if promise is None:
        says = "were trained without PET" if record == "none" else "have no PET record"
        return skipped(
            "pet.effect",
            f"the gates {says}: there is no promise to keep. Measured against the base model: "
            f"{measured}; {looks(changes)}",
            subject=subject,
        )
    strength = promise.get("strength")
    return judge(
        "pet.effect",
        worst.ci95[1],
        EFFECT_LIMIT,
        subject=subject,
        ci95=worst.ci95,
        detail=f"Upper end of the change of the hidden states' oscillation against the base model "
        f"(mean over layers: {measured}). The gates' record says PET of strength {strength}; "
        f"{looks(changes)}.",
    )


def looks(changes: dict[str, Change]) -> str:
    """What the hidden states alone say, whatever the record does."""
    if all(change.ci95[1] <= EFFECT_LIMIT for change in changes.values()):
        return "the hidden states look as after training with PET"
    if all(change.ci95[0] > EFFECT_LIMIT for change in changes.values()):
        return "the hidden states look as after training without PET"
    return "the hidden states tell neither training with PET nor without"


def pet_record(record: str | None) -> dict[str, Any] | None:
    """The PET record of a gate file, None if it has none."""
    if record is None or record == "none":
        return None
    parsed = json.loads(record)  # readers have checked that it is an object
    return dict(parsed)


def layer_metrics(run: Probe) -> dict[str, FloatArray]:
    """Energy and high-frequency share of the hidden states, layer by layer."""
    return {"energy": run.energy, "high_frequency": run.high_frequency}


def _percent(change: Change) -> str:
    low, high = (100 * end for end in change.ci95)
    return f"{100 * change.relative:+.1f} % ({low:+.1f} … {high:+.1f})"
