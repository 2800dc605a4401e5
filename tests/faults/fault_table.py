"""Every way in which a bake is known to go wrong: what breaks it, what catches it, its name.

One entry is one row of docs/fault-matrix.md (``python tests/faults/document.py`` writes it), and
some tests: each fault is made on two architectures in two storage dtypes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path

import gguf
import numpy as np
import torch
from fault_bench import EMBEDDING, NORM, O_PROJ, Q_PROJ, Bench, dense

from so8tqc.config import QuantizeConfig
from so8tqc.gguf.file import open_gguf
from so8tqc.rotations.enums import Parametrization
from so8tqc.services.quantize.service import quantize

Break = Callable[[Bench], Path | None]

ALL, LAST = (0, 1, 2), (2,)
EXACT = ("algebra.exact",)
GONE = ("algebra.exact", "algebra.effect")
LOGITS = ("kl.mean", "logits.max_abs", "logits.rms")


@dataclass(frozen=True)
class Fault:
    """One way to break a correct bake.

    Attributes:
        text: what was done, for the document.
        break_it: does it to a bench; returns the GGUF it made, None for the bench's directory.
        caught_by: checks that fail whatever the architecture and dtype, files alone.
        logits: checks that fail besides when the models are run ("" if the files say it all, or
            the difference drowns in storage rounding).
        diagnosis: the only code the report names.
        layers: the layers it names, () where it names none.
        dtypes: storage dtypes on which it is made.
        scale: size of theta's elements.
        parametrization: of the gates.
    """

    text: str
    break_it: Break
    caught_by: tuple[str, ...]
    diagnosis: str
    layers: tuple[int, ...] = ALL
    logits: tuple[str, ...] = LOGITS
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    scale: float = 0.3
    parametrization: Parametrization = Parametrization.EXP
    gguf: bool = False

    @property
    def name(self) -> str:
        """A short name for test ids."""
        return self.text.replace(" ", "_").replace(",", "")


def never_baked(bench: Bench) -> None:
    bench.store(bench.w)


def one_layer_not_baked(bench: Bench) -> None:
    bench.store(bench.w, 1)


def transposed(bench: Bench, *layers: int) -> None:
    bench.store(lambda i: bench.w(i) @ bench.r(i).T, *layers)


def baked_twice(bench: Bench, *layers: int) -> None:
    bench.store(lambda i: bench.w(i) @ bench.r(i) @ bench.r(i), *layers)


def other_parametrization(bench: Bench, other: Parametrization) -> None:
    bench.store(lambda i: bench.w(i) @ dense(bench.blocks(i, other)))


def layers_shifted(bench: Bench) -> None:
    bench.store(lambda i: bench.w(i) @ bench.r((i + 1) % 3))


def rotations_of_two_layers_swapped(bench: Bench) -> None:
    bench.store(lambda i: bench.w(i) @ bench.r(2 - i), 0, 2)


def weights_of_two_layers_swapped(bench: Bench) -> None:
    with bench.tensors() as tensors:
        a, b = O_PROJ.format(0), O_PROJ.format(2)
        tensors[a], tensors[b] = tensors[b], tensors[a]


def blocks_in_order(bench: Bench, order: Callable[[int], np.ndarray]) -> None:
    def fold(layer: int) -> torch.Tensor:
        blocks = bench.blocks(layer)
        return bench.w(layer) @ dense(blocks[order(len(blocks))])

    bench.store(fold)


def rolled(count: int) -> np.ndarray:
    return np.roll(np.arange(count), 1)


def swapped_across_heads(count: int) -> np.ndarray:
    """The first block of the first and of the second half (of another head) change places."""
    order = np.arange(count)
    order[[0, count // 2]] = order[[count // 2, 0]]
    return order


def left_product(bench: Bench, *, transpose: bool) -> None:
    """R·W with as many blocks as W has rows for."""

    def fold(layer: int) -> torch.Tensor:
        w = bench.w(layer)
        left = dense(bench.blocks(layer)[: w.shape[0] // 8])
        return (left.T if transpose else left) @ w

    bench.store(fold)


def a_block(bench: Bench, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Block 2 of every layer is changed before the fold."""

    def fold(layer: int) -> torch.Tensor:
        blocks = bench.blocks(layer)
        blocks[2] = change(blocks[2])
        return bench.w(layer) @ dense(blocks)

    bench.store(fold)


def reflected(block: np.ndarray) -> np.ndarray:
    return block * np.array([-1.0] + [1.0] * 7)


def a_row_unrotated(bench: Bench) -> None:
    def fold(layer: int) -> torch.Tensor:
        value = bench.w(layer) @ bench.r(layer)
        value[5] = bench.w(layer)[5]
        return value

    bench.store(fold)


def rotation_rounded(bench: Bench, dtype: torch.dtype) -> None:
    bench.store(lambda i: bench.w(i) @ bench.r(i).to(dtype).double())


def theta_rounded(bench: Bench) -> None:
    def fold(layer: int) -> torch.Tensor:
        theta = torch.from_numpy(bench.blocks(layer, Parametrization.MATRIX))
        skew = theta.bfloat16().double() - theta.bfloat16().double().transpose(1, 2)
        return bench.w(layer) @ torch.block_diag(*torch.linalg.matrix_exp(skew))

    bench.store(fold)


def accumulated_in_bfloat16(bench: Bench) -> None:
    """Every product and every sum is rounded to bfloat16."""

    def fold(layer: int) -> torch.Tensor:
        w, r = bench.w(layer).bfloat16(), bench.r(layer).bfloat16()
        total = torch.zeros(w.shape[0], r.shape[1], dtype=torch.bfloat16)
        for k in range(r.shape[0]):
            total += w[:, k, None] * r[None, k]
        return total

    bench.store(fold)


def overflown(bench: Bench) -> None:
    def overflow(weight: torch.Tensor) -> torch.Tensor:
        result = weight.clone()
        result[:, 0] *= 2.0**15
        result[3] *= 2.0**15
        return result

    bench.edit(O_PROJ.format(1), overflow)


def one_element(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        result = weight.clone()
        result.view(-1)[7] = value
        return result

    return change


def scaled(bench: Bench) -> None:
    bench.edit(O_PROJ.format(1), lambda weight: weight * 1.01)


def altered(name: str, bench: Bench) -> None:
    """Every element by a random 1 %."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        noise = np.random.default_rng(0).normal(size=tuple(weight.shape)) * 0.01
        return (weight.double() * (1 + torch.from_numpy(noise))).to(weight.dtype)

    bench.edit(name, change)


def tokenizer_swapped(bench: Bench) -> None:
    """Two pieces of the vocabulary change places."""

    def swap(content: dict) -> None:  # type: ignore[type-arg]
        vocabulary = content["model"]["vocab"]
        a, b = sorted(vocabulary, key=lambda piece: vocabulary[piece])[300:302]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    bench.edit_json("tokenizer.json", swap)


def rope_theta_changed(bench: Bench) -> None:
    def change(config: dict) -> None:  # type: ignore[type-arg]
        config["rope_parameters"]["rope_theta"] = 123.0

    bench.edit_json("config.json", change)


def missing(bench: Bench) -> None:
    with bench.tensors() as tensors:
        del tensors[NORM]


def added(bench: Bench) -> None:
    with bench.tensors() as tensors:
        tensors["model.extra.weight"] = torch.zeros(3)


def renamed(bench: Bench) -> None:
    with bench.tensors() as tensors:
        tensors["model.final_norm.weight"] = tensors.pop(NORM)


def reshaped(bench: Bench) -> None:
    bench.edit(Q_PROJ.format(1), lambda weight: weight.reshape(weight.shape[0] // 2, -1))


def gate_left(bench: Bench) -> None:
    with bench.tensors() as tensors:
        tensors["model.layers.0.self_attn.rotation_gate.theta"] = torch.zeros(8, 8, 8)


def retyped(bench: Bench) -> None:
    bench.edit(NORM, lambda weight: weight.to(torch.float16))


def gguf_of_the_unbaked_model(bench: Bench) -> Path:
    assert bench.gguf is not None
    return bench.gguf(bench.base)


def gguf_with_swapped_layers(bench: Bench) -> Path:
    """The bytes of two layers' attn_output change places in the correct file."""
    assert bench.gguf is not None
    path = bench.out.with_suffix(".swapped.gguf")
    shutil.copy(bench.gguf(bench.out), path)
    tensors = {t.name: t for t in gguf.GGUFReader(str(path), "r+").tensors}
    a, b = (tensors[f"blk.{layer}.attn_output.weight"].data for layer in (0, 2))
    a[:], b[:] = b.copy(), a.copy()
    return path


def quantized_with_the_wrong_imatrix(bench: Bench) -> Path:
    """The importance matrix of a model that uses only one column of each matrix."""
    assert bench.gguf is not None
    source = bench.gguf(bench.out)
    path = bench.out.with_suffix(".imatrix.gguf")
    writer = gguf.GGUFWriter(str(path), "imatrix")
    writer.add_type("imatrix")
    for name, tensor in open_gguf(source).tensors.items():
        if name.startswith("blk.") and len(tensor.shape) > 1:
            sums = np.full((1, tensor.shape[1]), 1e-12, dtype=np.float32)
            sums[0, ::32] = 1.0
            writer.add_tensor(f"{name}.in_sum2", sums)
            writer.add_tensor(f"{name}.counts", np.ones((1, 1), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = bench.out.with_suffix(".quantized")
    quantize(QuantizeConfig(gguf=source, out=out, types=("Q4_K_M",), imatrix=path))
    return next(out.glob("*.gguf"))


def _parametrization_faults() -> list[Fault]:
    """Each ordered pair; a matrix read as theta stands for the gates that declare no theta."""
    faults = []
    for trained, baked in permutations(Parametrization, 2):
        if trained is Parametrization.MATRIX:
            continue
        faults.append(
            Fault(
                f"trained with {trained}, baked with {baked}",
                partial(other_parametrization, other=baked),
                EXACT,
                "wrong_parametrization",
                parametrization=trained,
                scale=0.1,
            )
        )
    return faults


def _edit(name: str) -> Break:
    return partial(altered, name)


FILES_SAY_IT_ALL: tuple[str, ...] = ()

FAULTS = (
    Fault("never baked", never_baked, GONE, "not_baked"),
    Fault("one layer not baked", one_layer_not_baked, GONE, "layer_missing", (1,)),
    Fault("transposed everywhere", transposed, EXACT, "transposed"),
    Fault("transposed in one layer", lambda b: transposed(b, 2), EXACT, "transposed", LAST),
    Fault("baked twice", baked_twice, EXACT, "double_baked"),
    Fault("baked twice in one layer", lambda b: baked_twice(b, 2), EXACT, "double_baked", LAST),
    *_parametrization_faults(),
    Fault("layers shifted by one", layers_shifted, EXACT, "layers_permuted"),
    Fault("rotations of two layers swapped", rotations_of_two_layers_swapped, EXACT,
          "layers_permuted", (0, 2)),
    Fault("baked weights of two layers swapped", weights_of_two_layers_swapped, EXACT,
          "layers_permuted", (0, 2)),
    Fault("blocks reversed", partial(blocks_in_order, order=lambda n: np.arange(n)[::-1]),
          EXACT, "blocks_permuted"),
    Fault("blocks rolled by one", partial(blocks_in_order, order=rolled),
          EXACT, "blocks_permuted"),
    Fault("blocks swapped across heads", partial(blocks_in_order, order=swapped_across_heads),
          EXACT, "blocks_permuted"),
    Fault("output instead of input site", partial(left_product, transpose=False), EXACT,
          "wrong_site"),
    Fault("left instead of right product, transposed", partial(left_product, transpose=True),
          EXACT, "wrong_site"),
    Fault("a column of one block's rotation negated (det −1)", partial(a_block, change=reflected),
          EXACT, "non_orthogonal"),
    Fault("one block's sign flipped", partial(a_block, change=np.negative), EXACT, "foreign_edit"),
    Fault("one block not orthogonal", partial(a_block, change=lambda r: 1.05 * r), EXACT,
          "non_orthogonal"),
    Fault("one row left unrotated", a_row_unrotated, EXACT, "foreign_edit"),
    Fault("one block left unrotated", partial(a_block, change=lambda r: np.eye(8)), EXACT,
          "foreign_edit"),
    Fault("rotation rounded to bfloat16 before the fold",
          partial(rotation_rounded, dtype=torch.bfloat16), EXACT, "storage_rounding",
          logits=FILES_SAY_IT_ALL),
    Fault("rotation rounded to float16 before the fold",
          partial(rotation_rounded, dtype=torch.float16), EXACT, "storage_rounding",
          logits=FILES_SAY_IT_ALL),
    Fault("theta rounded to bfloat16", theta_rounded, EXACT, "storage_rounding",
          logits=FILES_SAY_IT_ALL),
    Fault("product accumulated in bfloat16", accumulated_in_bfloat16, EXACT, "storage_rounding",
          logits=FILES_SAY_IT_ALL),
    Fault("rotation too small for the storage dtype, never baked", never_baked,
          ("algebra.effect",), "storage_rounding", logits=("effect.kl",), scale=1e-10),
    Fault("float16 overflow to infinity", overflown, ("algebra.finite",), "non_finite", (1,),
          logits=FILES_SAY_IT_ALL, dtypes=("float16",)),
    Fault("NaN in one folded element",
          lambda b: b.edit(O_PROJ.format(0), one_element(float("nan"))), ("algebra.finite",),
          "non_finite", (0,), logits=FILES_SAY_IT_ALL),
    Fault("NaN in one element of another tensor",
          lambda b: b.edit(Q_PROJ.format(0), one_element(float("nan"))),
          ("structure.finite", "structure.untouched"), "non_finite", (),
          logits=FILES_SAY_IT_ALL),
    Fault("one folded element changed", lambda b: b.edit(O_PROJ.format(1), one_element(0.5)),
          EXACT, "foreign_edit", (1,)),
    # the largest single difference is no larger than what rounding to bfloat16 makes somewhere
    Fault("folded weight scaled by 1 %", scaled, EXACT, "non_orthogonal", (1,),
          logits=("kl.mean", "logits.rms")),
    Fault("q_proj altered by 1 %", _edit(Q_PROJ.format(1)), ("structure.untouched",),
          "foreign_edit", (), logits=FILES_SAY_IT_ALL),
    Fault("a norm altered by 1 %", _edit(NORM), ("structure.untouched",), "foreign_edit", (),
          logits=("kl.mean",)),
    Fault("the embedding altered by 1 %", _edit(EMBEDDING), ("structure.untouched",),
          "foreign_edit", (), logits=("kl.mean",)),
    Fault("tokenizer swapped", tokenizer_swapped, ("structure.tokenizer",), "foreign_edit", (),
          logits=FILES_SAY_IT_ALL),
    Fault("config's rope_theta changed", rope_theta_changed, ("structure.config",),
          "foreign_edit", ()),
    Fault("a tensor missing", missing, ("structure.missing",), "foreign_edit", (),
          logits=FILES_SAY_IT_ALL),
    Fault("a tensor added", added, ("structure.added",), "foreign_edit", (),
          logits=FILES_SAY_IT_ALL),
    Fault("a tensor renamed", renamed, ("structure.missing", "structure.added"), "foreign_edit",
          (), logits=FILES_SAY_IT_ALL),
    Fault("a tensor reshaped", reshaped, ("structure.shapes",), "foreign_edit", (),
          logits=FILES_SAY_IT_ALL),
    Fault("a gate's tensor left behind", gate_left, ("structure.gates", "structure.added"),
          "foreign_edit", (), logits=FILES_SAY_IT_ALL),
    Fault("dtype of an untouched tensor changed", retyped, ("structure.dtypes",), "foreign_edit",
          (), logits=FILES_SAY_IT_ALL),
    Fault("GGUF of the unbaked model", gguf_of_the_unbaked_model,
          ("algebra.nearest", "tensors.honest"), "not_baked", logits=("kl.mean", "effect.survival"),
          gguf=True),
    Fault("GGUF whose attn_output has two layers swapped", gguf_with_swapped_layers,
          ("algebra.nearest", "tensors.honest"), "layers_permuted", (0, 2), logits=("kl.mean",),
          gguf=True),
    Fault("quantized with the wrong imatrix", quantized_with_the_wrong_imatrix,
          ("tensors.honest",), "storage_rounding", logits=FILES_SAY_IT_ALL, gguf=True),
)  # fmt: skip
