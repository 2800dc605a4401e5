"""(IA)³ and BEFT: vectors.

**(IA)³** (``ia3/layer.py``): outputs, or inputs of feed-forward layers, times a learned vector.

Of a feed-forward module x is scaled, W' = W·diag(l); of any other y is, W' = diag(l)·W and
b' = l·b. Which it is says the vector's shape: [1, in] or [out, 1].

**BEFT** (``beft/layer.py``): b' = b + a learned vector; a layer without bias has nowhere to put it.
"""

from __future__ import annotations

from so8tqc.adapters.methods.context import Context, ModuleSteps
from so8tqc.adapters.products import ScaleColumns
from so8tqc.adapters.steps import ScaleRows, Step
from so8tqc.errors import RotationError


def ia3(c: Context) -> ModuleSteps:
    """Steps of an (IA)³ module.

    Raises:
        RotationError: a vector of one number, whose side nothing tells.
    """
    c.only("ia3_l.weight")
    vector = c.take("ia3_l.weight")
    if vector.shape == (1, 1):
        raise RotationError("ia3_l is one number, of inputs or of outputs", where=c.where)
    inputs = vector.ndim == 2 and vector.shape[0] == 1
    c.require("ia3_l", vector.shape, (1, c.shape.into) if inputs else (c.shape.out, 1))
    factors = vector.reshape(-1)
    zero = bool((factors == 1).all())
    if inputs:
        return ModuleSteps((ScaleColumns(factors),), zero=zero)
    step: Step = ScaleRows(factors)
    return ModuleSteps((step,), mix=step, zero=zero)


def beft(c: Context) -> ModuleSteps:
    """What a BEFT module adds to its bias."""
    c.only("beft_bias.weight")
    vector = c.take("beft_bias.weight")
    c.require("beft_bias", vector.shape, (1, c.shape.out))
    return ModuleSteps((), bias=vector.reshape(-1), zero=not vector.any())
