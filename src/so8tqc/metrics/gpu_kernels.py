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

LEADERS = 5
"""As ``metrics.distributions.LEADERS``."""

BLOCK = 2048
"""Vocabulary entries that a program holds at a time."""

WARPS = 16

_LEADERS = tl.constexpr(LEADERS)

_CLOSE = tl.constexpr(4e-4)
"""nats, as ``metrics.distributions.CLOSE``."""

_LN2 = tl.constexpr(0.6931471805599453)


def columns(vocab_size: int) -> int:
    """How many blocks a row has, as a power of two."""
    count: int = triton.next_power_of_2(triton.cdiv(vocab_size, BLOCK))
    return count


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
def _lane_maxima(start_of_row, width, BLOCK: tl.constexpr):
    """Of each lane's logits the largest, of equal ones the first, its place, V if it has none;
    and the first place of the row whose logit is not finite, V if all are."""
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
    return best, at, tl.min(broken, 0)


@triton.jit
def _write_leaders(
    out, best, at, start_of_row, width, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The places of the row's largest logits: each is the largest of its lane, whose next one then
    takes its place. COLUMNS is at least the number of logits in a lane."""
    lanes = tl.arange(0, BLOCK)
    for rank in tl.static_range(_LEADERS):
        leading = tl.max(best, 0)
        leader = tl.min(tl.where(best == leading, at, width), 0)
        tl.store(out + rank, leader)
        lane = leader % BLOCK
        column = lane + BLOCK * tl.arange(0, COLUMNS)
        z = tl.load(start_of_row + column, mask=column < width, other=float("-inf")).to(tl.float64)
        behind = (z < leading) | ((z == leading) & (column > leader))
        z = tl.where(behind & (column < width), z, float("-inf"))
        following = tl.max(z, 0)
        best = tl.where(lanes == lane, following, best)
        place = tl.min(tl.where((z == following) & behind, column, width), 0)
        at = tl.where(lanes == lane, tl.minimum(place, width), at)


@triton.jit
def _weight_sums(start_of_row, top, width, BLOCK: tl.constexpr):
    """With w = e^(z − top): Σ w, Σ w (z − top), Σ w²."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    moment = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    for start in range(0, width, BLOCK):
        index = start + lanes
        inside = index < width
        below = tl.load(start_of_row + index, mask=inside, other=0.0).to(tl.float64) - top
        weight = tl.where(inside, tl.exp(below), 0.0)
        total += weight
        moment += weight * below
        square += weight * weight
    return tl.sum(total, 0), tl.sum(moment, 0), tl.sum(square, 0)


@triton.jit
def side_kernel(
    logits, stride, targets, numbers, places, width,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One model's distribution in each row.

    Args:
        logits: [t, V], rows ``stride`` elements apart.
        targets: [t] int64, the tokens that follow.
        numbers: [t, SIDE] float64, written.
        places: [t, 1 + LEADERS] int32, written: the first logit that is not finite, V if all are;
            then the largest, of equal ones the first before the others; V where there are fewer.
        width: V.
        BLOCK: logits seen at a time: as many lanes, of COLUMNS logits or fewer.
    """
    row = tl.program_id(0)
    start_of_row = logits + row.to(tl.int64) * stride
    best, at, broken = _lane_maxima(start_of_row, width, BLOCK)
    top = tl.max(best, 0)
    beginning = places + row * (1 + _LEADERS)
    tl.store(beginning, broken)
    _write_leaders(beginning + 1, best, at, start_of_row, width, BLOCK, COLUMNS)
    total, moment, square = _weight_sums(start_of_row, top, width, BLOCK)
    log_total = tl.log(total)
    normaliser = top + log_total
    z_target = tl.load(start_of_row + tl.load(targets + row)).to(tl.float64)
    p_target = tl.exp(z_target - normaliser)
    out = numbers + row * 6
    tl.store(out, normaliser)
    tl.store(out + 1, normaliser - z_target)
    tl.store(out + 2, log_total - moment / total)
    tl.store(out + 3, 1.0 / total)
    tl.store(out + 4, top)
    tl.store(out + 5, square / (total * total) - 2.0 * p_target + 1.0)


@triton.jit
def _differences(first, second, normaliser, width, BLOCK: tl.constexpr):
    """Of a row's differences d: Σ p d, max |d|, Σ |d|, Σ d²."""
    lanes = tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], tl.float64)
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
        size = tl.abs(d)
        largest = tl.maximum(largest, size)
        total += size
        square += d * d
    return tl.sum(mean, 0), tl.max(largest, 0), tl.sum(total, 0), tl.sum(square, 0)


@triton.jit
def _nearness(
    first, second, normaliser, other_normaliser, centre, plain, width, BLOCK: tl.constexpr
):
    """Of a row, with e = d − centre: Σ p (e^e − 1 − e), Σ p (e^e − 1) e, Σ q e, 2 JS."""
    growth = tl.exp(plain)
    lanes = tl.arange(0, BLOCK)
    excess = tl.zeros([BLOCK], tl.float64)
    turned = tl.zeros([BLOCK], tl.float64)
    other_mean = tl.zeros([BLOCK], tl.float64)
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
        other_mean += q * e
        js += (p + q) * _spread(tl.abs(e - plain) * 0.5)
    return tl.sum(excess, 0), tl.sum(turned, 0), tl.sum(other_mean, 0), tl.sum(js, 0)


@triton.jit
def _shared(first, second, width):
    """Share of one row's leaders that are among the other's."""
    found = tl.full([], 0.0, tl.float64)
    count = tl.full([], 0.0, tl.float64)
    for i in tl.static_range(_LEADERS):
        leader = tl.load(first + i)
        for j in tl.static_range(_LEADERS):
            other = tl.load(second + j)
            found += tl.where((leader == other) & (leader < width), 1.0, 0.0)
        count += tl.where(leader < width, 1.0, 0.0)
    return found / count


@triton.jit
def pair_kernel(
    reference, reference_stride, candidate, candidate_stride, targets,
    reference_numbers, candidate_numbers, reference_places, candidate_places, rows, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of ``metrics.divergence.COLUMNS`` for each position.

    With e = d − Σ p d and x = ln(q/p), the sums of ``metrics.nearness`` are taken term by term:
    p(e^e − 1 − e) without cancellation by its series, and (p + q)/2 · (t tanh t − ln cosh t) for
    t = |x|/2. JS is exact at any distance, KL and its reverse below ``CLOSE``; beyond, the plain
    differences are.

    Args:
        reference, candidate: [t, V], rows a stride apart.
        targets: [t] int64, the tokens that follow.
        reference_numbers, candidate_numbers: [t, SIDE] float64, of ``side_kernel``.
        reference_places, candidate_places: [t, 1 + LEADERS] int32, of it.
        rows: [t, 21] float64, written.
        width: V.
    """
    row = tl.program_id(0)
    first = reference + row.to(tl.int64) * reference_stride
    second = candidate + row.to(tl.int64) * candidate_stride
    normaliser = tl.load(reference_numbers + row * 6)
    other_normaliser = tl.load(candidate_numbers + row * 6)
    centre, largest, total, square = _differences(first, second, normaliser, width, BLOCK)
    shift = other_normaliser - normaliser
    plain = shift - centre
    more, turned, other_mean, js = _nearness(
        first, second, normaliser, other_normaliser, centre, plain, width, BLOCK
    )
    # KL = ln(1 + Σ p (e^e − 1 − e)), reverse KL = e^−KL Σ p (e^e − 1) e − KL: metrics.nearness
    one = 1.0 + more
    kl = tl.where(one == 1.0, more, tl.log(one) * more / tl.where(one == 1.0, 1.0, one - 1.0))
    reverse = tl.exp(-kl) * turned - kl
    close = plain < _CLOSE
    ours = reference_numbers + row * 6
    theirs = candidate_numbers + row * 6
    out = rows + row * 21
    for i in tl.static_range(5):  # nll, entropy, max prob, max logit, Brier score
        tl.store(out + 2 * i, tl.load(ours + 1 + i))
        tl.store(out + 2 * i + 1, tl.load(theirs + 1 + i))
    tl.store(out + 10, tl.where(close, kl, plain))
    tl.store(out + 11, tl.where(close, reverse, other_mean - plain))
    tl.store(out + 12, js * 0.5)
    tl.store(out + 13, tl.exp(-tl.load(theirs + 1)) - tl.exp(-tl.load(ours + 1)))
    leaders = reference_places + row * (1 + _LEADERS) + 1
    other_leaders = candidate_places + row * (1 + _LEADERS) + 1
    top = tl.load(leaders)
    other_top = tl.load(other_leaders)
    target = tl.load(targets + row)
    tl.store(out + 14, (top == other_top).to(tl.float64))
    tl.store(out + 15, _shared(leaders, other_leaders, width))
    tl.store(out + 16, (top == target).to(tl.float64))
    tl.store(out + 17, (other_top == target).to(tl.float64))
    tl.store(out + 18, largest)
    tl.store(out + 19, total)
    tl.store(out + 20, square)
