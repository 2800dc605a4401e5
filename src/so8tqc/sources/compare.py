"""Walking several logit sources in step: one pass over the text, no logits kept.

Logits that are made on a GPU are compared there, others by the CPU's cores. A GPU works through
what it was told while the next text's work is told to it: a text's rows are asked for only then.
Its kernels run in a stream of their own beside the passes: a pass begins with a look at its
positions, for which transformers waits until the GPU has done all that it was told in that stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from so8tqc.errors import DataError, InputError, So8tqcError
from so8tqc.metrics.columns import COLUMNS
from so8tqc.metrics.distributions import Distribution, Workspace, distribution, rows_per_block
from so8tqc.metrics.divergence import TokenTable, token_rows
from so8tqc.metrics.gpu_divergence import gpu_distribution, gpu_token_rows, works_on
from so8tqc.progress import SILENT, Progress
from so8tqc.sources import ranks
from so8tqc.sources.placement import (
    beside_the_models,
    enough_gpu_memory,
    ids_on,
    on_cpu,
    on_the_way,
    sent,
)
from so8tqc.sources.protocol import EncodedText, LogitSource
from so8tqc.sources.routing import Choice, Routed, ties, watching
from so8tqc.sources.seen import conditioned

if TYPE_CHECKING:
    import torch

HEAD_BYTES = 64 << 20
"""Memory for the float32 logits asked of a source at once."""

FEWEST_HEAD_ROWS = 128
"""Rows that make an efficient matrix product, whatever the vocabulary."""

MOST_THREADS = 16
"""Threads that compare rows, if torch uses as many; each has memory for a row of every model."""

Pair = tuple[str, str]
"""Names of a reference and of a candidate."""

Rows = npt.NDArray[np.float64]
"""[T, C] statistics of a text's scored tokens, in the order of ``metrics.columns.COLUMNS``."""


def compare(
    sources: Sequence[LogitSource],
    pairs: Sequence[Pair],
    texts: Sequence[EncodedText],
    progress: Progress = SILENT,
    description: str = "comparing",
    routed: Routed | None = None,
) -> dict[Pair, TokenTable]:
    """Token tables of every pair, in a single pass over the texts.

    Where several processes work together (see ``ranks``), each walks its share of the texts, and
    all of them return the same whole tables. Each source's logits are computed once, however many
    pairs it is part of. Every position from a text's ``first`` on but its last is scored, on the
    token that follows it; none where a picture is or follows.

    Args:
        sources: all models, with distinct names; each name in ``pairs`` is one of them.
        pairs: which candidate is compared with which reference.
        texts: token ids, each at least two; windows of one text share its id, and are one
            text in the table.
        progress: told about each text, in tokens.
        description: what the progress says.
        routed: whose choices of experts are looked at, to mark those that rounding may turn.

    Returns:
        pair → token table.

    Raises:
        InputError: vocabulary sizes differ, or two sources share a name.
        DataError: a source yields non-finite logits, naming text and position; a token is not in
            the vocabulary.
    """
    import torch

    _check_sources(sources)
    _check_tokens(texts, sources[0])
    threads = min(torch.get_num_threads(), MOST_THREADS)
    memories = [{source.name: Workspace() for source in sources} for _ in range(threads)]
    mine = ranks.share(texts)
    found: dict[int, dict[Pair, Rows]] = {}
    marks: dict[int, npt.NDArray[np.bool_]] = {}
    error = None
    total = sum(texts[index].tokens.size for index in mine)
    with (
        progress.task(description, total=total, unit="tokens") as task,
        ThreadPoolExecutor(max_workers=threads) as pool,
        beside_the_models(),
    ):
        try:
            walked: list[tuple[int, _Walked]] = []
            for index in mine:
                text = texts[index]
                with enough_gpu_memory("comparing logits", text.id):
                    work = _compare_text(sources, pairs, text, memories, pool, routed)
                walked.append((index, work))
                if work.ties is None:
                    routed = None
                else:
                    marks[index] = work.ties
                if len(walked) > 1:
                    _finish(walked.pop(0), found)
                task.advance(text.tokens.size, item=text.id)
            for last in walked:
                _finish(last, found)
        except So8tqcError as raised:  # the others wait for this process, to be told
            error = raised
    found = ranks.together(found, error)
    marks = ranks.together(marks, None)
    vocab_size = sources[0].vocab_size
    tie = _ties([*marks.values()], texts) if len(marks) == len(texts) else None
    return {
        pair: _table([rows[pair] for rows in found.values()], texts, vocab_size, tie)
        for pair in pairs
    }


@dataclass(frozen=True)
class _Walked:
    """A text whose statistics are computed, or on their way from a GPU.

    Attributes:
        text: the text.
        rows: of each pair, [T, C].
        broken: source → [T] the first logit that is not finite in each row, V if all are.
        vocab_size: V.
        event: of the GPU, after which rows and places are here; None if they are.
        ties: [tokens] where rounding may turn the choice of experts; None: none is made.
    """

    text: EncodedText
    rows: Mapping[Pair, torch.Tensor]
    broken: Mapping[str, torch.Tensor]
    vocab_size: int
    event: torch.cuda.Event | None
    ties: npt.NDArray[np.bool_] | None = None

    def arrived(self) -> dict[Pair, Rows]:
        """The rows, once they are here.

        Raises:
            DataError: a logit is not finite.
        """
        import torch

        if self.event is not None:
            self.event.synchronize()
        for name, places in self.broken.items():
            if (bad := torch.nonzero(places < self.vocab_size)).numel():
                raise _not_finite(name, self.text, int(bad[0]), int(places[bad[0]]))
        return {pair: rows.numpy() for pair, rows in self.rows.items()}


def _finish(walked: tuple[int, _Walked], found: dict[int, dict[Pair, Rows]]) -> None:
    index, text = walked
    found[index] = text.arrived()


def _compare_text(
    sources: Sequence[LogitSource],
    pairs: Sequence[Pair],
    text: EncodedText,
    memories: Sequence[Mapping[str, Workspace]],
    pool: ThreadPoolExecutor,
    routed: Routed | None,
) -> _Walked:
    """The statistics of one text: all cores for a model's logits, then a thread for some rows."""
    import torch

    targets = torch.from_numpy(text.tokens[text.first + 1 :])
    rows: dict[Pair, list[torch.Tensor]] = {pair: [] for pair in pairs}
    broken: dict[str, list[torch.Tensor]] = {source.name: [] for source in sources}
    walks = [
        source.logits(text.tokens, head_rows(source.vocab_size), text.first) for source in sources
    ]
    start, device = 0, None
    choices: dict[str, list[Choice]] = {}
    while blocks := _next_blocks(sources, walks, text, choices, None if start else routed):
        height = min(blocks[0].shape[0], targets.shape[0] - start)
        if start == 0 and (device := _gpu_of(blocks)) is not None:
            targets = ids_on(targets.numpy(), device)
        goal = targets[start : start + height]
        places: Mapping[str, torch.Tensor] = {}
        if not height:  # nothing follows the last position
            parts: Mapping[Pair, torch.Tensor] = {}
        elif device is None:
            parts = _compare_on_cpu(sources, pairs, blocks, goal, text, start, memories, pool)
        else:
            parts, places = _compare_on_gpu(sources, pairs, blocks, goal)
        for pair, part in parts.items():
            rows[pair].append(part)
        for name, place in places.items():
            broken[name].append(place)
        start += blocks[0].shape[0]
        blocks.clear()  # their memory is for the next ones
    return _Walked(
        text,
        {pair: on_the_way(torch.cat(parts)) for pair, parts in rows.items()},
        {name: on_the_way(torch.cat(places)) for name, places in broken.items() if places},
        sources[0].vocab_size,
        sent(device),
        _marked(choices, routed),
    )


def _next_blocks(
    sources: Sequence[LogitSource],
    walks: Sequence[Iterator[torch.Tensor]],
    text: EncodedText,
    choices: dict[str, list[Choice]],
    routed: Routed | None,
) -> list[torch.Tensor]:
    """The next block of every source; choices of experts on the way are noted, if asked for."""
    blocks: list[torch.Tensor] = []
    watched = () if routed is None else (routed.exact, routed.rounded)
    for source, walk in zip(sources, walks, strict=True):
        if source.name in watched:
            with watching(text.tokens.size) as watch:
                blocks += itertools.islice(walk, 1)
            choices[source.name] = watch.choices
        else:
            blocks += itertools.islice(walk, 1)
    return blocks


def _marked(
    choices: Mapping[str, list[Choice]], routed: Routed | None
) -> npt.NDArray[np.bool_] | None:
    if routed is None or not choices.get(routed.exact):
        return None
    rounded = None if routed.rounded is None else choices.get(routed.rounded)
    return ties(choices[routed.exact], rounded, routed.unit)


def _ties(
    marks: Sequence[npt.NDArray[np.bool_]], texts: Sequence[EncodedText]
) -> npt.NDArray[np.bool_]:
    """[n] of the scored tokens."""
    return np.concatenate([its[text.scored] for its, text in zip(marks, texts, strict=True)])


def _compare_on_cpu(
    sources: Sequence[LogitSource],
    pairs: Sequence[Pair],
    blocks: Sequence[torch.Tensor],
    targets: torch.Tensor,
    text: EncodedText,
    start: int,
    memories: Sequence[Mapping[str, Workspace]],
    pool: ThreadPoolExecutor,
) -> dict[Pair, torch.Tensor]:
    """The statistics of consecutive positions, a thread for some of them: [t, C] of each pair."""
    import torch

    height = targets.shape[0]
    each = max(1, -(-height // len(memories)))
    here = [on_cpu(block) for block in blocks]
    jobs = [
        pool.submit(
            _compare_rows,
            sources,
            pairs,
            [block[at : at + each] for block in here],
            targets[at : at + each],
            text,
            start + at,
            memory,
        )
        for at, memory in zip(range(0, height, each), memories, strict=False)
    ]
    parts = [job.result() for job in jobs]
    return {pair: torch.cat([row for part in parts for row in part[pair]]) for pair in pairs}


def _gpu_of(blocks: Sequence[torch.Tensor]) -> torch.device | None:
    """The GPU to compare on: of the first block that is on one, if our kernels run there."""
    for block in blocks:
        if block.device.type == "cuda":
            return block.device if works_on(block.device) else None
    return None


def _compare_on_gpu(
    sources: Sequence[LogitSource],
    pairs: Sequence[Pair],
    blocks: Sequence[torch.Tensor],
    targets: torch.Tensor,
) -> tuple[dict[Pair, torch.Tensor], dict[str, torch.Tensor]]:
    """The statistics of consecutive positions, and where each source's logits are not finite.

    Args:
        sources, pairs: as of :func:`compare`.
        blocks: of each source, [t or more, V] logits, on any device.
        targets: [t] the tokens that follow, on the GPU that compares.
    """
    height = targets.shape[0]
    sides = {
        source.name: gpu_distribution(block[:height].to(targets.device), targets)
        for source, block in zip(sources, blocks, strict=True)
    }
    rows = {pair: gpu_token_rows(sides[pair[0]], sides[pair[1]], targets) for pair in pairs}
    return rows, {name: side.broken for name, side in sides.items()}


def _compare_rows(
    sources: Sequence[LogitSource],
    pairs: Sequence[Pair],
    blocks: Sequence[torch.Tensor],
    targets: torch.Tensor,
    text: EncodedText,
    first: int,
    memory: Mapping[str, Workspace],
) -> dict[Pair, list[torch.Tensor]]:
    """The statistics of consecutive positions, a few rows at a time.

    Args:
        sources, pairs: as of :func:`compare`.
        blocks: of each source, [t or more, V] logits.
        targets: [t] the tokens that follow.
        text: what they belong to.
        first: the first of the positions among the text's scored ones.
        memory: scratch of this thread alone.
    """
    step = rows_per_block(sources[0].vocab_size)
    rows: dict[Pair, list[torch.Tensor]] = {pair: [] for pair in pairs}
    for row in range(0, targets.shape[0], step):
        goal = targets[row : row + step]
        sides = {
            source.name: _checked(
                distribution(block[row : row + goal.shape[0]], goal, memory[source.name]),
                source,
                text,
                first + row,
            )
            for source, block in zip(sources, blocks, strict=True)
        }
        for pair in pairs:
            rows[pair].append(token_rows(sides[pair[0]], sides[pair[1]]))
    return rows


def head_rows(vocab_size: int) -> int:
    """How many rows are asked of a source at once."""
    return max(FEWEST_HEAD_ROWS, HEAD_BYTES // (4 * vocab_size))


def _checked(side: Distribution, source: LogitSource, text: EncodedText, row: int) -> Distribution:
    if not side.finite.all():
        bad = int(np.argmin(side.finite))
        token = int(np.argmin(np.isfinite(side.logits[bad])))
        raise _not_finite(source.name, text, row + bad, token)
    return side


def _not_finite(name: str, text: EncodedText, row: int, token: int) -> DataError:
    at = text.start + text.first + row
    return DataError(
        f"{name} yields a non-finite logit at position {at}, token {token}",
        where=text.id,
        remedy="The weights hold NaN or infinity, or overflow in the compute dtype.",
    )


def _table(
    parts: list[Rows],
    texts: Sequence[EncodedText],
    vocab_size: int,
    tie: npt.NDArray[np.bool_] | None,
) -> TokenTable:
    scored = [text.scored for text in texts]
    values = np.concatenate(
        [rows[at - text.first] for rows, at, text in zip(parts, scored, texts, strict=True)]
    )
    index = {name: i for i, name in enumerate(dict.fromkeys(text.id for text in texts))}
    return TokenTable(
        columns={name: np.ascontiguousarray(values[:, i]) for i, name in enumerate(COLUMNS)},
        text=np.repeat(
            np.array([index[text.id] for text in texts], dtype=np.int32),
            [rows.size for rows in scored],
        ),
        position=np.concatenate(
            [rows + text.start for rows, text in zip(scored, texts, strict=True)], dtype=np.int32
        ),
        vocab_size=vocab_size,
        texts=tuple(index),
        image=np.concatenate(
            [conditioned(text.tokens, at) for text, at in zip(texts, scored, strict=True)]
        ),
        tie=tie,
    )


def _check_sources(sources: Sequence[LogitSource]) -> None:
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise InputError(f"two models share a name: {', '.join(sorted(names))}")
    first = sources[0]
    for source in sources[1:]:
        if source.vocab_size != first.vocab_size:
            raise InputError(
                f"{source.name} has {source.vocab_size} vocabulary entries, "
                f"{first.name} has {first.vocab_size}: they cannot be compared",
                remedy="Give models that share a tokenizer.",
            )


def _check_tokens(texts: Sequence[EncodedText], source: LogitSource) -> None:
    """A token of another vocabulary would be looked up in memory that is not its row's."""
    for text in texts:
        outside = text.tokens[(text.tokens < 0) | (text.tokens >= source.vocab_size)]
        if outside.size:
            raise DataError(
                f"token {int(outside[0])} is not in {source.name}'s vocabulary of "
                f"{source.vocab_size}",
                where=text.id,
                remedy="Give the tokenizer that belongs to these models.",
            )
