"""From token tables to checks: fidelity, effect, survival, calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from so8tqc.metrics.bootstrap import (
    LEAST_TEXTS,
    paired_bootstrap,
    ratio_of_sums,
)
from so8tqc.metrics.calibration import (
    BINS,
    calibration_error,
    calibration_sums,
    equal_width_edges,
)
from so8tqc.metrics.divergence import FloatArray, TokenTable, summarise
from so8tqc.record_kinds.qc import Bucket
from so8tqc.records import Check, judge
from so8tqc.services.qc.profiles import HIGHER_IS_BETTER, Limit

CONFIDENCE_EDGES = (0.0, 0.5, 0.9, 1.0)
"""Of the reference's largest probability: unsure, in between, sure."""

EFFECT_FACTOR = 10.0
"""A gate has an effect if KL(base‖gated) is at least this many times the bake's own error."""

SMALLEST_EFFECT = 1e-5
"""nats; below this an effect is not told from arithmetic, whatever the floor."""

_UNITS = {"kl.mean": "nats", "kl.max": "nats"}

_SENTENCES = {
    "logits.max_abs": "Largest |Δlogit| over all scored positions and the vocabulary",
    "logits.mean_abs": "Mean |Δlogit|",
    "logits.rms": "Root mean square Δlogit",
    "kl.mean": "Mean KL divergence from the reference, per token",
    "kl.max": "Largest KL divergence of one token",
    "kl.top1": "Share of tokens with the reference's most likely next token",
}


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are computed."""

    resamples: int
    seed: int
    looks: int = 1
    """Numbers of texts at which was looked whether to go on; see ``metrics.bootstrap``."""


def confidence_buckets(table: TokenTable, bootstrap: Bootstrap) -> list[Bucket]:
    """KL by how sure the reference is of its next token: the probability of its likeliest.

    A mean over all tokens hides which they are: what a quantization loses where the reference is
    sure changes what greedy decoding writes, where it is not it changes little.
    """
    sure = table.columns["max_prob_reference"]
    buckets = []
    for low, high in pairwise(CONFIDENCE_EDGES):
        # the last one holds 1 itself
        inside = (sure >= low) & ((sure < high) | (high == CONFIDENCE_EDGES[-1]))
        part = TokenTable(
            {name: table.columns[name][inside] for name in ("kl", "same_top")},
            table.text[inside],
            table.position[inside],
            table.vocab_size,
            table.texts,
        )
        tokens = int(inside.sum())
        texts = np.unique(part.text).size
        enough = texts >= LEAST_TEXTS
        buckets.append(
            Bucket(
                low=low,
                high=high,
                tokens=tokens,
                share=tokens / len(table),
                kl_mean=float(part.columns["kl"].mean()) if tokens else None,
                kl_ci95=mean_interval(part, "kl", bootstrap) if enough else None,
                top1=float(part.columns["same_top"].mean()) if tokens else None,
                top1_ci95=mean_interval(part, "same_top", bootstrap) if enough else None,
            )
        )
    return buckets


def fidelity_checks(
    table: TokenTable,
    limits: Mapping[str, Limit],
    subject: str,
    bootstrap: Bootstrap,
    floor: TokenTable | None,
) -> list[Check]:
    """``logits.*``, ``kl.*`` and ``calibration.*`` that the profile has limits for.

    Args:
        table: candidate against reference.
        limits: check id → limit.
        subject: the candidate's name.
        bootstrap: for intervals.
        floor: what honest rounding alone leaves, against the reference: our exact fold in the
            storage dtype, or of a quantized file the same types encoded from the reference's own
            weights; None where there is none.
    """
    checks = []
    values = _values(table)
    floors = _values(floor) if floor is not None else {}
    for check_id, limit in limits.items():
        if check_id in values:
            value, noise = values[check_id], floors.get(check_id)
            checks.append(_fidelity(check_id, value, limit, subject, table, bootstrap, noise))
        else:
            checks.append(_calibration(check_id, limit, subject, table, bootstrap, floor))
    return checks


def image_checks(
    table: TokenTable,
    limits: Mapping[str, Limit],
    subject: str,
    bootstrap: Bootstrap,
    floor: TokenTable | None,
) -> list[Check]:
    """``images.*``: the profile's limits of ``kl.mean`` and ``kl.top1``, after pictures alone.

    Tokens of text alone are many, and would hide what is wrong with the others.

    Args: as of :func:`fidelity_checks`.
    """
    if not table.sees.any():
        return []
    seen = table.where(table.sees)
    floors = {} if floor is None else _values(floor.where(floor.sees))
    values = _values(seen)
    checks = []
    if (limit := limits.get("kl.mean")) is not None:
        floor_kl = floors.get("kl.mean")
        checks.append(
            judge(
                "images.kl",
                values["kl.mean"],
                _limit(limit, floor_kl, False, len(seen)),
                subject=subject,
                unit="nats",
                ci95=mean_interval(seen, "kl", bootstrap),
                target=limit.target,
                noise_floor=floor_kl,
                detail=f"Mean KL divergence over the {len(seen)} tokens after a picture.",
            )
        )
    if (limit := limits.get("kl.top1")) is not None:
        floor_top = floors.get("kl.top1")
        checks.append(
            judge(
                "images.top1",
                values["kl.top1"],
                _limit(limit, floor_top, True, len(seen)),
                comparison=">=",
                subject=subject,
                ci95=mean_interval(seen, "same_top", bootstrap),
                target=limit.target,
                noise_floor=floor_top,
                detail="Share of tokens after a picture with the reference's most likely next "
                "token.",
            )
        )
    return checks


def effect_check(base: TokenTable, floor: TokenTable | None, bootstrap: Bootstrap) -> Check:
    """``effect.kl``: what the gate changes at all, base against gated model.

    A bake can only be judged if the gate does something: were base and gated model the
    same, an unbaked model would pass every fidelity check.
    """
    value = float(base.columns["kl"].mean())
    noise = float(floor.columns["kl"].mean()) if floor is not None else 0.0
    return judge(
        "effect.kl",
        value,
        max(SMALLEST_EFFECT, EFFECT_FACTOR * noise),
        comparison=">=",
        unit="nats",
        ci95=mean_interval(base, "kl", bootstrap),
        noise_floor=noise if floor is not None else None,
        detail="Mean KL from the base to the gated model: what the gate does. It must stand clear "
        "of the noise floor, or nothing below means anything.",
    )


def floor_check(base: TokenTable, floor: TokenTable, subject: str) -> Check:
    """``floor.plausible``: a noise floor is small beside the effect, or no limit to go by.

    What the floor was measured with shares our reading of the model: were the gates hung in a wrong
    place, or a weight folded for layers that have no gate, floor and error would grow together.

    Args:
        base: base against gated model.
        floor: our exact fold, rounded to the storage dtype, against the gated model.
        subject: the storage dtype, or the candidate, whose floor it is.
    """
    effect, noise = (float(table.columns["kl"].mean()) for table in (base, floor))
    return judge(
        "floor.plausible",
        noise / effect if effect > 0 else float("inf"),
        1 / EFFECT_FACTOR,
        subject=subject,
        detail=f"Mean KL of the noise floor ({noise:.3g} nats), as a share of what the gates "
        f"change ({effect:.3g} nats). If it is not small, no limit is widened by it.",
    )


def survival_check(
    to_gated: TokenTable, to_base: TokenTable, subject: str, bootstrap: Bootstrap
) -> Check:
    """``effect.survival``: is the file nearer to the gated model than to the base?

    The value is the mean over tokens of KL(gated‖file) − KL(base‖file), paired; it fails
    unless it is negative with its whole 95 % interval. A file made from the unbaked model, or
    one whose quantization erased the gate, fails.
    """
    difference = to_gated.columns["kl"] - to_base.columns["kl"]
    paired = TokenTable(
        {"d": difference}, to_gated.text, to_gated.position, to_gated.vocab_size, to_gated.texts
    )
    interval = mean_interval(paired, "d", bootstrap)
    upper = float(difference.mean()) if interval is None else interval[1]
    near, far = to_gated.columns["kl"].mean(), to_base.columns["kl"].mean()
    return judge(
        "effect.survival",
        upper,
        0.0,
        comparison="<",
        subject=subject,
        unit="nats",
        ci95=interval,
        detail=f"Upper end of KL to the gated model ({near:.4g}) minus KL to the base "
        f"({far:.4g}): negative if the gate survives in the file.",
    )


def calibration_summary(table: TokenTable) -> dict[str, float]:
    """ECE, Brier and NLL of reference and candidate on the scored tokens."""
    c = table.columns
    result = {}
    for side in ("reference", "candidate"):
        result[f"ece_{side}"] = float(calibration_error(_bin_sums(table, side).sum(axis=0)))
        result[f"brier_{side}"] = float(c[f"brier_{side}"].mean())
        result[f"nll_{side}"] = float(c[f"nll_{side}"].mean())
    return result


def kl_histogram(table: TokenTable) -> dict[str, list[float]]:
    """Tokens by log₁₀ of their KL, in bins of a quarter decade from 1e-14 to 1e2 nats."""
    edges = np.linspace(-14, 2, 65)
    logs = np.log10(np.clip(table.columns["kl"], 1e-14, 1e2))
    counts, _ = np.histogram(logs, bins=edges)
    return {
        "log10_centres": ((edges[:-1] + edges[1:]) / 2).tolist(),
        "counts": counts.astype(float).tolist(),
    }


def _values(table: TokenTable) -> dict[str, float]:
    summary = summarise(table)
    keys = {
        "logits.max_abs": "max_abs",
        "logits.mean_abs": "mean_abs",
        "logits.rms": "rms",
        "kl.mean": "kl_mean",
        "kl.max": "kl_max",
        "kl.top1": "top1",
    }
    return {check_id: float(str(summary[key])) for check_id, key in keys.items()}


def _fidelity(
    check_id: str,
    value: float,
    limit: Limit,
    subject: str,
    table: TokenTable,
    bootstrap: Bootstrap,
    floor: float | None,
) -> Check:
    higher = check_id in HIGHER_IS_BETTER
    return judge(
        check_id,
        value,
        _limit(limit, floor, higher, len(table)),
        comparison=">=" if higher else "<=",
        subject=subject,
        unit=_UNITS.get(check_id, ""),
        ci95=_interval(check_id, table, bootstrap),
        target=limit.target,
        noise_floor=floor,
        detail=_SENTENCES[check_id] + ".",
    )


def _limit(limit: Limit, floor: float | None, higher: bool, tokens: int) -> float:
    """The limit in force: fixed, or the target widened by the noise floor.

    For shares (higher is better) the *misses* are widened, and at least one token may miss:
    a share cannot be measured more finely than that.
    """
    if limit.limit is not None:
        return limit.limit
    assert limit.target is not None  # Limit validates that one of the two is given
    if floor is None or limit.floor_factor == 0:
        return limit.target
    if higher:
        return min(limit.target, 1 - limit.floor_factor * (1 - floor) - 1 / tokens)
    return max(limit.target, limit.floor_factor * floor)


def _interval(check_id: str, table: TokenTable, bootstrap: Bootstrap) -> tuple[float, float] | None:
    """95 % interval where the value is a mean over tokens; maxima have none."""
    match check_id:
        case "kl.mean":
            return mean_interval(table, "kl", bootstrap)
        case "kl.top1":
            return mean_interval(table, "same_top", bootstrap)
        case "logits.mean_abs":
            interval = mean_interval(table, "sum_abs_logit", bootstrap)
            return interval and (interval[0] / table.vocab_size, interval[1] / table.vocab_size)
        case "logits.rms":
            interval = mean_interval(table, "sum_square_logit", bootstrap)
            return interval and (
                float(np.sqrt(interval[0] / table.vocab_size)),
                float(np.sqrt(interval[1] / table.vocab_size)),
            )
        case _:
            return None


def mean_interval(
    table: TokenTable, column: str, bootstrap: Bootstrap
) -> tuple[float, float] | None:
    """95 % interval of a column's mean over tokens; None with too few texts for one."""
    low, high = paired_bootstrap(
        table.per_text(column),
        ratio_of_sums,
        resamples=bootstrap.resamples,
        seed=bootstrap.seed,
        looks=bootstrap.looks,
    )
    return None if np.isnan(low) else (low, high)


_CALIBRATION = {
    "calibration.brier": "Brier score",
    "calibration.nll": "negative log likelihood",
    "calibration.ece": f"expected calibration error ({BINS} bins)",
}


def _calibration(
    check_id: str,
    limit: Limit,
    subject: str,
    table: TokenTable,
    bootstrap: Bootstrap,
    floor: TokenTable | None,
) -> Check:
    """How much worse calibrated the candidate is than the reference; negative is better."""
    statistic, per_text = _calibration_sums(check_id, table)
    noise = None
    if floor is not None and limit.target is not None:
        of_floor, sums = _calibration_sums(check_id, floor)
        noise = float(of_floor(sums.sum(axis=0)))
    low, high = paired_bootstrap(
        per_text,
        statistic,
        resamples=bootstrap.resamples,
        seed=bootstrap.seed,
        looks=bootstrap.looks,
    )
    return judge(
        check_id,
        float(statistic(per_text.sum(axis=0))),
        _limit(limit, noise, higher=False, tokens=len(table)),
        subject=subject,
        ci95=None if np.isnan(low) else (low, high),
        target=limit.target,
        noise_floor=noise,
        detail=f"The candidate's {_CALIBRATION[check_id]} minus the reference's.",
    )


def _calibration_sums(
    check_id: str, table: TokenTable
) -> tuple[Callable[[FloatArray], FloatArray], FloatArray]:
    """The statistic of a check, and [texts, k] sums that it is made of."""
    match check_id:
        case "calibration.brier":
            return _difference_of_means, table.per_text("brier_candidate", "brier_reference")
        case "calibration.nll":
            return _difference_of_means, table.per_text("nll_candidate", "nll_reference")
        case "calibration.ece":
            sides = [_bin_sums(table, side) for side in ("candidate", "reference")]
            return _difference_of_ece, np.concatenate(sides, axis=1)
        case _:
            raise AssertionError(f"{check_id} is not among the checks of a profile")


def _difference_of_means(totals: FloatArray) -> FloatArray:
    difference: FloatArray = (totals[..., 0] - totals[..., 1]) / totals[..., 2]
    return difference


def _difference_of_ece(totals: FloatArray) -> FloatArray:
    """[..., 2·(bins + 1)] sums of candidate and reference → difference of their ECE."""
    half = totals.shape[-1] // 2
    return calibration_error(totals[..., :half]) - calibration_error(totals[..., half:])


def _bin_sums(table: TokenTable, side: str) -> FloatArray:
    """[texts, bins + 1]: gaps of each confidence bin and the number of tokens."""
    return calibration_sums(
        table.columns[f"max_prob_{side}"],
        table.columns[f"correct_{side}"].astype(bool),
        equal_width_edges(),
        table.text.astype(np.intp),
        len(table.texts),
    )
