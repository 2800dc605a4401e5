"""Quantizations: the files, what an importance matrix covers, and how to make the files again."""

from __future__ import annotations

from pydantic import JsonValue

from so8tqc.record_kinds.base import Entry, Metrics, OnThisMachine
from so8tqc.records import Frozen


class Fallback(Entry):
    """A tensor in another type than the recipe's: its columns are no multiple of ``block``."""

    wanted: str | None
    stored: str
    columns: int
    block: int


class QuantizedTensor(Entry):
    """One tensor of an output; ``relative_error`` is ‖Q − W‖/‖W‖, None where W is zero."""

    type: str
    bits_per_weight: float
    relative_error: float | None
    fallback: Fallback | None


class Recipe(Entry):
    """The options of ``so8tqc quantize`` that make a mixture; ``words`` say it."""

    type: str
    tensor_types: list[str]
    words: str


class QuantizedFile(Entry):
    """One output.

    Attributes:
        type: the recipe, e.g. ``Q5_K_M``.
        types: GGML type → tensors.
        fallbacks: tensor → type, where the columns forbid the recipe's.
        layer_error, attention_output_error: layer → ‖Q − W‖/‖W‖.
        recipe: of a mixture that ``choose`` has found, or ``--max-size``.
    """

    type: str | None
    path: str | None
    bytes: int | None
    bits_per_weight: float | None
    types: dict[str, int]
    fallbacks: dict[str, str] | None
    tensors: dict[str, QuantizedTensor]
    layer_error: dict[int, float]
    attention_output_error: dict[int, float]
    recipe: Recipe | None = None

    @property
    def options(self) -> dict[str, JsonValue]:
        """Of ``quantize``: those that make this file alone, where they are not those of all."""
        made: dict[str, JsonValue] = {"types": [self.type]}
        if self.recipe is not None:
            made |= {"tensor_types": list(self.recipe.tensor_types), "max_size": None}
        return made


class Build(Frozen):
    """A build of libllama on a machine.

    Attributes:
        version: of llama-cpp-python.
        libraries: SHA-256 over the digests of its shared libraries.
        cpu: the CPU features that its kernels use, as libllama says it.
    """

    version: str
    libraries: str
    cpu: str


class Derivation(Frozen):
    """What the record of ``quantize`` needs beyond its inputs and options.

    Attributes:
        build: of libllama.
        tensors: file name → tensor → SHA-256 of its stored bytes.
    """

    build: Build
    tensors: dict[str, dict[str, str]]


class Coverage(Entry):
    """What an importance matrix covers.

    Attributes:
        tensors: how many it knows.
        chunks: of the text that it was computed from.
        without: tensors that it says nothing about.
        silent_columns, unseen_experts: tensor → number.
    """

    tensors: int
    chunks: int
    without: list[str]
    silent_columns: dict[str, int]
    unseen_experts: dict[str, int]


class SolvedTensor(Entry):
    """One tensor that was solved for; errors are ‖(W − Q) x‖ / ‖W x‖ over the calibration tokens.

    Attributes:
        type: GGML type.
        damping: that was chosen, a share of the mean second moment.
        libllama: the error of the bytes that were replaced.
        solved: the error of those that took their place.
    """

    type: str
    damping: float
    libllama: float
    solved: float


class SolvedFile(Entry):
    """What was solved for in a file; ``left``: tensor → type, of those with libllama's bytes."""

    tensors: dict[str, SolvedTensor]
    left: dict[str, str]


class Solver(Entry):
    """What ``--solver hessian`` did: its version, and name → file."""

    version: int
    files: dict[str, SolvedFile]


class Family(Entry):
    """Tensors whose predicted KL was off by the same factor, as a probe of some has shown.

    Attributes:
        tensors: that were probed.
        predicted_kl, measured_kl: of these in the recipe's types, nats.
        factor: the one over the other.
    """

    tensors: int
    predicted_kl: float
    measured_kl: float
    factor: float


class Chosen(Entry):
    """A tensor whose type was chosen; ``kl``: candidate type → KL that it is predicted to cost."""

    type: str
    kl: dict[str, float]


class Mixture(Entry):
    """Types of single tensors, chosen so that a file of at most ``max_bytes`` loses least.

    Attributes:
        max_bytes, bytes: asked for, and of the file.
        smallest, largest: what the smallest and the largest types of all tensors would take.
        tokens: of calibration text, on which KL was measured.
        predicted_kl, measured_kl: of the file's weights from the unquantized ones, nats.
        prediction_error: the one over the other, less 1; None where nothing is lost.
        evaluations: models that were run for it, but for the unquantized one.
        families: name → the factor of its predictions.
        tensors: name → the type chosen, and what others would cost.
        given: tensor → the type that it has by the recipe, or by what was asked for it.
    """

    max_bytes: int
    bytes: int
    smallest: int
    largest: int
    tokens: int
    predicted_kl: float
    measured_kl: float
    prediction_error: float | None
    evaluations: int
    families: dict[str, Family]
    tensors: dict[str, Chosen]
    given: dict[str, str]


class QuantizeMetrics(Metrics):
    """Of kind ``quantize``: name → file; ``library``: version of llama-cpp-python."""

    files: dict[str, QuantizedFile]
    derivation: Derivation | None
    library: str | None
    imatrix: Coverage | None = None
    solver: Solver | None = None
    mixture: Mixture | None = None


class Workers(Entry):
    """How many files are made at a time, the threads of each, and the bytes that each may need."""

    count: int
    threads: int
    bytes: int


class QuantizeMeasured(OnThisMachine):
    """Of kind ``quantize``."""

    workers: Workers | None
