"""What `calibrate` found, as a transformers logits processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor

from so8tqc.disk.temperature_file import read_temperature, require_fitted_on
from so8tqc.errors import DataError


class AdaptiveTemperature(LogitsProcessor):  # type: ignore[misc]
    """Divides next-token logits by a temperature that may depend on their entropy.

    T(H) = a + b·H, held within bounds, with H = −Σ_v p_v ln p_v (nats) of p = softmax(z); one
    number T is a = T, b = 0. It belongs before anything that changes the logits (top-k, top-p,
    another temperature), where transformers puts the processors that it is handed.

    Args:
        a: temperature at zero entropy.
        b: per nat.
        bounds: least and largest temperature, 0 < low ≤ high.

    Raises:
        ValueError: a number is not finite, or the bounds are not ordered.

    Example:
        >>> processor = AdaptiveTemperature.from_config("calibrate/temperature_config.json")
        >>> model.generate(**inputs, do_sample=True, logits_processor=[processor])
    """

    def __init__(self, a: float, b: float = 0.0, bounds: tuple[float, float] = (0.5, 3.0)) -> None:
        low, high = bounds
        if not all(map(_finite, (a, b, low, high))) or not 0 < low <= high:
            raise ValueError(f"no temperature: a = {a}, b = {b}, bounds = {low}, {high}")
        self.a, self.b, self.bounds = float(a), float(b), (float(low), float(high))

    @classmethod
    def from_config(
        cls,
        path: str | Path,
        *,
        model: str | Path | None = None,
        language: str | None = None,
        category: str | None = None,
    ) -> AdaptiveTemperature:
        """The best-supported temperature of a ``temperature_config.json``.

        That of the group, if one is named and held-out text supports temperatures by its axis;
        else T(H), if held-out text supports that; else the single temperature to use (1 where not
        even that is significant).

        Args:
            path: the file, as ``so8tqc calibrate`` wrote it.
            model: the GGUF that is served; a temperature that was fitted on another is refused.
            language: of the text to come, as its evaluation texts named it.
            category: domain of the text to come, likewise; the language goes first.

        Raises:
            DataError: the file is not such a configuration, was fitted on another model, or knows
                no such group.
        """
        config = read_temperature(Path(path))
        if model is not None:
            require_fitted_on(config, Path(model), str(path))
        try:
            low, high = config["bounds"]
            one = _group_temperature(config, path, language=language, category=category)
            rule = config["entropy_temperature"]
            if one is None and rule["significant"]:
                return cls(rule["a"], rule["b"], tuple(rule["bounds"]))
            return cls(config["temperature"] if one is None else one, 0.0, (low, high))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a temperature configuration: {error}", where=str(path)) from None

    def temperatures(self, scores: torch.Tensor) -> torch.Tensor:
        """T of each row: [..., V] logits → [..., 1] float32 (float64 for float64 logits)."""
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.b == 0.0:
            temperature = torch.full_like(wide[..., :1], self.a)
        else:
            entropy = torch.special.entr(wide.softmax(dim=-1)).sum(dim=-1, keepdim=True)
            temperature = self.a + self.b * entropy
        return temperature.clamp(*self.bounds)

    def __call__(
        self,
        input_ids: torch.Tensor,  # noqa: ARG002 - transformers passes it to every processor
        scores: torch.Tensor,
    ) -> torch.Tensor:
        """z / T(H) in the dtype of the logits: [B, V] → [B, V]; −inf stays −inf."""
        return (scores / self.temperatures(scores)).to(scores.dtype)


def _finite(value: float) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")


def _group_temperature(
    config: Mapping[str, Any], path: str | Path, **labels: str | None
) -> float | None:
    """The temperature of the first named group whose axis is supported."""
    for axis, label in labels.items():
        groups = config["group_temperatures"][axis]
        if label is None or not groups["significant"]:
            continue
        if label not in groups["temperatures"]:
            known = ", ".join(groups["temperatures"])
            raise DataError(f"no {axis} {label!r}", where=str(path), remedy=f"There are {known}.")
        return float(groups["temperatures"][label]["temperature"])
    return None
