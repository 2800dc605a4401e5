"""Which texts are held out: disjoint, complete, stratified, and by nothing but seed and names."""

from __future__ import annotations

import numpy as np
import pytest

from so8tqc.errors import DataError
from so8tqc.services.calibrate.holdout import split_texts
from so8tqc.sources.protocol import EncodedText


def _texts(groups: dict[tuple[str, str], int]) -> list[EncodedText]:
    return [
        EncodedText(f"{language}/{category}/{i}", np.arange(3), language, category)
        for (language, category), count in groups.items()
        for i in range(count)
    ]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(5))
def test_split_is_disjoint_complete_and_reproducible(share: float, seed: int) -> None:
    texts = _texts({("en", "a"): 4, ("en", "b"): 1, ("ja", "a"): 6, ("ja", "c"): 1})
    split = split_texts(texts, share, seed)
    fit, held = set(split.fit.tolist()), set(split.holdout.tolist())
    assert not fit & held
    assert fit | held == set(range(len(texts)))
    again = split_texts(texts, share, seed)
    assert (again.fit.tolist(), again.holdout.tolist()) == (
        split.fit.tolist(),
        split.holdout.tolist(),
    )


def test_split_does_not_depend_on_the_order_of_the_texts() -> None:
    texts = _texts({("en", "a"): 4, ("en", "b"): 3, ("ja", "a"): 6})
    held = {texts[i].id for i in split_texts(texts, 0.5, 1).holdout}
    backwards = texts[::-1]
    assert {backwards[i].id for i in split_texts(backwards, 0.5, 1).holdout} == held


@pytest.mark.parametrize("seed", range(8))
def test_split_is_stratified(seed: int) -> None:
    groups = {("en", "a"): 4, ("en", "b"): 6, ("ja", "a"): 5}
    groups |= {("ja", f"single{i}"): 1 for i in range(9)}  # only the language can balance these
    texts = _texts(groups)
    held = [texts[i] for i in split_texts(texts, 0.5, seed).holdout]
    for language, category in (("en", "a"), ("en", "b"), ("ja", "a")):
        share = sum((t.language, t.category) == (language, category) for t in held)
        assert abs(share - groups[language, category] / 2) <= 1
    assert abs(sum(t.language == "ja" for t in held) - 7) <= 1


def test_seeds_give_different_splits() -> None:
    texts = _texts({("en", "a"): 6, ("ja", "a"): 6})
    assert len({tuple(split_texts(texts, 0.5, seed).holdout.tolist()) for seed in range(10)}) > 5


def test_an_empty_side_is_refused() -> None:
    with pytest.raises(DataError, match="leave nothing to"):
        split_texts(_texts({("en", "a"): 1}), 0.5, 0)
