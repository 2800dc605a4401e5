"""A capture as the reference of qc: its vocabulary, what it says of itself, what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from so8tqc.errors import ModelError
from so8tqc.gguf.file import is_gguf
from so8tqc.metrics.divergence import TokenTable, summarise
from so8tqc.record_kinds.qc import Recorded, Statistics
from so8tqc.records import Check, judge, skipped
from so8tqc.services.qc.judging import EFFECT_FACTOR, SMALLEST_EFFECT
from so8tqc.sources.capture import VOCABULARY_KEY, Capture, vocabulary_digest
from so8tqc.sources.inputs.texts import load_tokenizer


def vocabulary_checks(recorded: Capture, candidates: Mapping[str, Path]) -> list[Check]:
    """``structure.vocabulary``: does a candidate's tokenizer give the recorded tokens their ids?

    GGUF candidates are left out, as their tokenizer is of libllama's own making.
    """
    return [
        _vocabulary_check(recorded, name, path)
        for name, path in candidates.items()
        if not is_gguf(path)
    ]


def _vocabulary_check(recorded: Capture, name: str, path: Path) -> Check:
    check_id = "structure.vocabulary"
    if not recorded.vocabulary_sha256:
        return skipped(check_id, f"The capture has no {VOCABULARY_KEY}.", subject=name)
    try:
        digest = vocabulary_digest(load_tokenizer(path))
    except ModelError as error:
        return skipped(check_id, str(error), subject=name)
    return judge(
        check_id,
        float(digest != recorded.vocabulary_sha256),
        0.0,
        comparison="==",
        subject=name,
        detail="Whether the tokenizer's vocabulary differs from the recorded one.",
    )


def capture_metrics(recorded: Capture, to_gated: TokenTable | None) -> Recorded:
    """What was recorded.

    Args:
        recorded: the reference.
        to_gated: base plus rotations against it, where they were given.
    """
    return Recorded(
        texts=len(recorded.texts),
        tokens=recorded.tokens,
        dtype=str(recorded.dtype).removeprefix("torch."),
        source=recorded.source,
        gated=None if to_gated is None else Statistics.model_validate(summarise(to_gated)),
    )


def capture_notices(to_gated: TokenTable | None, floor: TokenTable | None) -> list[str]:
    """What the user of a capture should know: no floor, or other rotations than recorded."""
    if to_gated is None:
        return [
            "The reference is a capture, so that no noise floor was measured: targets are the "
            "limits. Give --base and --rotations to have it measured, and the files checked."
        ]
    if not disagrees(to_gated, floor):
        return []
    distance = float(to_gated.columns["kl"].mean())
    return [
        f"Base and rotations, as read here, are {distance:.3g} nats from the capture: what was "
        "recorded had another convention, parametrization, site or weights, or computed in 16 bits."
    ]


def disagrees(to_gated: TokenTable, floor: TokenTable | None) -> bool:
    """Whether base plus rotations are farther from the recorded logits than noise explains.

    Args:
        to_gated: base plus rotations against the capture.
        floor: the candidates' noise floor, None without any.
    """
    distance = float(to_gated.columns["kl"].mean())
    noise = 0.0 if floor is None else float(floor.columns["kl"].mean())
    return distance > max(SMALLEST_EFFECT, EFFECT_FACTOR * noise)
