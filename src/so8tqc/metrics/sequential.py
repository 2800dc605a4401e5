"""Watching a series while it grows: a chart for its oscillation and a watch for loops.

The oscillation of x_t is summarised over consecutive batches of m second differences
Δ²x_t = x_t − 2x_{t−1} + x_{t−2}, each batch by one number:

* ``index``: v = mean |Δ²x|, how much the series oscillates;
* ``von_neumann``: v = Σ(Δx)² / Σ(x − x̄)² over the batch, how: 2 for white noise, 4 for
  alternation (the ratio does not see a change of scale).

y = ln v makes relative changes additive and its distribution nearly normal; batches make the y
nearly independent, although neighbouring second differences are not (they share two of three
values).

Neither mean nor deviation of y is known beforehand, so the chart is Hawkins' *self-starting
CUSUM* (The Statistician 36, 1987; Hawkins and Olwell, Cumulative Sum Charts, 1998, ch. 7). With
mean ȳ and deviation s of the n − 1 values before,

    T_n = (y_n − ȳ) / s · √((n − 1)/n)  ~  Student's t with n − 2 degrees of freedom,
    U_n = Φ⁻¹(F_{t, n−2}(T_n))          ~  N(0, 1), independent of one another,
    S_n = max(0, S_{n−1} + U_n − k),    alarm when S_n > h,

exactly so for independent normal y, from the third on, whatever their mean and deviation. (Under
the null T_n is independent of ȳ, s and all earlier T, by Basu's theorem.) So the average run
length to a false alarm is that of a CUSUM with known parameters, for which Siegmund (Sequential
Analysis, 1985, ch. 2) gives, with b = h + 1.166,

    ARL ≈ (e^{2kb} − 2kb − 1) / (2k²);

h follows from the run length that is wanted. U is held within ±4, so that no single batch
raises an alarm. A series from elsewhere that shows how it should be counts as batches that
were already seen (``learn``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Statistic = Literal["index", "von_neumann"]

LARGEST_SCORE = 4.0
"""Bound of |U|: beyond it lies 1 normal value in 16,000."""

LEAST_BATCH = 4
"""Second differences of a batch; fewer make a ratio of next to nothing."""

_OVERSHOOT = 1.166  # Siegmund: twice the mean overshoot of a normal random walk over a boundary


def average_run_length(threshold: float, slack: float) -> float:
    """Siegmund's approximation for a one-sided CUSUM of N(0, 1): h, k → mean number of values.

    It is within 1 % of the exact values for k ≤ 1/2 (938 against 931 at h = 5), within 6 % at 1.
    """
    d = 2 * slack * (threshold + _OVERSHOOT)
    return (math.expm1(d) - d) / (2 * slack * slack)


def threshold_for(run_length: float, slack: float) -> float:
    """h whose average run length is ``run_length`` values.

    Raises:
        ValueError: the slack is not positive, or the run length is below that of h = 0.
    """
    from scipy.optimize import brentq

    if not slack > 0:
        raise ValueError(f"slack must be positive, got {slack}")
    if not average_run_length(0.0, slack) < run_length < math.inf:
        raise ValueError(f"no threshold gives an average run length of {run_length} values")
    high = math.log(2 * slack * slack * run_length + 1) / slack + 10
    return float(brentq(lambda h: average_run_length(h, slack) - run_length, 0.0, high))


class OscillationChart:
    """Self-starting CUSUM for more oscillation than before; memory of a dozen numbers.

    Args:
        statistic: see the module.
        batch: m, second differences of a batch; an alarm can come only at the end of one.
        run_length: tokens between false alarms, on average, of a series that does not change and
            whose y are independent and normal.
        slack: k in deviations of y; the chart is best at finding a rise of 2k.

    Attributes:
        threshold: h.
        level: S_n, between 0 and h; it stays at h during an alarm.
        raised: whether an alarm is on. It ends, and the next can come, when S is back at 0;
            meanwhile the chart does not learn.

    Raises:
        ValueError: an unknown statistic, a batch below 4, or a run length that no h gives.
    """

    def __init__(
        self,
        statistic: Statistic = "index",
        *,
        batch: int = 16,
        run_length: float = 100_000.0,
        slack: float = 0.5,
    ) -> None:
        if statistic not in get_args(Statistic):
            raise ValueError(f"no statistic {statistic!r}; there are {get_args(Statistic)}")
        if batch < LEAST_BATCH:
            raise ValueError(f"a batch needs at least {LEAST_BATCH} differences, got {batch}")
        self.statistic, self.batch, self.slack = statistic, batch, slack
        self.threshold = threshold_for(run_length / batch, slack)
        self.level, self.raised = 0.0, False
        self._n, self._mean, self._squares = 0, 0.0, 0.0  # of y: Welford's recurrence
        self._break()

    def _break(self) -> None:
        """Drop the last values: the next one does not follow them in the series."""
        self._seen, self._before, self._last = 0, 0.0, 0.0
        self._clear()

    def _clear(self) -> None:
        """Begin a batch."""
        self._held, self._top = 0, 0.0
        self._level, self._spread = 0.0, 0.0  # mean and Σ(x − x̄)² of the batch: Welford

    def update(self, x: float) -> bool:
        """Take the next value; True if an alarm begins with it.

        Raises:
            ValueError: the value is not finite.
        """
        y = self._take(x)
        if y is None:
            return False
        u = self._score(y)
        if not self.raised:
            self._learn(y)
        if u is None:
            return False
        self.level = min(max(0.0, self.level + u - self.slack), self.threshold)
        if self.raised:
            self.raised = self.level > 0
            return False
        self.raised = self.level >= self.threshold
        return self.raised

    def learn(self, series: Iterable[float]) -> None:
        """Take a series as an example of no alarm; what follows it is no continuation of it."""
        self._break()
        for x in series:
            if (y := self._take(float(x))) is not None:
                self._learn(y)
        self._break()

    def _take(self, x: float) -> float | None:
        """y of the batch that ``x`` completes, None if it completes none."""
        if not math.isfinite(x):
            raise ValueError(f"a value of the series is {x}")
        first, second = x - self._last, x - 2 * self._last + self._before
        self._before, self._last = self._last, x
        self._seen = min(self._seen + 1, 3)
        if self._seen < 3:
            return None
        self._held += 1
        if self.statistic == "index":
            self._top += abs(second)
        else:
            self._top += first * first
            step = x - self._level
            self._level += step / self._held
            self._spread += step * (x - self._level)
        if self._held < self.batch:
            return None
        bottom = float(self.batch) if self.statistic == "index" else self._spread
        y = math.log(self._top / bottom) if self._top > 0 < bottom else -math.inf
        self._clear()
        return y

    def _score(self, y: float) -> float | None:
        """U of a batch, None while there are too few before it.

        A batch that does not vary at all (y = −∞) is as calm as can be.
        """
        from scipy.special import ndtri, stdtr

        if self._n < 2 or self._squares <= 0:
            return None
        if y == -math.inf:
            return -LARGEST_SCORE
        n = self._n + 1
        deviation = math.sqrt(self._squares / (self._n - 1))
        t = (y - self._mean) / deviation * math.sqrt((n - 1) / n)
        # the lower tail of −|T| keeps its digits where that of |T| would be 1
        u = float(ndtri(stdtr(self._n - 1, -abs(t))))
        return math.copysign(min(-u, LARGEST_SCORE), t)

    def _learn(self, y: float) -> None:
        if y == -math.inf:
            return
        self._n += 1
        step = y - self._mean
        self._mean += step / self._n
        self._squares += step * (y - self._mean)


class LoopWatch:
    """Finds text that repeats itself token by token: a period, seen several times in a row.

    For each period p up to P it counts the run of tokens that equal the one p before: exact, where
    a hash of n-grams could collide, in 2 P numbers. A text that is written c times in a row has
    a run of (c − 1)·p.

    Args:
        longest_period: P, tokens.
        copies: c, times that the repeated text must stand there.
        least_run: tokens that the run must have, too, so that a row of dashes is no loop.

    Attributes:
        period: tokens of the loop that the series is in, 0 if it is in none.
        past: [P] the last tokens, newest first; −1 where there was none.

    Raises:
        ValueError: a number is too small to make sense.
    """

    def __init__(self, *, longest_period: int = 128, copies: int = 3, least_run: int = 64) -> None:
        if longest_period < 1 or copies < 2 or least_run < 1:
            raise ValueError(
                "a loop needs longest_period ≥ 1, copies ≥ 2 and least_run ≥ 1, got "
                f"{longest_period}, {copies}, {least_run}"
            )
        periods = np.arange(1, longest_period + 1)
        self._needed: npt.NDArray[np.int64] = np.maximum(least_run, (copies - 1) * periods)
        self._run = np.zeros(longest_period, dtype=np.int64)
        self.past = np.full(longest_period, -1, dtype=np.int64)
        self.period = 0

    def remember(self, tokens: npt.ArrayLike) -> None:
        """Take tokens, oldest first, without counting them: a prompt may repeat itself."""
        newest = np.asarray(tokens, dtype=np.int64).ravel()[::-1]
        self.past = np.concatenate([newest, self.past])[: self.past.size]

    def update(self, token: int) -> bool:
        """Take the next token; True if a loop is found with it that was not there before."""
        self._run = np.where(self.past == token, self._run + 1, 0)
        self.past[1:] = self.past[:-1].copy()
        self.past[0] = token
        found = np.flatnonzero(self._run >= self._needed)
        before, self.period = self.period, int(found[0]) + 1 if found.size else 0
        return self.period > 0 and before == 0
