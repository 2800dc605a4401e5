"""The statistics of ``metrics.distributions`` on a GPU, as Triton kernels: a program for each row.

What is computed on a CPU in ten passes over float64 blocks is computed here while the logits are
read, in the dtype the model made them in: a row is read twice by each kernel, and nothing of its
length is written. All arithmetic is in float64. Imported only where Triton is installed, which
takes every annotation but its own for a variable of the kernel.
"""

import triton
import triton.language as tl

SIDE = 6
"""Numbers of a row of one model: log-normaliser, nll, entropy, max prob, max logit, Brier score."""

PAIR = 6
"""Numbers of a row of two: KL, reverse KL, JS, max |d|, Σ |d|, Σ d²."""

BLOCK = 1024
"""Vocabulary entries that a program holds at a time."""

WARPS = 16

_CLOSE = tl.constexpr(4e-4)
"""nats, as ``metrics.distributions.CLOSE``."""

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _excess(e):
    """e^e − 1 − e for |e| < ½, by its series to e^14: nothing cancels."""
    series = 1.0 / 87178291200.0 + 0.0 * e
    series = series * e + 1.0 / 6227020800.0
    series = series * e + 1.0 / 479001600.0
    series = series * e + 1.0 / 39916800.0
    series = series * e + 1.0 / 3628800.0
    series = series * e + 1.0 / 362880.0
    series = series * e + 1.0 / 40320.0
    series = series * e + 1.0 / 5040.0
    series = series * e + 1.0 / 720.0
    series = series * e + 1.0 / 120.0
    series = series * e + 1.0 / 24.0
    series = series * e + 1.0 / 6.0
    series = series * e + 0.5
    return series * e * e


@triton.jit
def _spread(t):
    """t tanh t − ln cosh t for t ≥ 0: by its series to t^14, from t = 1/16 on in closed form."""
    square = tl.where(t < 0.0625, t * t, 0.0)
    series = 10922.0 / 3274425.0 + 0.0 * square
    series = series * square - 691.0 / 85050.0
    series = series * square + 31.0 / 1575.0
    series = series * square - 17.0 / 360.0
    series = series * square + 1.0 / 9.0
    series = series * square - 0.25
    series = series * square + 0.5
    spread = series * square
    if tl.max(t, 0) >= 0.0625:  # seldom, for models that are near each other
        y = tl.exp(-2.0 * t)
        closed = t * (1.0 - y) / (1.0 + y) - t - tl.log(1.0 + y) + _LN2
        spread = tl.where(t < 0.0625, spread, closed)
    return spread


@triton.jit
def side_kernel(
    logits, stride, targets, numbers, places, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One model's distribution in each row.

    Args:
        logits: [t, V], rows ``stride`` elements apart.
        targets: [t] int64, the tokens that follow.
        numbers: [t, SIDE] float64, written.
        places: [t, 2] int32, written: the largest logit (of equal ones the first), and the first
            that is not finite, V if all are.
        width: V.
    """
    row = tl.program_id(0)
    start_of_row = logits + row.to(tl.int64) * stride
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float64)
    at = tl.zeros([BLOCK], tl.int32) + width
    broken = tl.zeros([BLOCK], tl.int32) + width
    for start in range(0, width, BLOCK):
        index = start + lanes
        inside = index < width
        z = tl.load(start_of_row + index, mask=inside, other=float("-inf")).to(tl.float64)
        finite = tl.abs(z) < float("inf")
        broken = tl.where(inside & (finite == 0), tl.minimum(broken, index), broken)
        higher = z > best
        best = tl.where(higher, z, best)
        at = tl.where(higher, index, at)
    top = tl.max(best, 0)
    first = tl.min(tl.where(best == top, at, width), 0)
    total = tl.zeros([BLOCK], tl.float64)
    moment = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    for start in range(0, width, BLOCK):
        index = start + lanes
        inside = index < width
        z = tl.load(start_of_row + index, mask=inside, other=0.0).to(tl.float64)
        below = z - top
        weight = tl.where(inside, tl.exp(below), 0.0)
        total += weight
        moment += weight * below
        square += weight * weight
    sum_weights = tl.sum(total, 0)
    log_total = tl.log(sum_weights)
    normaliser = top + log_total
    target = tl.load(targets + row)
    z_target = tl.load(start_of_row + target).to(tl.float64)
    p_target = tl.exp(z_target - normaliser)
    out = numbers + row * 6
    tl.store(out, normaliser)
    tl.store(out + 1, normaliser - z_target)
    tl.store(out + 2, log_total - tl.sum(moment, 0) / sum_weights)
    tl.store(out + 3, 1.0 / sum_weights)
    tl.store(out + 4, top)
    tl.store(out + 5, tl.sum(square, 0) / (sum_weights * sum_weights) - 2.0 * p_target + 1.0)
    tl.store(places + row * 2, first)
    tl.store(places + row * 2 + 1, tl.min(broken, 0))


@triton.jit
def _differences(
    first, second, normaliser, other_normaliser, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a row's differences d: Σ p d, Σ q d, max |d|, Σ |d|, Σ d²."""
    lanes = tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], tl.float64)
    other_mean = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    for start in range(0, width, BLOCK):
        index = start + lanes
        inside = index < width
        z = tl.load(first + index, mask=inside, other=0.0).to(tl.float64)
        w = tl.load(second + index, mask=inside, other=0.0).to(tl.float64)
        d = w - z
        mean += tl.exp(z - normaliser) * d
        other_mean += tl.exp(w - other_normaliser) * d
        size = tl.abs(d)
        largest = tl.maximum(largest, size)
        total += size
        square += d * d
    return (
        tl.sum(mean, 0), tl.sum(other_mean, 0), tl.max(largest, 0), tl.sum(total, 0),
        tl.sum(square, 0),
    )  # fmt: skip


@triton.jit
def pair_kernel(
    reference, reference_stride, candidate, candidate_stride,
    reference_numbers, candidate_numbers, numbers, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Divergences of a candidate from a reference in each row.

    With e = d − Σ p d and x = ln(q/p), the sums of ``metrics.nearness`` are taken term by term:
    p(e^e − 1 − e) without cancellation by its series, and (p + q)/2 · (t tanh t − ln cosh t) for
    t = |x|/2. JS is exact at any distance, KL and its reverse below ``CLOSE``; beyond, the plain
    differences are.

    Args:
        reference, candidate: [t, V], rows a stride apart.
        reference_numbers, candidate_numbers: [t, SIDE] float64, of ``side_kernel``.
        numbers: [t, PAIR] float64, written.
        width: V.
    """
    row = tl.program_id(0)
    first = reference + row.to(tl.int64) * reference_stride
    second = candidate + row.to(tl.int64) * candidate_stride
    normaliser = tl.load(reference_numbers + row * 6)
    other_normaliser = tl.load(candidate_numbers + row * 6)
    centre, other_centre, largest, total, square = _differences(
        first, second, normaliser, other_normaliser, width, BLOCK
    )
    shift = other_normaliser - normaliser
    plain = shift - centre
    plain_reverse = other_centre - shift
    growth = tl.exp(plain)
    lanes = tl.arange(0, BLOCK)
    excess = tl.zeros([BLOCK], tl.float64)
    turned = tl.zeros([BLOCK], tl.float64)
    js = tl.zeros([BLOCK], tl.float64)
    for start in range(0, width, BLOCK):
        index = start + lanes
        inside = index < width
        z = tl.load(first + index, mask=inside, other=0.0).to(tl.float64)
        w = tl.load(second + index, mask=inside, other=0.0).to(tl.float64)
        p = tl.where(inside, tl.exp(z - normaliser), 0.0)
        q = tl.where(inside, tl.exp(w - other_normaliser), 0.0)
        e = (w - z) - centre
        # e^e − 1 − e; where e is large, p e^e = q e^KL, as p itself may be zero
        small = tl.abs(e) < 0.5
        near = p * _excess(tl.where(small, e, 0.0))
        term = tl.where(small, near, q * growth - p - p * e)
        excess += term
        turned += (term + p * e) * e
        js += (p + q) * _spread(tl.abs(e - plain) * 0.5)
    # KL = ln(1 + Σ p (e^e − 1 − e)), reverse KL = e^−KL Σ p (e^e − 1) e − KL: metrics.nearness
    one = 1.0 + tl.sum(excess, 0)
    more = tl.sum(excess, 0)
    kl = tl.where(one == 1.0, more, tl.log(one) * more / tl.where(one == 1.0, 1.0, one - 1.0))
    reverse = tl.exp(-kl) * tl.sum(turned, 0) - kl
    close = plain < _CLOSE
    out = numbers + row * 6
    tl.store(out, tl.where(close, kl, plain))
    tl.store(out + 1, tl.where(close, reverse, plain_reverse))
    tl.store(out + 2, tl.sum(js, 0) * 0.5)
    tl.store(out + 3, largest)
    tl.store(out + 4, total)
    tl.store(out + 5, square)
