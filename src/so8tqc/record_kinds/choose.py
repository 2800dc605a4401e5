"""Choices: the files compared, what a search tried, and how fast each file is here."""

from __future__ import annotations

from typing import NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from so8tqc.record_kinds.base import Interval, Metrics, OnThisMachine
from so8tqc.record_kinds.pairs import Comparisons
from so8tqc.record_kinds.quantize import Mixture, QuantizedFile


class Row(TypedDict):
    """A file's size and quality. Intervals are of 95 %, None with too few texts.

    ``kl_99`` is the 99th percentile of the tokens' KL; ``ppl_ratio`` the file's perplexity over the
    reference's. ``survival`` is the upper end of KL(reference‖file) − KL(base‖file): the gate
    survives if it is negative.
    """

    bytes: int
    kl_mean: float
    kl_ci95: Interval | None
    kl_99: float
    kl_99_ci95: Interval | None
    top1: float
    top1_ci95: Interval | None
    ppl_ratio: float
    ppl_ratio_ci95: Interval | None
    survival: NotRequired[float]
    survives: NotRequired[bool]


class DescribedRow(Row):
    """The row with what the file is: ``types`` counts the tensors of each GGML type."""

    type: str
    path: str
    bits_per_weight: float
    types: dict[str, int]


class Tried(TypedDict):
    """One evaluated file: how it is made, what was measured, what it misses of the budget."""

    recipe: str
    purpose: str
    bytes: int
    kl_mean: float
    kl_ci95: Interval | None
    top1: float
    missed: list[str]


class Sensitivity(TypedDict):
    """A group of tensors: what storing it as the lower type does costs and saves."""

    group: str
    tensors: int
    bytes_saved: int
    kl_cost: float


class Searched(TypedDict):
    """What a search did; ``mixture`` names the one it chose, ``ended`` says why it ended.

    ``prediction`` is there where types were chosen by curvature.
    """

    low: str
    high: str
    tried: list[Tried]
    sensitivity: list[Sensitivity]
    mixture: str | None
    ended: str
    evaluations: int
    max_evaluations: int
    prediction: NotRequired[Mixture]


class Inversion(TypedDict):
    """A larger file that is further from the reference than a smaller one.

    ``supported``: whether the interval of the difference excludes zero. ``compared``: tensors that
    the two store in different types; ``worse`` of them have the larger weight error in the
    larger file. ``four_bit_share``: of the worse ones' blocks of 32 weights in the input, the share
    that holds at most 16 distinct values.
    """

    smaller: str
    larger: str
    difference: float
    ci95: Interval | None
    supported: bool
    compared: int
    worse: int
    error_smaller: float | None
    error_larger: float | None
    types_smaller: list[str]
    types_larger: list[str]
    fallbacks: int
    columns: list[int]
    block: int | None
    four_bit_share: float | None
    sentence: str


class ChooseMetrics(Metrics):
    """Of kind ``choose``.

    Attributes:
        rows: type → file, the smallest first.
        files: name → file as in the record of ``quantize``; not of a choice in a run, where that
            record has them, as that of ``qc`` has the comparisons.
        recommended, reason: the type to take, and a sentence.
        budget: in words.
    """

    rows: dict[str, DescribedRow]
    files: dict[str, QuantizedFile] = Field(default={})
    recommended: str | None
    reason: str | None
    inversions: list[Inversion]
    comparisons: Comparisons | None = None
    texts: int | None
    tokens: int | None
    budget: str | None = None
    search: Searched | None = None


class Rate(TypedDict):
    """Tokens per second: the median of the repeats, the slowest and the fastest."""

    median: float
    low: float
    high: float


class Speed(TypedDict):
    """Reading a prompt in one batch, and adding tokens one by one."""

    prompt: Rate
    generation: Rate


class Speeds(TypedDict):
    """Of every file by its type; ``threads`` is None for libllama's default."""

    files: dict[str, Speed]
    prompt_tokens: int
    new_tokens: int
    repeats: int
    threads: int | None
    cores: int | None


class ChooseMeasured(OnThisMachine):
    """Of kind ``choose``."""

    speed: Speeds | None
