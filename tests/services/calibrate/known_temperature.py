"""Logit sources whose right temperature is known, since their tokens are drawn at it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from so8tqc.config import CalibrateOptions
from so8tqc.records import Check
from so8tqc.services.calibrate.holdout import Split, split_texts
from so8tqc.services.calibrate.verdict import Calibration, calibrate_source, temperature_checks
from so8tqc.sources.protocol import EncodedText, TokenIds

V = 40


OPTIONS = CalibrateOptions(resamples=300)


class FakeSource:
    """Logits that were made beforehand, found by the text's tokens."""

    def __init__(self, logits: dict[bytes, np.ndarray], vocab_size: int = V) -> None:
        self.name = "fake"
        self.vocab_size = vocab_size
        self.passes = 0
        self.closed = False
        self._logits = logits

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        self.passes += 1
        z = torch.from_numpy(self._logits[tokens.tobytes()])
        yield from z[first:].split(rows)

    def close(self) -> None:
        self.closed = True


World = tuple[FakeSource, list[EncodedText], Split]


def text_of(number: int, tokens: np.ndarray) -> EncodedText:
    return EncodedText(f"t{number}", tokens, "en" if number % 2 else "ja", f"c{number % 3}")


def world(temperature: float, *, seed: int = 0, texts: int = 16, tokens: int = 120) -> World:
    """Each next token is drawn from softmax(z / temperature)."""
    generator = np.random.default_rng(seed)
    logits, encoded = {}, []
    for number in range(texts):
        z = (generator.normal(size=(tokens, V)) * 2.5).astype(np.float32)
        following = (z / temperature + generator.gumbel(size=z.shape)).argmax(axis=1)
        ids = np.concatenate([[number], following[:-1]]).astype(np.int64)
        logits[ids.tobytes()] = z
        encoded.append(text_of(number, ids))
    return FakeSource(logits), encoded, split_texts(encoded, 0.5, 0)


def calibrate(known: World, options: CalibrateOptions = OPTIONS) -> Calibration:
    source, texts, split = known
    return calibrate_source(source, texts, split, options)


def check_of(calibration: Calibration, name: str) -> Check:
    return next(c for c in temperature_checks(calibration) if c.id == f"calibration.{name}")


def sure_misses() -> World:
    """Calibrated at T = 1, yet every miss goes to a token the model rules out.

    A higher temperature saves much NLL on the misses and makes all the rest under-confident.
    """
    generator = np.random.default_rng(0)
    logits, encoded = {}, []
    for number in range(16):
        following = np.ones(100, dtype=np.int64)
        following[generator.uniform(size=100) < 0.2] = 2
        ids = np.concatenate([[number], following[:-1]])
        z = np.full((100, V), -1.0, dtype=np.float32)
        z[:, 1] = np.log(0.8 / (0.2 / 38)) - 1.0  # p = 0.8, right four times in five
        z[:, 2] = -6.0
        logits[ids.tobytes()] = z
        encoded.append(text_of(number, ids))
    return FakeSource(logits), encoded, split_texts(encoded, 0.5, 0)


def two_languages(english: float, japanese: float, seed: int = 0) -> World:
    """As _world, with a temperature for each language."""
    generator = np.random.default_rng(seed)
    logits, encoded = {}, []
    for number in range(40):
        text = text_of(number, np.empty(0))
        z = (generator.normal(size=(100, V)) * 2.5).astype(np.float32)
        temperature = english if text.language == "en" else japanese
        following = (z / temperature + generator.gumbel(size=z.shape)).argmax(axis=1)
        ids = np.concatenate([[number], following[:-1]]).astype(np.int64)
        logits[ids.tobytes()] = z
        encoded.append(text_of(number, ids))
    return FakeSource(logits), encoded, split_texts(encoded, 0.5, 0)


def entropy_world(b: float, seed: int = 0) -> World:
    """Next tokens drawn from softmax(z / (1 + b·H)), sure and unsure positions."""
    generator = np.random.default_rng(seed)
    logits, encoded = {}, []
    for number in range(30):
        z = generator.normal(size=(150, V)) * generator.uniform(0.5, 5.0, size=(150, 1))
        p = torch.from_numpy(z).softmax(dim=1)
        entropy = torch.special.entr(p).sum(dim=1, keepdim=True).numpy()
        following = (z / (1.0 + b * entropy) + generator.gumbel(size=z.shape)).argmax(axis=1)
        ids = np.concatenate([[number], following[:-1]]).astype(np.int64)
        logits[ids.tobytes()] = z.astype(np.float32)
        encoded.append(text_of(number, ids))
    return FakeSource(logits), encoded, split_texts(encoded, 0.5, 0)
