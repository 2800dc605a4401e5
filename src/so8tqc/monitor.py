"""Oscillation and loops, watched while text is generated."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from transformers import LogitsProcessor, StoppingCriteria

from so8tqc.metrics.sequential import LoopWatch, OscillationChart, Statistic

IntArray = npt.NDArray[np.int64]

Kind = Literal["oscillation", "loop", "non_finite"]

KEPT_ALARMS = 64
"""The last alarms are kept, so many of them."""


class OscillationWarning(UserWarning):
    """Generated text oscillates or loops, or the logits are not finite."""


@dataclass(frozen=True)
class Alarm:
    """One alarm: its kind, and where it was raised.

    Attributes:
        kind: ``oscillation``: the chart's sum crossed its threshold; ``loop``: the text repeats
            itself; ``non_finite``: the largest logit is no finite number.
        row: sequence of the batch.
        step: tokens of it generated before the logits at hand.
        period: tokens of the loop, else 0.
    """

    kind: Kind
    row: int
    step: int
    period: int = 0

    def __str__(self) -> str:
        text = {
            "oscillation": "the largest logit oscillates more than before",
            "loop": f"the last {self.period} tokens repeat again and again",
            "non_finite": "the largest logit is not finite",
        }[self.kind]
        return f"sequence {self.row}, after {self.step} new tokens: {text}"


class OscillationMonitor(LogitsProcessor):  # type: ignore[misc]
    """Watches generation for oscillating logits and for loops; changes nothing.

    The series is the largest logit of every step. Its oscillation is charted by
    :class:`so8tqc.metrics.sequential.OscillationChart` (statistic, test and their sources are
    there), loops are found by :class:`so8tqc.metrics.sequential.LoopWatch`: a model in a loop
    oscillates little. Each sequence of a batch has a state of its own, of a fixed size however
    long the text.

    An alarm is given once for each episode, to ``on_alarm``; without that it is a Python warning
    (:class:`OscillationWarning`). To stop as well, hand :meth:`stopping` to ``generate()``, too:
    the sequence ends after the token at hand, and no token is put into its mouth.

    Decoding must append one token at a time to every sequence. What reorders sequences or takes
    tokens back (beam search, assisted decoding) is refused. A call with another prompt or batch
    begins anew by itself; so does :meth:`reset`.

    Args:
        statistic, batch, run_length, slack: of the chart. ``run_length`` is the number of tokens
            between false alarms; docs/longtext.md says what was measured.
        reference: a series of largest logits that shows how it should be, e.g.
            ``max_logit_reference`` of a ``longtext`` run's ``series.npz``. Without it the
            sequence's own start is the reference: what oscillates from the first token on raises no
            alarm.
        loops: the longest period, copies and least run of a loop; None: do not look for loops.
        eos_token_id: ends of text. What a batch appends to a finished sequence is then not
            watched; needed for batches, where padding looks like a loop.
        on_alarm: called with every alarm.

    Attributes:
        alarms: the last 64 alarms.

    Raises:
        ValueError: see the chart.

    Example:
        >>> monitor = OscillationMonitor(eos_token_id=tokenizer.eos_token_id)
        >>> model.generate(**inputs, logits_processor=[monitor],
        ...                stopping_criteria=[monitor.stopping()])

        and with llama-cpp-python, whose callbacks get numpy arrays:

        >>> llm.generate(tokens, logits_processor=LogitsProcessorList([monitor]),
        ...              stopping_criteria=StoppingCriteriaList([monitor.stopping()]))
    """

    supports_continuous_batching = False

    def __init__(
        self,
        statistic: Statistic = "index",
        *,
        batch: int = 16,
        run_length: float = 100_000.0,
        slack: float = 0.5,
        reference: Iterable[float] | None = None,
        loops: tuple[int, int, int] | None = (128, 3, 64),
        eos_token_id: int | Sequence[int] | None = None,
        on_alarm: Callable[[Alarm], None] | None = None,
    ) -> None:
        # every sequence gets copies of these
        self._chart = OscillationChart(statistic, batch=batch, run_length=run_length, slack=slack)
        if reference is not None:
            self._chart.learn(reference)
        self._loops = loops is not None
        period, copies, run = loops or (128, 2, 1)
        self._watch = LoopWatch(longest_period=period, copies=copies, least_run=run)
        ends = () if eos_token_id is None else eos_token_id
        self._ends = frozenset(ends if isinstance(ends, Sequence) else [ends])
        self._on_alarm = on_alarm or _warn
        self.alarms: deque[Alarm] = deque(maxlen=KEPT_ALARMS)
        self.reset()

    def reset(self) -> None:
        """Forget all sequences; the alarms are kept."""
        self._rows: list[_Row] = []
        self._prompt = self._length = 0

    def stopping(self, *kinds: Kind) -> StopOnAlarm:
        """A stopping criterion that ends a sequence at its first alarm, of these kinds or any.

        Raises:
            ValueError: no such kind of alarm.
        """
        known = get_args(Kind)
        if unknown := [kind for kind in kinds if kind not in known]:
            raise ValueError(f"no alarm of kind {unknown[0]!r}; there are {', '.join(known)}")
        return StopOnAlarm(self, frozenset(kinds or known))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Look at the logits of the next token.

        Args:
            input_ids: [B, T] tensor, or [T] numpy array: the text so far.
            scores: [B, V] tensor, or [V] numpy array.

        Returns:
            ``scores``, untouched.

        Raises:
            ValueError: the text is no continuation of what was seen, and no new one either.
        """
        if torch.is_tensor(scores):
            largest = scores.amax(dim=-1).double().cpu().numpy()
        else:
            largest = np.asarray(np.max(scores, axis=-1), dtype=np.float64)
        tail, length = _tail(input_ids, self._watch.past.size), int(input_ids.shape[-1])
        if self._continues(tail, length):
            for row, ids in zip(self._rows, tail, strict=True):
                self._append(row, int(ids[-1]))
        else:
            self._begin(tail, length)
        self._length = length
        for row, x in zip(self._rows, largest.ravel(), strict=True):
            self._look(row, float(x))
        return scores

    def _begin(self, prompts: IntArray, length: int) -> None:
        self._prompt, self._rows = length, []
        for index, prompt in enumerate(prompts):
            row = _Row(index, deepcopy(self._chart), deepcopy(self._watch))
            row.watch.remember(prompt)
            self._rows.append(row)

    def _continues(self, tail: IntArray, length: int) -> bool:
        """Whether these are the sequences seen before, each with one more token.

        Raises:
            ValueError: some are, or they are there in another order, or tokens were taken back.
        """
        if len(tail) != len(self._rows) or self._length == 0:
            return False
        back = self._length + 1 - length  # tokens that were taken back
        if back < 0:
            return False
        before = [ids[:-1] for ids in tail]
        in_place = all(
            _agree(ids, row.watch.past[back:]) for ids, row in zip(before, self._rows, strict=True)
        )
        if back == 0:
            if in_place:
                return True
            if any(_agree(ids, row.watch.past) for ids in before for row in self._rows):
                raise ValueError(_REFUSED.format("the sequences changed places"))
        elif in_place and length > self._prompt:
            raise ValueError(_REFUSED.format("tokens were taken back"))
        return False

    def _append(self, row: _Row, token: int) -> None:
        row.step += 1
        if row.finished or not self._loops:
            row.watch.remember([token])
        elif row.watch.update(token):
            self._raise(Alarm("loop", row.index, row.step, row.watch.period), row)
        row.finished = row.finished or token in self._ends

    def _look(self, row: _Row, x: float) -> None:
        if row.finished:
            return
        finite, row.finite = row.finite, bool(np.isfinite(x))
        if not row.finite:
            if finite:
                self._raise(Alarm("non_finite", row.index, row.step), row)
        elif row.chart.update(x):
            self._raise(Alarm("oscillation", row.index, row.step), row)

    def _raise(self, alarm: Alarm, row: _Row) -> None:
        row.kinds |= {alarm.kind}
        self.alarms.append(alarm)
        self._on_alarm(alarm)

    def _stopped(self, count: int, kinds: frozenset[str]) -> list[bool]:
        """Whether each sequence had an alarm of these kinds; if so, it is watched no longer."""
        if len(self._rows) != count:
            raise ValueError(
                f"{count} sequences, but the monitor watches {len(self._rows)}: "
                "hand it to logits_processor, too"
            )
        for row in self._rows:
            row.finished = row.finished or bool(row.kinds & kinds)
        return [bool(row.kinds & kinds) for row in self._rows]


class StopOnAlarm(StoppingCriteria):  # type: ignore[misc]
    """Ends a sequence at an alarm of its monitor: see :meth:`OscillationMonitor.stopping`."""

    def __init__(self, monitor: OscillationMonitor, kinds: frozenset[str]) -> None:
        self.monitor, self.kinds = monitor, kinds

    def __call__(
        self,
        input_ids: Any,
        scores: Any,  # noqa: ARG002 - both libraries pass it to every criterion
        **_options: Any,
    ) -> Any:
        """[B, T] tensor → [B] bool tensor; [T] numpy array → bool.

        Raises:
            ValueError: the monitor has not seen these sequences.
        """
        if torch.is_tensor(input_ids):
            stopped = self.monitor._stopped(input_ids.shape[0], self.kinds)
            return torch.tensor(stopped, device=input_ids.device)
        return self.monitor._stopped(1, self.kinds)[0]


@dataclass
class _Row:
    """What is known of one sequence."""

    index: int
    chart: OscillationChart
    watch: LoopWatch
    step: int = 0
    finite: bool = True
    finished: bool = False
    kinds: frozenset[str] = frozenset()


_REFUSED = (
    "{}: OscillationMonitor needs decoding that appends one token at a time to every sequence "
    "(greedy or sampling; no beams, no assistant)"
)


def _tail(input_ids: Any, width: int) -> IntArray:
    """[B, T] or [T] → [B, min(T, width + 1)], the end of each sequence."""
    last = input_ids[..., -(width + 1) :]
    array = last.cpu().numpy() if torch.is_tensor(last) else np.asarray(last)
    return np.atleast_2d(array).astype(np.int64)


def _agree(tokens: IntArray, past: IntArray) -> bool:
    """Whether tokens (oldest first) are those of ``past`` (newest first), as far as both go."""
    size = min(tokens.size, past.size)
    return bool(np.array_equal(tokens[::-1][:size], past[:size]))


def _warn(alarm: Alarm) -> None:
    warnings.warn(str(alarm), OscillationWarning, stacklevel=2)
