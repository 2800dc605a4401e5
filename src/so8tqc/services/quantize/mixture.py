"""Types of single tensors, chosen so that a file of at most so many bytes loses least.

1. *Prices*: what an error in each tensor costs, from second moments and one pass of gradients
   (``pricing``); and with them what each tensor costs in each type that its width allows, from
   some of its rows.
2. *Probes*: the tensors of every fourth layer, family by family (keys, the rest of attention,
   down projections, the rest of the feed-forward, and what is in no layer), in the types of the
   recipe. The KL of the weights over what was predicted is the family's factor.
3. *Choice*: with KL the sum of what the tensors cost, a knapsack (``quantizers.knapsack``).
4. *Confirmation*: the KL of the file that was made, beside the predicted one.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from so8tqc import wording
from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.config import QuantizeConfig
from so8tqc.errors import DataError, InputError, ModelError
from so8tqc.gguf.file import GGUFFile, GGUFTensor, aligned, block_layout, open_gguf
from so8tqc.llama.quantizer import PlannedTensor
from so8tqc.llama.vendor import find_converter
from so8tqc.progress import SILENT, Progress
from so8tqc.quantizers.grids import GRIDS
from so8tqc.quantizers.hessians import MomentsFile
from so8tqc.quantizers.knapsack import Option, cheapest
from so8tqc.quantizers.solve import solve
from so8tqc.record_kinds.quantize import Chosen, Family, Mixture
from so8tqc.records import Check, judge
from so8tqc.services.quantize.calibration import calibration_texts
from so8tqc.services.quantize.hessians import model_directory, require_same_weights
from so8tqc.services.quantize.pricing import Price, priced_tensors, prices, sampled_costs
from so8tqc.services.quantize.proof import PLAIN_TYPES
from so8tqc.services.quantize.recipe import EMBEDDING, HEAD
from so8tqc.services.quantize.solver import decoded, weights_of
from so8tqc.sources.hf import HFModel
from so8tqc.sources.inputs.texts import concatenated, encode_plain, load_tokenizer
from so8tqc.sources.moments import chunks_of
from so8tqc.sources.protocol import EncodedText
from so8tqc.sources.sensitivity import sensitivities
from so8tqc.sources.variants import Variants

RECIPE = "Q4_K_M"
"""Of a file for which none is given: its name, and the types of what is not chosen."""

CHUNKS, CHUNK_TOKENS = 8, 256
"""Calibration text that gradients and KL are of: 2,048 tokens."""

_PROBED = 4
"""Every fourth layer is probed."""

_BLOCK = re.compile(r"^blk\.(\d+)\.([^.]+)")
_OF_WIDE_ROWS = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_OF_OTHER_ROWS = ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_NEW_KEY = 64
"""Bytes of a key-value that libllama may add, at most."""


def require_tools_to_choose(config: QuantizeConfig) -> None:
    """See that the model directory and the converter are here, without which nothing is chosen.

    Raises:
        InputError: nothing says which directory it is.
        ModelError: it is no model directory.
        MissingToolError: there is no converter.
    """
    open_checkpoint(model_directory(config.model, config.gguf))
    find_converter()


class TooSmallError(InputError):
    """A size that no mixture of types has."""


def candidates(source: GGUFTensor) -> tuple[str, ...]:
    """The types that a tensor may have: for rows of whole super-blocks those, else blocks of 32."""
    columns = source.shape[-1]
    return _OF_WIDE_ROWS if columns % GRIDS["Q4_K"].block == 0 else _OF_OTHER_ROWS


def choosable(
    config: QuantizeConfig, source: GGUFFile, planned: Mapping[str, PlannedTensor]
) -> tuple[str, ...]:
    """Matrices that the recipe quantizes and whose type nobody has asked for."""
    asked = [text.rpartition("=")[0] for text in config.tensor_types]
    head = HEAD if HEAD in planned else EMBEDDING
    given = {
        name
        for name, type_ in (
            (head, config.output_tensor_type),
            (EMBEDDING, config.token_embedding_type),
        )
        if type_ is not None
    }
    return tuple(
        name
        for name, tensor in planned.items()
        if tensor.type not in PLAIN_TYPES
        and len(source.tensors[name].shape) == 2
        and name not in given
        and not any(re.search(pattern, name) for pattern in asked)
    )


def stored_bytes(tensor: GGUFTensor, type_: str) -> int:
    """Bytes that a tensor takes in a file, padding included."""
    from gguf import GGUF_DEFAULT_ALIGNMENT

    block, size = block_layout(type_)
    return aligned(tensor.elements // block * size, GGUF_DEFAULT_ALIGNMENT)


@dataclass(frozen=True)
class Room:
    """What a file's size leaves for the tensors whose types are chosen.

    Attributes:
        limit: bytes that the file may have.
        taken: bytes of all else: keys, and tensors whose types are given.
        sizes: tensor → type → bytes.
    """

    limit: int
    taken: int
    sizes: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(
        cls,
        limit: int,
        source: GGUFFile,
        planned: Mapping[str, PlannedTensor],
        chosen: Sequence[str],
    ) -> Room:
        """The room for ``chosen``, in a file that has everything else as planned.

        Raises:
            TooSmallError: the smallest types do not fit.
            InputError: there are no tensors to choose types of.
        """
        if not chosen:
            raise InputError(
                "there is no matrix whose type could be chosen: the recipe quantizes none, or the "
                "types of all are given",
                where=str(source.path),
                remedy="Give a --type that quantizes, and fewer --tensor-type.",
            )
        header = source.size - sum(stored_bytes(t, t.type) for t in source.tensors.values())
        others = (stored_bytes(source.tensors[n], planned[n].type) for n in planned.keys() - chosen)
        sizes = {
            name: {
                t: stored_bytes(source.tensors[name], t) for t in candidates(source.tensors[name])
            }
            for name in chosen
        }
        room = cls(limit, header + 2 * _NEW_KEY + sum(others), sizes)
        if room.smallest > limit:
            raise TooSmallError(
                f"no mixture of types is as small as {wording.size(limit)}: the smallest has "
                f"{wording.size(room.smallest)} ({room.smallest} bytes)",
                where=str(source.path),
                remedy=f"Give --max-size {room.smallest} or more.",
            )
        return room

    @property
    def smallest(self) -> int:
        """Bytes of the file with the smallest types."""
        return self.taken + sum(min(sizes.values()) for sizes in self.sizes.values())

    @property
    def largest(self) -> int:
        """Bytes of the file with the largest types."""
        return self.taken + sum(max(sizes.values()) for sizes in self.sizes.values())


class Chooser:
    """Everything that predictions of a file's KL need.

    Args:
        config: of ``quantize``.
        source: the unquantized file.
        directory: the model directory that it was exported from.
        moments: of its matrices' inputs.
        progress: told about the work.

    Raises:
        ModelError: the directory is not the file's.
        DataError: the calibration text is shorter than a chunk.
        MissingToolError: there is no converter.
    """

    def __init__(
        self,
        config: QuantizeConfig,
        source: GGUFFile,
        directory: Path,
        moments: MomentsFile,
        progress: Progress = SILENT,
    ) -> None:
        self._source, self._progress = source, progress
        self._moments = moments
        self._workers = config.threads or os.cpu_count() or 1
        self._names = require_same_weights(open_checkpoint(directory), source, progress)
        texts = calibration_texts(config.hessian_data)
        ids, bos = encode_plain(concatenated(texts), load_tokenizer(directory))
        model = HFModel.load(directory)
        try:
            self._chunks = chunks_of(ids, bos, min(CHUNK_TOKENS, model.context), CHUNKS)
            if not self._chunks:
                raise DataError(
                    f"the text has {ids.size} tokens, too few to measure KL on",
                    where=", ".join(config.hessian_data),
                    remedy="Give more calibration text (--hessian-data).",
                )
            self._sensitive = sensitivities(model, self._chunks, progress)
        finally:
            model.close()
        judging = [EncodedText(f"calibration/{i}", c) for i, c in enumerate(self._chunks)]
        self._variants = Variants(source, directory, judging)

    def choose(self, limit: int, planned: Mapping[str, PlannedTensor], free: Sequence[str]) -> Plan:
        """The types of the mixture that is predicted to lose least.

        Args:
            limit: bytes of the file.
            planned: the recipe's types.
            free: the tensors whose types may be chosen.

        Raises:
            TooSmallError: nothing is as small.
            ModelError: of no tensor it is known what errors cost.
        """
        costs: dict[str, dict[str, float]] = {}
        probed: dict[str, GGUFTensor] = {}
        predicted: dict[str, float] = {}
        known = (self._source, self._moments, self._sensitive, self._names)
        priced = priced_tensors(*known)
        free = [name for name in free if name in priced]
        if not free:
            raise ModelError(
                "of none of its tensors it is known what errors cost",
                where=str(self._source.path),
                remedy="Give the model directory that it was exported from (--model).",
            )
        wanted = _probed(free)
        with self._progress.task("predicting", total=len(free), unit="tensors") as task:
            for price in prices(*known):
                if price.name not in free:
                    continue
                types = candidates(self._source.tensors[price.name])
                costs[price.name] = sampled_costs(price, self._source, types, self._workers)
                if price.name in wanted:
                    type_ = _nearest(self._source.tensors[price.name], planned[price.name].type)
                    tensor, nats = self._probe(price, type_)
                    probed[price.name], predicted[price.name] = tensor, nats
                task.advance(1, item=price.name)
        families = self._families(probed, predicted)
        room = Room.of(limit, self._source, planned, tuple(costs))
        kl = {
            name: {type_: nats * families[_family(name)].factor for type_, nats in of.items()}
            for name, of in costs.items()
        }
        options = {
            name: [Option(type_, room.sizes[name][type_], cost) for type_, cost in of.items()]
            for name, of in kl.items()
        }
        chosen = cheapest(options, limit - room.taken)
        return Plan(
            room,
            families,
            {name: Chosen(type=o.type, kl=kl[name]) for name, o in chosen.items()},
            {
                n: t.type
                for n, t in planned.items()
                if n not in chosen and t.type not in PLAIN_TYPES
            },
        )

    def _probe(self, price: Price, type_: str) -> tuple[GGUFTensor, float]:
        """A tensor solved for by the sweep alone, and the nats that its errors should cost."""
        before = self._source.tensors[price.name]
        weights = weights_of(self._source, price.name)
        stored = solve(weights, price.curvature, type_, passes=0, threads=self._workers).stored
        delta = (weights - decoded(stored, type_, weights.shape)).astype(np.float64)
        made = GGUFTensor(price.name, type_, before.shape, stored.nbytes, 0, stored)
        return made, price.nats(delta, len(weights))

    def _families(
        self, probed: Mapping[str, GGUFTensor], predicted: Mapping[str, float]
    ) -> dict[str, Family]:
        members: dict[str, dict[str, GGUFTensor]] = {}
        for name, tensor in probed.items():
            members.setdefault(_family(name), {})[name] = tensor
        measured = self._variants.kl(members, self._progress)
        found = {}
        for family, tensors in members.items():
            sum_ = sum(predicted[name] for name in tensors)
            kl = max(measured[family], 0.0)
            factor = kl / sum_ if sum_ > 0 else 1.0
            found[family] = Family(
                tensors=len(tensors), predicted_kl=sum_, measured_kl=kl, factor=factor
            )
        return found

    def confirmed(self, plan: Plan, path: Path) -> Mixture:
        """What stands in the record, with the KL of the file that was made."""
        file = open_gguf(path)
        measured = self._variants.kl({"file": file.tensors}, self._progress)["file"]
        predicted = plan.predicted
        return Mixture(
            max_bytes=plan.room.limit,
            bytes=file.size,
            smallest=plan.room.smallest,
            largest=plan.room.largest,
            tokens=sum(len(chunk) - 1 for chunk in self._chunks),
            predicted_kl=predicted,
            measured_kl=measured,
            prediction_error=predicted / measured - 1 if measured > 0 else None,
            evaluations=len(plan.families) + 1,
            families=dict(plan.families),
            tensors=dict(plan.chosen),
            given=dict(plan.given),
        )


def size_check(mixture: Mixture, subject: str) -> Check:
    """Whether the file is as small as it was to be."""
    return judge(
        "budget.size",
        mixture.bytes,
        mixture.max_bytes,
        subject=subject,
        unit="bytes",
        detail="Size of the file, the types of whose tensors were chosen by it.",
    )


def mixture_notices(mixture: Mixture) -> Iterator[str]:
    """What was predicted, what was measured; and a size that asks for nothing."""
    error = mixture.prediction_error
    off = "" if error is None else f": the prediction is {error:+.1%} off".replace("%", " %")
    yield (
        f"Types chosen by curvature: predicted KL {mixture.predicted_kl:.4g} nats, measured "
        f"{mixture.measured_kl:.4g} on {mixture.tokens} tokens of calibration text{off}."
    )
    if mixture.largest <= mixture.max_bytes:
        yield (
            f"{wording.size(mixture.max_bytes)} are more than the largest types of all tensors "
            f"take: {wording.size(mixture.largest)}."
        )
    if mixture.given:
        counts = Counter(mixture.given.values())
        types = ", ".join(f"{count} {type_}" for type_, count in sorted(counts.items()))
        yield (
            f"Not chosen, but as asked for or as the recipe has them: {types}, first "
            f"{next(iter(mixture.given))}."
        )


@dataclass(frozen=True)
class Plan:
    """A choice of types.

    Attributes:
        room: what was to be kept.
        families: name → factor and how it came about.
        chosen: tensor → its type, and what it would lose in each.
        given: tensor → type, where it was not chosen.
    """

    room: Room
    families: Mapping[str, Family]
    chosen: Mapping[str, Chosen]
    given: Mapping[str, str]

    @property
    def types(self) -> dict[str, str]:
        """Tensor → type, of all that are quantized."""
        return {**{name: chosen.type for name, chosen in self.chosen.items()}, **self.given}

    @property
    def predicted(self) -> float:
        """KL, nats, of what was chosen."""
        return sum(chosen.kl[chosen.type] for _, chosen in sorted(self.chosen.items()))


def _layer(name: str) -> int | None:
    match = _BLOCK.match(name)
    return None if match is None else int(match[1])


def _probed(names: Sequence[str]) -> frozenset[str]:
    """Of each family the tensors of every fourth of its layers, and those that are in none."""
    layers: dict[str, set[int]] = {}
    for name in names:
        if (layer := _layer(name)) is not None:
            layers.setdefault(_family(name), set()).add(layer)
    chosen = {
        family: sorted(some)[min(_PROBED // 2, len(some) - 1) :: _PROBED]
        for family, some in layers.items()
    }
    return frozenset(n for n in names if _layer(n) in (None, *chosen.get(_family(n), ())))


def _family(name: str) -> str:
    """Tensors whose predictions are off by the same factor, as far as is known."""
    match = _BLOCK.match(name)
    if match is None:
        return "embedding and head"
    kind = match[2]
    if kind.startswith("attn_k"):
        return "keys"
    if kind.startswith("ffn_down"):
        return "down projections"
    return "attention" if kind.startswith("attn") else "feed-forward"


def _nearest(tensor: GGUFTensor, type_: str) -> str:
    """The candidate whose bytes are nearest to those of a type."""
    wanted = stored_bytes(tensor, type_)
    return min(candidates(tensor), key=lambda t: (abs(stored_bytes(tensor, t) - wanted), t))
