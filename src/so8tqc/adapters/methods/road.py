"""RoAd (``road/layer.py``): the output is turned and scaled in pairs.

The output is taken in groups, each half the partner of the other: y_i' = p_i·y_i − q_i·y_j in a
group's first half, p_i·y_i + q_i·y_j in its second, with p = α·cos θ and q = α·sin θ. It multiplies
W and b alike.
"""

from __future__ import annotations

import math

import numpy as np

from so8tqc.adapters.methods.context import Context, ModuleSteps
from so8tqc.adapters.steps import MixRowPairs
from so8tqc.errors import RotationError
from so8tqc.rotations import double_double as dd
from so8tqc.rotations.rotation_set import FloatArray


def road(c: Context) -> ModuleSteps:
    c.only("road_theta.weight", "road_alpha.weight")
    theta, alpha = c.take("road_theta.weight"), c.take("road_alpha.weight")
    group, variant = int(c.setting("group_size", 64)), str(c.files.config.get("variant", "road_1"))
    sizes = {"road_1": c.shape.out // 2, "road_2": c.shape.out, "road_4": 2 * c.shape.out}
    if variant not in sizes or group < 2 or group % 2 or c.shape.out % group:
        raise RotationError(
            f"variant {variant!r} with groups of {group} on {c.shape.out} features", where=c.where
        )
    c.require("road_theta", theta.shape, (sizes[variant],))
    c.require("road_alpha", alpha.shape, (sizes[variant],))
    cosine, sine = cos_sin(theta)
    if variant == "road_1":  # one pair of numbers for both halves of a group
        p, q = (
            _rounded_product(alpha, t).reshape(-1, 1, group // 2).repeat(2, axis=1).reshape(-1)
            for t in (cosine, sine)
        )
    elif variant == "road_2":
        p, q = _rounded_product(alpha, cosine), _rounded_product(alpha, sine)
    else:
        p = _rounded_product(alpha, cosine).reshape(-1, 2, group)[:, 0].reshape(-1)
        q = _rounded_product(alpha, sine).reshape(-1, 2, group)[:, 1].reshape(-1)
    signs = np.tile(np.repeat([-1.0, 1.0], group // 2), c.shape.out // group)
    step = MixRowPairs(p, q * signs, group)
    return ModuleSteps((step,), mix=step, zero=bool((p == 1).all() and not q.any()))


def cos_sin(angles: FloatArray) -> tuple[dd.DoubleDouble, dd.DoubleDouble]:
    """cos and sin in double-double: Taylor series of a small part of the angle, then doubled.

    With x = angle/2^k ≤ 1/8 and 18 terms of each series the rest is below 2⁻¹²⁰; c' = 1 − 2s²,
    s' = 2·s·c, k times. Only IEEE operations: the same on every machine.
    """
    largest = float(np.abs(angles).max(initial=0.0))
    k = max(0, math.ceil(math.log2(largest * 8))) if largest > 0.125 else 0
    x = dd.from_float64(angles * 2.0**-k)
    square = dd.multiply(x, x)
    one = dd.from_float64(np.ones_like(angles))
    sine, cosine = x, one
    term_s, term_c = x, one
    for n in range(1, 19):
        term_c = dd.negate(_over(dd.multiply(term_c, square), (2 * n - 1) * (2 * n)))
        term_s = dd.negate(_over(dd.multiply(term_s, square), (2 * n) * (2 * n + 1)))
        cosine, sine = dd.add(cosine, term_c), dd.add(sine, term_s)
    for _ in range(k):
        product = dd.scale(dd.multiply(sine, cosine), 2.0)
        cosine = dd.add(one, dd.negate(dd.scale(dd.multiply(sine, sine), 2.0)))
        sine = product
    return cosine, sine


def _over(a: dd.DoubleDouble, number: int) -> dd.DoubleDouble:
    return dd.divide(a, dd.from_float64(np.full_like(a.hi, float(number))))


def _rounded_product(alpha: FloatArray, values: dd.DoubleDouble) -> FloatArray:
    return dd.to_float64(dd.multiply(dd.from_float64(alpha), values))
