"""Quality controls: statistics of each candidate, the error's parts, the gates' survival."""

from __future__ import annotations

from pydantic import Field
from typing_extensions import TypedDict

from so8tqc.record_kinds.base import Entry, Interval, Metrics
from so8tqc.record_kinds.pairs import Comparisons
from so8tqc.record_kinds.tensors import TensorRow


class Statistics(Entry):
    """What ``metrics.divergence.summarise`` says of a token table, by its names."""

    tokens: int | None
    texts: int | None
    kl_mean: float | None
    kl_max: float | None
    kl_min: float | None
    kl_percentiles: dict[str, float]
    kl_reverse_mean: float | None
    js_mean: float | None
    top1: float | None
    top5_overlap: float | None
    dp_mean: float | None
    dp_max: float | None
    dp_min: float | None
    dp_percentiles: dict[str, float]
    dp_rms: float | None
    nll_reference: float | None
    nll_candidate: float | None
    ppl_reference: float | None
    ppl_candidate: float | None
    ln_ppl_ratio: float | None
    nll_correlation: float | None
    accuracy_reference: float | None
    accuracy_candidate: float | None
    entropy_reference: float | None
    entropy_candidate: float | None
    entropy_difference: float | None
    max_abs: float | None
    mean_abs: float | None
    rms: float | None


class Histogram(Entry):
    """Tokens by log₁₀ of their KL."""

    log10_centres: list[float]
    counts: list[float]


class WorstToken(TypedDict):
    """One prediction that went wrong.

    ``before`` and ``token`` are the text up to the predicting token and the token that really
    follows, both "" without a tokenizer; ``p_reference`` and ``p_candidate`` are its
    probabilities; ``same_top`` says whether both models' most likely token is the same.
    """

    text: str
    position: int
    before: str
    token: str
    kl: float
    p_reference: float
    p_candidate: float
    same_top: bool


class Apart(Entry):
    """Statistics of tokens that no picture conditions (None if there are none), and of others."""

    text: Statistics | None
    images: Statistics


class Routing(Entry):
    """Statistics of tokens whose experts rounding may choose otherwise, and of the others.

    Attributes:
        ties: of the former.
        others: None if there are none.
        apart: whether the candidate is judged by the others alone.
    """

    ties: Statistics
    others: Statistics | None
    apart: bool


class Bucket(Entry):
    """Tokens by the reference's largest probability, from ``low`` up to ``high``."""

    low: float
    high: float
    tokens: int
    share: float
    kl_mean: float | None
    kl_ci95: Interval | None
    top1: float | None
    top1_ci95: Interval | None


class Candidate(Statistics):
    """A candidate's statistics, calibration, and the tokens where it is furthest away.

    Attributes:
        apart: where texts have pictures, the statistics of the two kinds of tokens.
        routing: where rounding may turn the choice of experts, likewise.
        confidence: where the reference is sure, and where it is not.
        kv_type: what its cache is stored as, where that was asked for.
    """

    ece_reference: float | None
    brier_reference: float | None
    ece_candidate: float | None
    brier_candidate: float | None
    kl_histogram: Histogram | None
    worst_tokens: list[WorstToken]
    confidence: list[Bucket] = Field(default=[])
    kv_type: str | None = None
    apart: Apart | None = None
    routing: Routing | None = None


class Look(TypedDict):
    """One look: texts so far, and the widest interval of a candidate's mean KL, nats."""

    texts: int
    width: float | None


class Split(Entry):
    """A model directory's distance from the exact fold, and the dtype that it is stored in."""

    algebra_relative_error: float | None
    storage: str | None


class GGUFReading(Entry):
    """The two readings of a GGUF, mean KL in nats per token.

    ``weights``: of its dequantized weights, run by transformers, from the reference; ``libllama``:
    of the file as libllama runs it; ``runtime``: from its weights to what libllama makes of them.
    ``libllama`` is None where the file was judged by its weights alone.
    """

    weights: float
    libllama: float | None = None
    runtime: float | None = None


class LayerWeight(TypedDict):
    """One attention output weight Q of a GGUF.

    ``error``: ‖Q − W'‖/‖W'‖ with W' the right fold; ``to_base``: ‖Q − W‖/‖W‖; ``rotation``:
    ‖W' − W‖/‖W‖, what the gate changes. The gate is larger than the quantization where
    rotation > error.
    """

    type: str
    error: float
    to_base: float
    rotation: float


class RecoveredLayer(TypedDict):
    """What was recovered from one weight.

    ``residual``: largest ‖M_k·B̂_k − M'_k‖ of a block, relative to what rounding leaves;
    ``angle_max``: radians; ``determinant``: smallest of a block; ``distance``: largest
    ‖B̂_k − B_k‖_F from the rotation that was expected, None if none was.
    """

    residual: float
    angle_max: float
    determinant: float
    distance: float | None


class Recorded(Entry):
    """What a capture holds; ``gated``: base plus rotations against it, where they were given."""

    texts: int
    tokens: int
    dtype: str
    source: str
    gated: Statistics | None = None


class Sequential(Entry):
    """Texts were taken until the mean KL's interval was narrow enough.

    ``looks``: numbers of texts at which that was asked, with the widest candidate's interval;
    ``planned``: all that there could have been; ``level``: of each interval, so that those of all
    looks hold together with 95 %; ``reached``: whether it became as narrow as ``until``.
    """

    until: float
    texts: int
    given: int
    planned: list[int]
    looks: list[Look]
    level: float
    reached: bool


class QCMetrics(Metrics):
    """Of kind ``qc``; all but the profile only where it could be measured.

    Attributes:
        split: candidate → what its error is made of.
        readings: GGUF whose weights were run by themselves → both readings.
        survival: GGUF → layer → weight.
        tensors: GGUF → its tensors, in its order.
        recovered: target → rotation recovered from a candidate.
        effect, noise_floor, arithmetic: base, our own rounded fold, and float32 against float64.
        candidates: name → statistics.
        capture: the reference, where it is one.
        comparisons: of every two candidates.
        sequential: when texts were no longer taken, with ``until``.
        kept: comparison that an earlier call computed → when, UTC.
    """

    profile: str | None
    split: dict[str, Split] = Field(default={})
    readings: dict[str, GGUFReading] = Field(default={})
    survival: dict[str, dict[str, LayerWeight]] = Field(default={})
    tensors: dict[str, list[TensorRow]] = Field(default={})
    recovered: dict[str, RecoveredLayer] = Field(default={})
    effect: Statistics | None = None
    noise_floor: Statistics | None = None
    arithmetic: Statistics | None = None
    candidates: dict[str, Candidate] = Field(default={})
    capture: Recorded | None = None
    comparisons: Comparisons | None = None
    sequential: Sequential | None = None
    kept: dict[str, str] = Field(default={})
