"""Each method's parts as steps, with its formula as peft 0.21.2 computes it.

W [out, in] is the weight of the module, y = W·x + b; x_row is x as PEFT multiplies it, from the
left. A PEFT layer that computes ``x_row @ M`` before the base layer makes W·Mᵀ. A file a family,
its formulas derived in its first lines; ``context`` is what they are given.

Of several adapters of one method PEFT's forward adds the deltas of LoRA, AdaLoRA, LoHa, LoKr, VeRA,
PVeRA, PSOFT, HiRA (each times the stored weight), SHiRA, DeLoRA, GraLoRA, RandLoRA, VB-LoRA,
FourierFT, WaveFT and BEFT, and of MiSS but for ``bat``, which it applies one after the other;
applies DoRA's scalings one after the other, each norm that of the stored weight; computes
x_row·R_1·R_2 for OFT, hence W·R_2ᵀ·R_1ᵀ (``merge_and_unload`` gives the other order); W·H_1·H_2 for
HRA; W·F_1ᵀ·F_2ᵀ for BOFT; and multiplies the vectors of (IA)³. Of C3A it gives the second what the
first made of x: a product of both, no sum (``merge_and_unload`` sums them), which is refused.
"""

from __future__ import annotations

from collections.abc import Callable

from so8tqc.adapters.files import AdapterFiles
from so8tqc.adapters.methods.bases import randlora, vblora
from so8tqc.adapters.methods.blocks import c3a, gralora, miss
from so8tqc.adapters.methods.context import Context, ModuleSteps, Parts, Shape, Weight
from so8tqc.adapters.methods.lora import adalora, lora
from so8tqc.adapters.methods.normed import delora
from so8tqc.adapters.methods.orthogonal import boft, hra, oft
from so8tqc.adapters.methods.products import hira, loha, lokr
from so8tqc.adapters.methods.psoft import psoft
from so8tqc.adapters.methods.road import road
from so8tqc.adapters.methods.scales import beft, ia3
from so8tqc.adapters.methods.spectra import fourierft, shira, waveft
from so8tqc.adapters.methods.tokens import tokens, trains_tokens
from so8tqc.adapters.methods.vera import pvera, vera
from so8tqc.errors import RotationError

_METHODS: dict[str, Callable[[Context], ModuleSteps]] = {
    "LORA": lora,
    "ADALORA": adalora,
    "LOHA": loha,
    "LOKR": lokr,
    "IA3": ia3,
    "OFT": oft,
    "BOFT": boft,
    "HRA": hra,
    "PSOFT": psoft,
    "ROAD": road,
    "VERA": vera,
    "PVERA": pvera,
    "BEFT": beft,
    "MISS": miss,
    "SHIRA": shira,
    "C3A": c3a,
    "DELORA": delora,
    "HIRA": hira,
    "GRALORA": gralora,
    "RANDLORA": randlora,
    "VBLORA": vblora,
    "FOURIERFT": fourierft,
    "WAVEFT": waveft,
    "TRAINABLE_TOKENS": tokens,
}


def module_steps(
    files: AdapterFiles, module: str, parts: Parts, shape: Shape, weight: Weight, *, embedding: bool
) -> ModuleSteps:
    """The steps of one module.

    Args:
        files: the adapter.
        module: its name, as the adapter has it.
        parts: its tensors.
        shape: of the weight they belong to.
        weight: loads that weight.
        embedding: it is an embedding's, [vocabulary, features].

    Raises:
        RotationError: parts are missing, superfluous or singular.
        ShapeError: their shapes disagree with each other, the declared rank, or the weight.
    """
    try:
        method = tokens if trains_tokens(parts) else _METHODS[files.kind]
    except KeyError:
        raise RotationError(f"{files.kind} has no fold", where=str(files.directory)) from None
    return method(Context(files, module, parts, shape, weight, embedding))
