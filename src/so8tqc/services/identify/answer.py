"""From evidence to an answer: which reading is the trained one, or why that cannot be said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from so8tqc.metrics.bootstrap import LEAST_TEXTS
from so8tqc.rotations.readings import FACTS, Reading
from so8tqc.services.identify.by_capture import CaptureEvidence
from so8tqc.services.identify.by_text import Differences, Rival, TextEvidence
from so8tqc.services.identify.candidates import Candidate, Candidates
from so8tqc.services.identify.walk import NONE

_TIES = 3
"""Readings that a sentence compares with the most likely one."""

_CAPTURE = "A capture tells (so8tqc identify … --capture FILE, docs/capture.md)"


@dataclass(frozen=True)
class Answer:
    """Which reading is the trained one.

    Attributes:
        identified: it; None if it was not found.
        sentence: what was found, with the numbers that it rests on.
        by: ``capture`` or ``text``, and ``statement`` where the file's word decided between
            readings that these do not tell apart.
        states: reading → ``identified``, ``possible``, ``refuted``.
        reasons: reading → why it is refuted.
        supported: how many readings the evidence supports.
    """

    identified: Candidate | None
    sentence: str
    by: tuple[str, ...]
    states: Mapping[str, str]
    reasons: Mapping[str, str]
    supported: int


def certain_facts(answer: Answer, known: Candidates) -> dict[str, str]:
    """Fact → word, where every reading that the evidence supports agrees on it."""
    if not answer.supported:
        return {}
    left = [c.reading for c in known.different if answer.states[c.name] != "refuted"]
    if answer.identified is not None:
        left = [answer.identified.reading]
    words = {fact: {str(getattr(reading, fact)) for reading in left} for fact in FACTS}
    return {fact: found.pop() for fact, found in words.items() if len(found) == 1}


def answer_by_text(found: TextEvidence, known: Candidates) -> Answer:
    """What a text says."""
    by_name = {candidate.name: candidate for candidate in known.different}
    remaining = [by_name[name] for name in found.remaining]
    if not remaining:
        return _unknown("text", _nothing_helps(found), by_name, (), found.refuted, 0)
    best = remaining[0]
    if not found.differences.less(best.name, NONE):
        sentence = _no_gain(best, found)
        return _unknown("text", sentence, by_name, found.remaining, found.refuted, 0)
    chosen, by = _choose(remaining, known.stated, ("text",))
    if chosen is not None and not found.differences.less(chosen.name, NONE):
        chosen = None
    others = [candidate.name for candidate in remaining if candidate is not (chosen or best)]
    if chosen is None:
        sentence = _cannot_tell("This text", best.name, others, found.differences, "NLL")
        sentence += _one_path(remaining)
        return _unknown("text", sentence, by_name, found.remaining, found.refuted, len(remaining))
    measured = found.measured[chosen.name]
    sentence = (
        f"The gates are {chosen.name}: they lower the text's NLL by "
        f"{_with(measured.gain, measured.gain_ci95)} nats per token{_runner_up(chosen, found)}"
    )
    if others:
        sentence += (
            f". That they are {chosen.reading.parametrization} is the file's own word: the text "
            f"does not tell it from {_listed(others)}"
        )
    return _known(chosen, sentence + ".", by, by_name, others, found.refuted)


def answer_by_capture(found: CaptureEvidence, known: Candidates) -> Answer:
    """What recorded logits say."""
    by_name = {candidate.name: candidate for candidate in known.different}
    nearest, kl = found.nearest, found.distances[found.nearest]
    together = (nearest, *found.alike)
    reasons = {
        name: f"KL from the recorded logits {found.distances[name].kl:.3g} nats"
        for name in by_name
        if name not in together
    }
    if not found.agrees:
        if nearest == NONE:
            said = "The base without gates is nearer to the recorded logits than every reading"
        else:
            said = f"No reading agrees with the recorded logits; the nearest is {nearest}"
        sentence = (
            f"{said}: KL {_with(kl.kl, kl.ci95)} nats per token, where at most {found.limit:.0e} "
            f"is rounding, and the base without gates has {found.distances[NONE].kl:.3g}. "
            "Something else was trained too, or the gates are of another step or model."
        )
        return _unknown("capture", sentence, by_name, (), dict.fromkeys(by_name, "far away"), 0)
    if NONE in together:
        return _unknown("capture", _no_gates(found), by_name, found.alike, reasons, 0)
    chosen, by = _choose([by_name[name] for name in together], known.stated, ("capture",))
    others = [name for name in together if chosen is None or name != chosen.name]
    if chosen is None:
        sentence = _cannot_tell("This capture", nearest, others[1:], found.differences, "KL")
        return _unknown("capture", sentence, by_name, together, reasons, len(together))
    kl = found.distances[chosen.name]
    second = min(
        (name for name in found.distances if name not in together),
        key=lambda name: found.distances[name].kl,
        default=None,
    )
    sentence = (
        f"The gates are {chosen.name}: KL from the recorded logits {_with(kl.kl, kl.ci95)} nats "
        "per token"
    )
    if second is not None:
        sentence += f"; the next is {second} with {found.distances[second].kl:.3g}"
    if others:
        sentence += f". The file's own word decides between it and {_listed(others)}"
    if found.coarse:
        sentence += (
            f". That is more than rounding ({found.limit:.0e}): the training computed in 16 bits, "
            "or something small beside the gates was trained"
        )
    return _known(chosen, sentence + ".", by, by_name, others, reasons)


def _choose(
    remaining: Sequence[Candidate], stated: Reading | None, by: tuple[str, ...]
) -> tuple[Candidate | None, tuple[str, ...]]:
    """The only one; or of one path the one that the file states.

    Readings of one path differ in how far they turn alone, which is all that the file's word may
    decide: what it says of convention and site has to be confirmed.
    """
    if len(remaining) == 1:
        return remaining[0], by
    paths = {(c.reading.convention, c.reading.site) for c in remaining}
    for candidate in remaining:
        if len(paths) == 1 and candidate.means(stated):
            return candidate, (*by, "statement")
    return None, by


def _known(
    chosen: Candidate,
    sentence: str,
    by: tuple[str, ...],
    by_name: Mapping[str, Candidate],
    others: Sequence[str],
    reasons: Mapping[str, str],
) -> Answer:
    states = dict.fromkeys(by_name, "refuted") | dict.fromkeys(others, "possible")
    return Answer(chosen, sentence, by, states | {chosen.name: "identified"}, reasons, 1)


def _unknown(
    by: str,
    sentence: str,
    by_name: Mapping[str, Candidate],
    remaining: Sequence[str],
    reasons: Mapping[str, str],
    supported: int,
) -> Answer:
    states = {name: "possible" if name in remaining else "refuted" for name in by_name}
    return Answer(None, sentence, (by,), states, reasons, supported)


def _nothing_helps(found: TextEvidence) -> str:
    best = min(
        (name for name in found.measured if name != NONE), key=lambda n: found.measured[n].nll
    )
    measured = found.measured[best]
    return (
        "No reading lowers the NLL of this text; the nearest to doing so is "
        f"{best} with {_with(-measured.gain, _negated(measured.gain_ci95))} nats per token more "
        f"than without gates. It is no text that the gates were trained on, or they were not "
        f"trained: give --data with text of the training. {_CAPTURE}."
    )


def _no_gain(best: Candidate, found: TextEvidence) -> str:
    rival = found.differences.of(best.name, NONE)
    if rival.ci95 is None:
        return (
            f"Fewer than {LEAST_TEXTS} texts differ, so that nothing can be told: give more "
            "--data, or a smaller --ctx."
        )
    return (
        f"This text cannot tell {best.name} from no gates at all: their NLL differs by "
        f"{_with(rival.difference, rival.ci95)} nats per token{_needed(rival)}. Give text of the "
        f"training, or more of it. {_CAPTURE}."
    )


def _cannot_tell(
    what: str, best: str, others: Sequence[str], differences: Differences, measure: str
) -> str:
    """``This text cannot tell X from Y``, with what each difference is and would need."""
    parts = [
        f"{other} ({measure} differs by {_with(rival.difference, rival.ci95)}{_needed(rival)})"
        for other in others[:_TIES]
        for rival in (differences.of(best, other),)
    ]
    more = f" and {len(others) - _TIES} more" if len(others) > _TIES else ""
    return f"{what} cannot tell {best} from {'; '.join(parts)}{more}."


def _one_path(remaining: Sequence[Candidate]) -> str:
    """What is certain all the same, where the readings differ in the parametrization alone."""
    reading = remaining[0].reading
    if {(c.reading.convention, c.reading.site) for c in remaining} != {
        (reading.convention, reading.site)
    }:
        return f" {_CAPTURE}."
    return (
        f" Convention {reading.convention} and site {reading.site} are certain. These readings "
        "turn the same way, and not equally far, and which distance is the better one says how "
        "long was trained, not how the file was meant. State --parametrization if you know it. "
        f"{_CAPTURE}."
    )


def _no_gates(found: CaptureEvidence) -> str:
    if found.nearest == NONE and not found.alike:
        return (
            "The recorded logits are the base's own (KL "
            f"{found.distances[NONE].kl:.3g}): no gate turned anything when they were recorded."
        )
    names = [name for name in (found.nearest, *found.alike) if name != NONE]
    return (
        f"This capture cannot tell {_listed(names)} from no gates at all: the gates change less "
        "than rounding does."
    )


def _runner_up(chosen: Candidate, found: TextEvidence) -> str:
    """The best reading that is refuted, and by how much."""
    refuted = sorted(found.refuted, key=lambda name: found.measured[name].nll)
    if not refuted:
        return ""
    rival = found.differences.of(refuted[0], chosen.name)
    return f", {_with(rival.difference, rival.ci95)} more than {refuted[0]} does"


def _needed(rival: Rival) -> str:
    return "" if rival.needed is None else f"; about {_round(rival.needed)} tokens would tell"


def _round(tokens: int) -> str:
    """Two digits: it is an estimate."""
    return f"{float(f'{tokens:.1e}'):,.0f}" if tokens < 1e12 else "10¹² or more"


def _with(value: float, ci95: tuple[float, float] | None) -> str:
    return f"{value:.3g}" if ci95 is None else f"{value:.3g} ({ci95[0]:.3g} … {ci95[1]:.3g})"


def _negated(ci95: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if ci95 is None else (-ci95[1], -ci95[0])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _TIES} more" if len(names) > _TIES else ""
    return "; ".join(names[:_TIES]) + more
