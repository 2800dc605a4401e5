"""Checks and metrics of one long text, from what was measured on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from so8tqc.config import LongTextConfig
from so8tqc.metrics import oscillation as osc
from so8tqc.metrics.divergence import TokenTable
from so8tqc.metrics.repetition import repetition
from so8tqc.metrics.spectra import Spectrum
from so8tqc.record_kinds.longtext import (
    CaseMetrics,
    FromBase,
    Indices,
    Oscillation,
    RelativeChange,
    Repeated,
)
from so8tqc.records import Check, judge, skipped
from so8tqc.services.longtext.pet import effect_check, fidelity_checks, layer_metrics, looks
from so8tqc.sources.probe import Probe
from so8tqc.sources.protocol import EncodedText

CANDIDATE, REFERENCE, BASE = "candidate", "reference", "base"

LAYER0_LIMIT_NATS = 1e-3
"""Layer 0's attention sees only embeddings, which no fold touches: only float32 noise remains."""

ATTENTION_LIMIT_NATS = 0.01
"""Mean |ΔH| of a layer's attention. SmolLM2-135M, 2,048 tokens: 0.003 in the worst layer of a
correct bfloat16 bake, 0.0002 in float16; 0.012 to 0.023 where one layer's queries and keys are
turned by 0.1 rad before RoPE, 0.09 by 0.5 rad; 0.5 without the gates (docs/longtext.md)."""

_ATTENTION_CHECKS = ("phase.layer0", "phase.attention", "phase.dips")

COMPARING_CHECKS = (
    "phase.layer0",
    "phase.attention",
    "phase.dips",
    "phase.position",
    "oscillation.index",
    "oscillation.von_neumann",
    "oscillation.high_frequency",
    "pet.energy",
    "pet.high_frequency",
)
"""Checks of one text against a reference."""

INCREASE_LIMIT = 0.05
"""An index may be five per cent above the reference's; the interval must lie above that to fail."""

DRIFT_LIMIT = float(np.log(2.0))
"""Error against position: doubling for every 1,000 tokens, in log KL per 1,000 tokens."""

_POWER_FACTOR = 2.0
_SMALLEST_KL = 1e-14


@dataclass
class Case:
    """One text: what was measured on it.

    ``from_base``: what the gates did to the base's hidden states; empty without gates.
    """

    encoded: EncodedText
    candidate: Probe | None = None
    reference: Probe | None = None
    base: Probe | None = None
    table: TokenTable | None = None
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    generated: dict[str, list[int]] = field(default_factory=dict)
    from_base: dict[str, osc.Change] = field(default_factory=dict)


def case_checks(case: Case, config: LongTextConfig, *, rope: bool) -> list[Check]:
    """Judge a text against the reference; ``rope``: whether the model has RoPE wavelengths."""
    subject = case.encoded.id
    if case.reference is None:
        reason = "there is no reference to compare with"
        return [skipped(check_id, reason, subject=subject) for check_id in COMPARING_CHECKS]
    checks = [_position_check(case, config)]
    checks += _oscillation_checks(case, config)
    if case.candidate is None:
        reason = "a GGUF file gives no hidden states and no attention weights"
        return checks + [
            skipped(check_id, reason, subject=subject)
            for check_id in (*_ATTENTION_CHECKS, "pet.energy", "pet.high_frequency")
        ]
    checks += fidelity_checks(subject, case.candidate, case.reference)
    if case.candidate.entropy is None or case.reference.entropy is None:
        reason = "the attention of this architecture cannot be measured"
        return checks + [
            skipped(check_id, reason, subject=subject) for check_id in _ATTENTION_CHECKS
        ]
    return [*checks, _layer0_check(case), _attention_check(case), _dips_check(case, rope)]


def _layer0_check(case: Case) -> Check:
    """Candidate against reference, where the reference's own gates leave layer 0 as it is."""
    assert case.candidate is not None
    assert case.reference is not None
    if case.base is not None and _layer0_gap(case.reference, case.base) > LAYER0_LIMIT_NATS:
        reason = "the rotations change layer 0's own queries or keys: nothing is left invariant"
        return skipped("phase.layer0", reason, subject=case.encoded.id)
    gap = _layer0_gap(case.candidate, case.reference)
    return judge(
        "phase.layer0",
        gap,
        LAYER0_LIMIT_NATS,
        subject=case.encoded.id,
        unit="nats",
        detail="Largest difference of layer 0's attention entropy from the reference's. No fold "
        "of an output projection can change it: a self-test of the measurement.",
    )


def _layer0_gap(one: Probe, other: Probe) -> float:
    """Largest difference of layer 0's entropies, nats."""
    assert one.entropy is not None
    assert other.entropy is not None
    return float(np.abs(one.entropy[0] - other.entropy[0]).max())


def _attention_check(case: Case) -> Check:
    """What is wrong before the softmax of a later layer, which layer 0 cannot show."""
    assert case.candidate is not None
    assert case.reference is not None
    assert case.candidate.entropy is not None
    assert case.reference.entropy is not None
    gaps = np.array(
        [
            np.abs(ours - theirs).mean()
            for ours, theirs in zip(case.candidate.entropy, case.reference.entropy, strict=True)
        ]
    )
    layer = int(gaps.argmax())
    return judge(
        "phase.attention",
        float(gaps[layer]),
        ATTENTION_LIMIT_NATS,
        subject=case.encoded.id,
        unit="nats",
        detail="Largest mean difference of a layer's attention entropy from the reference's, in "
        f"layer {layer}. Queries, keys or positions that are wrong in one layer show there, with "
        "a jump above the layer before.",
    )


def _dips_check(case: Case, rope: bool) -> Check:
    if not rope:
        reason = "the model has no RoPE, whose wavelengths this check looks for"
        return skipped("phase.dips", reason, subject=case.encoded.id)
    extra = _extra_peaks(case)
    listed = ", ".join(f"{period:.1f}" for period in extra[:5])
    return judge(
        "phase.dips",
        len(extra),
        0,
        subject=case.encoded.id,
        detail="Periods (tokens) at which the candidate's mean attention entropy dips "
        f"significantly, with twice the reference's power: {listed or 'none'}.",
    )


def _extra_peaks(case: Case) -> list[float]:
    """Significant periods that the reference lacks.

    Significance alone would flip at its threshold between two nearly equal series, so
    the candidate's power must also be twice the reference's.
    """
    ours, theirs = case.spectra[CANDIDATE], case.spectra[REFERENCE]
    extra = ours.significant & (ours.power > _POWER_FACTOR * theirs.power)
    return [float(period) for period in ours.period[extra]]


def _position_check(case: Case, config: LongTextConfig) -> Check:
    assert case.table is not None
    logs = np.log(np.maximum(case.table.columns["kl"], _SMALLEST_KL))
    trend = osc.slope(logs, resamples=config.resamples, seed=config.seed)
    return judge(
        "phase.position",
        trend.ci95[0],
        DRIFT_LIMIT,
        subject=case.encoded.id,
        unit="log nats / 1000 tokens",
        ci95=trend.ci95,
        detail=f"Lower end of the slope of ln KL over position ({trend.per_thousand:+.3f} per "
        "1,000 tokens): does the error grow along the text? The limit is a doubling.",
    )


def _oscillation_checks(case: Case, config: LongTextConfig) -> list[Check]:
    assert case.table is not None
    c = case.table.columns
    checks = []
    names = {
        "index": ("oscillation.index", "mean |Δ²|"),
        "von_neumann": ("oscillation.von_neumann", "von Neumann ratio"),
        "high_frequency": ("oscillation.high_frequency", "high-frequency share"),
    }
    changes = osc.changes(
        c["max_logit_reference"],
        c["max_logit_candidate"],
        resamples=config.resamples,
        seed=config.seed,
    )
    for name, change in changes.items():
        check_id, what = names[name]
        checks.append(
            judge(
                check_id,
                change.ci95[0],
                INCREASE_LIMIT,
                subject=case.encoded.id,
                ci95=change.ci95,
                detail=f"Lower end of the relative increase of the maximum logit's {what} "
                f"over the reference ({change.reference:.4g} → {change.candidate:.4g}).",
            )
        )
    return checks


def effect_checks(cases: Sequence[Case], record: str | None) -> list[Check]:
    """Whether the gates did to the base's hidden states what their PET record promises."""
    reason = "there are no rotations whose training could be looked for"
    return [
        effect_check(case.encoded.id, case.from_base, record)
        if case.from_base
        else skipped("pet.effect", reason, subject=case.encoded.id)
        for case in cases
    ]


def case_metrics(case: Case) -> CaseMetrics:
    """All that was measured on a text."""
    assert case.table is not None
    named = {CANDIDATE: case.candidate, REFERENCE: case.reference, BASE: case.base}
    runs = {name: run for name, run in named.items() if run is not None}
    layers = {name: layer_metrics(run) for name, run in runs.items()}
    found = case.spectra.get(CANDIDATE)
    return CaseMetrics(
        tokens=int(case.encoded.tokens.size),
        kl_mean=float(case.table.columns["kl"].mean()),
        indices={
            name: _oscillation(case.table, name)
            for name in (CANDIDATE, REFERENCE)
            if name == CANDIDATE or case.reference is not None
        },
        energy={name: by["energy"].tolist() for name, by in layers.items()} or None,
        high_frequency={name: by["high_frequency"].tolist() for name, by in layers.items()} or None,
        attention_entropy={
            name: run.entropy.mean(axis=(1, 2)).tolist()
            for name, run in runs.items()
            if run.entropy is not None
        }
        or None,
        energy_relative_to_base=case.from_base["energy"].relative if case.from_base else None,
        hidden_states_from_base=_from_base(case.from_base) if case.from_base else None,
        significant_periods=None if found is None else found.period[found.significant].tolist(),
        generation={
            name: Repeated(**repetition(tokens)._asdict())
            for name, tokens in case.generated.items()
        },
    )


def _oscillation(table: TokenTable, name: str) -> Oscillation:
    top, entropy = table.columns[f"max_logit_{name}"], table.columns[f"entropy_{name}"]
    return Oscillation(
        max_logit=Indices(**osc.indices(top)),
        entropy=Indices(**osc.indices(entropy)),
        high_variance=float(osc.high_variance(top).mean()),
    )


def _from_base(changes: dict[str, osc.Change]) -> FromBase:
    energy, high = (
        RelativeChange(relative=changes[name].relative, ci95=changes[name].ci95)
        for name in ("energy", "high_frequency")
    )
    return FromBase(energy=energy, high_frequency=high, reading=looks(changes))
