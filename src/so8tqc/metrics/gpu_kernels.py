"""The statistics of ``metrics.distributions`` on a GPU, as Triton kernels: a program for each row.

What ``metrics.cpu_kernels`` computes on a CPU is computed here while the logits are read, in the
dtype the model made them in: a row is read twice for one model and once for a pair, and nothing of
its length is written. All arithmetic is in float64. Imported only where Triton is installed, which
takes every annotation but its own for a variable of the kernel.
"""

import triton
import triton.language as tl

from so8tqc.metrics.columns import Column, Side

LEADERS = 5
"""How many of the most likely tokens are found, as in ``metrics.cpu_kernels``."""

BLOCK = 2048
"""Vocabulary entries that a program holds at a time."""

WARPS = 16

_LEADERS = tl.constexpr(LEADERS)

# a kernel takes no global but a constexpr, by which Triton knows what it has compiled
_SIDE = tl.constexpr(len(Side))
_LOG_NORMALISER = tl.constexpr(int(Side.LOG_NORMALISER))
_NLL = tl.constexpr(int(Side.NLL))
_ENTROPY = tl.constexpr(int(Side.ENTROPY))
_MAX_PROB = tl.constexpr(int(Side.MAX_PROB))
_MAX_LOGIT = tl.constexpr(int(Side.MAX_LOGIT))
_BRIER = tl.constexpr(int(Side.BRIER))

_ROW = tl.constexpr(len(Column))
_NLL_REFERENCE = tl.constexpr(int(Column.NLL_REFERENCE))
_NLL_CANDIDATE = tl.constexpr(int(Column.NLL_CANDIDATE))
_ENTROPY_REFERENCE = tl.constexpr(int(Column.ENTROPY_REFERENCE))
_ENTROPY_CANDIDATE = tl.constexpr(int(Column.ENTROPY_CANDIDATE))
_MAX_PROB_REFERENCE = tl.constexpr(int(Column.MAX_PROB_REFERENCE))
_MAX_PROB_CANDIDATE = tl.constexpr(int(Column.MAX_PROB_CANDIDATE))
_MAX_LOGIT_REFERENCE = tl.constexpr(int(Column.MAX_LOGIT_REFERENCE))
_MAX_LOGIT_CANDIDATE = tl.constexpr(int(Column.MAX_LOGIT_CANDIDATE))
_BRIER_REFERENCE = tl.constexpr(int(Column.BRIER_REFERENCE))
_BRIER_CANDIDATE = tl.constexpr(int(Column.BRIER_CANDIDATE))
_KL = tl.constexpr(int(Column.KL))
_KL_REVERSE = tl.constexpr(int(Column.KL_REVERSE))
_JS = tl.constexpr(int(Column.JS))
_DELTA_P = tl.constexpr(int(Column.DELTA_P))
_SAME_TOP = tl.constexpr(int(Column.SAME_TOP))
_TOP5_OVERLAP = tl.constexpr(int(Column.TOP5_OVERLAP))
_CORRECT_REFERENCE = tl.constexpr(int(Column.CORRECT_REFERENCE))
_CORRECT_CANDIDATE = tl.constexpr(int(Column.CORRECT_CANDIDATE))
_MAX_ABS_LOGIT = tl.constexpr(int(Column.MAX_ABS_LOGIT))
_SUM_ABS_LOGIT = tl.constexpr(int(Column.SUM_ABS_LOGIT))
_SUM_SQUARE_LOGIT = tl.constexpr(int(Column.SUM_SQUARE_LOGIT))

_LN2 = tl.constexpr(0.6931471805599453)


def columns(vocab_size: int) -> int:
    """How many blocks a row has, as a power of two."""
    count: int = triton.next_power_of_2(triton.cdiv(vocab_size, BLOCK))
    return count


@triton.jit
def _even(u):
    """1/2! + u/4! + u²/6! + …: with _odd, (e^x − 1 − x)/x² = _even(x²) + x _odd(x²), to x^11
    good to 1e-14 for |x| ≤ ½."""
    series = 1.0 / 479001600.0 + 0.0 * u
    series = series * u + 1.0 / 3628800.0
    series = series * u + 1.0 / 40320.0
    series = series * u + 1.0 / 720.0
    series = series * u + 1.0 / 24.0
    return series * u + 0.5


@triton.jit
def _odd(u):
    """1/3! + u/5! + u²/7! + …"""
    series = 1.0 / 6227020800.0 + 0.0 * u
    series = series * u + 1.0 / 39916800.0
    series = series * u + 1.0 / 362880.0
    series = series * u + 1.0 / 5040.0
    series = series * u + 1.0 / 120.0
    return series * u + 1.0 / 6.0


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
    """The largest logit of each lane, of equal ones the first, and its place, V if it has none;
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
def _write_leaders(out, best, at, start_of_row, width, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
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
    logits,
    stride,
    targets,
    numbers,
    places,
    width,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One model's distribution in each row.

    Args:
        logits: [t, V], rows ``stride`` elements apart.
        targets: [t] int64, the tokens that follow.
        numbers: [t, len(Side)] float64, written.
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
    p_target = tl.exp(z_target - top) / total
    out = numbers + row * _SIDE
    tl.store(out + _LOG_NORMALISER, normaliser)
    tl.store(out + _NLL, (top - z_target) + log_total)
    tl.store(out + _ENTROPY, log_total - moment / total)
    tl.store(out + _MAX_PROB, 1.0 / total)
    tl.store(out + _MAX_LOGIT, top)
    tl.store(out + _BRIER, square / (total * total) - 2.0 * p_target + 1.0)


@triton.jit
def _differences(first, second, top, other_top, most, other_most, width, BLOCK: tl.constexpr):
    """The sums of a row: Σ p φ(x), Σ q φ(−x), 2 JS; max |d|, Σ |d|, Σ d².

    ``metrics.distributions`` has the symbols; ``top`` and ``most`` are the largest logit and
    probability of a side."""
    # L_w − L_z; from the largest logits, as their size may have cost the sums' last digits
    shift = (other_top - top) + tl.log(most / other_most)
    lanes = tl.arange(0, BLOCK)
    kl = tl.zeros([BLOCK], tl.float64)
    reverse = tl.zeros([BLOCK], tl.float64)
    js = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    for start in range(0, width, BLOCK):
        index = start + lanes
        inside = index < width
        z = tl.load(first + index, mask=inside, other=0.0).to(tl.float64)
        w = tl.load(second + index, mask=inside, other=0.0).to(tl.float64)
        d = w - z
        size = tl.abs(d)
        largest = tl.maximum(largest, size)
        total += size
        square += d * d
        x = d - shift
        p = tl.where(inside, tl.exp(z - top) * most, 0.0)
        q = tl.where(inside, tl.exp(w - other_top) * other_most, 0.0)
        near = tl.abs(x) < 0.5
        u = tl.where(near, x * x, 0.0)
        even = u * _even(u)
        odd = u * x * _odd(u)
        kl += tl.where(near, p * (even + odd), q - p - p * x)
        reverse += tl.where(near, q * (even - odd), p - q + q * x)
        js += (p + q) * _spread(tl.abs(x) * 0.5)
    return (
        tl.sum(kl, 0),
        tl.sum(reverse, 0),
        tl.sum(js, 0),
        tl.max(largest, 0),
        tl.sum(total, 0),
        tl.sum(square, 0),
    )


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
    reference,
    reference_stride,
    candidate,
    candidate_stride,
    targets,
    reference_numbers,
    candidate_numbers,
    reference_places,
    candidate_places,
    rows,
    width,
    BLOCK: tl.constexpr,
):
    """A row of the token table for each position.

    Args:
        reference, candidate: [t, V], rows a stride apart.
        targets: [t] int64, the tokens that follow.
        reference_numbers, candidate_numbers: [t, len(Side)] float64, of ``side_kernel``.
        reference_places, candidate_places: [t, 1 + LEADERS] int32, of it.
        rows: [t, len(Column)] float64, written.
        width: V.
    """
    row = tl.program_id(0)
    first = reference + row.to(tl.int64) * reference_stride
    second = candidate + row.to(tl.int64) * candidate_stride
    ours = reference_numbers + row * _SIDE
    theirs = candidate_numbers + row * _SIDE
    nll, other_nll = tl.load(ours + _NLL), tl.load(theirs + _NLL)
    most, other_most = tl.load(ours + _MAX_PROB), tl.load(theirs + _MAX_PROB)
    top_logit, other_top_logit = tl.load(ours + _MAX_LOGIT), tl.load(theirs + _MAX_LOGIT)
    kl, reverse, js, largest, total, square = _differences(
        first, second, top_logit, other_top_logit, most, other_most, width, BLOCK
    )
    out = rows + row * _ROW
    tl.store(out + _NLL_REFERENCE, nll)
    tl.store(out + _NLL_CANDIDATE, other_nll)
    tl.store(out + _ENTROPY_REFERENCE, tl.load(ours + _ENTROPY))
    tl.store(out + _ENTROPY_CANDIDATE, tl.load(theirs + _ENTROPY))
    tl.store(out + _MAX_PROB_REFERENCE, most)
    tl.store(out + _MAX_PROB_CANDIDATE, other_most)
    tl.store(out + _MAX_LOGIT_REFERENCE, top_logit)
    tl.store(out + _MAX_LOGIT_CANDIDATE, other_top_logit)
    tl.store(out + _BRIER_REFERENCE, tl.load(ours + _BRIER))
    tl.store(out + _BRIER_CANDIDATE, tl.load(theirs + _BRIER))
    tl.store(out + _KL, kl)
    tl.store(out + _KL_REVERSE, reverse)
    tl.store(out + _JS, js * 0.5)
    tl.store(out + _DELTA_P, tl.exp(-other_nll) - tl.exp(-nll))
    leaders = reference_places + row * (1 + _LEADERS) + 1
    other_leaders = candidate_places + row * (1 + _LEADERS) + 1
    top = tl.load(leaders)
    other_top = tl.load(other_leaders)
    target = tl.load(targets + row)
    tl.store(out + _SAME_TOP, (top == other_top).to(tl.float64))
    tl.store(out + _TOP5_OVERLAP, _shared(leaders, other_leaders, width))
    tl.store(out + _CORRECT_REFERENCE, (top == target).to(tl.float64))
    tl.store(out + _CORRECT_CANDIDATE, (other_top == target).to(tl.float64))
    tl.store(out + _MAX_ABS_LOGIT, largest)
    tl.store(out + _SUM_ABS_LOGIT, total)
    tl.store(out + _SUM_SQUARE_LOGIT, square)
