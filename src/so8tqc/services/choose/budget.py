"""What a user asks a file to keep: a budget of size, KL or agreement, and whether it is kept."""

from __future__ import annotations

from dataclasses import dataclass

from so8tqc import wording
from so8tqc.config import ChoiceOptions
from so8tqc.record_kinds.choose import Row
from so8tqc.records import Check, judge


@dataclass(frozen=True)
class Budget:
    """What is asked of a file; None asks nothing.

    Attributes:
        max_kl: nats.
        min_top1: share.
        max_bytes: of the file.
        by_interval: whether the whole 95 % interval must keep the budget, not only the value.
    """

    max_kl: float | None
    min_top1: float | None
    max_bytes: int | None
    by_interval: bool

    @property
    def asks_quality(self) -> bool:
        """Whether anything but the size is asked."""
        return self.max_kl is not None or self.min_top1 is not None

    def kl(self, row: Row) -> float:
        """The KL that is judged."""
        return row["kl_ci95"][1] if self.by_interval and row["kl_ci95"] else row["kl_mean"]

    def top1(self, row: Row) -> float:
        """The share of top tokens that is judged."""
        return row["top1_ci95"][0] if self.by_interval and row["top1_ci95"] else row["top1"]

    def missed_quality(self, row: Row) -> list[str]:
        """What a row misses, its size aside; empty if nothing."""
        missed = []
        if self.max_kl is not None and not self.kl(row) <= self.max_kl:
            missed.append(f"KL {self.kl(row):.4g} > {self.max_kl:g}")
        if self.min_top1 is not None and not self.top1(row) >= self.min_top1:
            missed.append(
                f"same top {wording.percent(self.top1(row))} < {wording.percent(self.min_top1)}"
            )
        if row.get("survives") is False:
            missed.append("the gate does not survive")
        return missed

    def missed(self, row: Row) -> list[str]:
        """All that a row misses."""
        missed = self.missed_quality(row)
        if self.max_bytes is not None and row["bytes"] > self.max_bytes:
            missed.append(f"{wording.size(row['bytes'])} > {wording.size(self.max_bytes)}")
        return missed

    def __str__(self) -> str:
        parts = []
        if self.max_kl is not None:
            parts.append(f"mean KL ≤ {self.max_kl:g}")
        if self.min_top1 is not None:
            parts.append(f"same top ≥ {wording.percent(self.min_top1)}")
        if self.max_bytes is not None:
            parts.append(f"size ≤ {wording.size(self.max_bytes)}")
        said = ", ".join(parts)
        return f"{said}, by the whole 95 % interval" if self.by_interval else said


def budget_of(config: ChoiceOptions) -> Budget:
    """The budget that was asked for."""
    return Budget(
        config.max_kl,
        config.min_top1,
        None if config.max_size is None else int(config.max_size),
        config.judge_by == "interval",
    )


def verdicts(row: Row, name: str, budget: Budget, config: ChoiceOptions) -> list[Check]:
    """What the recommended or best found file is judged by."""
    checks = []
    if budget.max_kl is not None:
        detail = f"Mean KL to the reference of the file chosen, by the {config.judge_by}."
        checks.append(
            judge("budget.kl", budget.kl(row), budget.max_kl, subject=name, unit="nats",
                  ci95=row["kl_ci95"], detail=detail)
        )  # fmt: skip
    if budget.min_top1 is not None:
        detail = f"Share of the reference's top tokens that are kept, by the {config.judge_by}."
        checks.append(
            judge("budget.top1", budget.top1(row), budget.min_top1, comparison=">=", subject=name,
                  ci95=row["top1_ci95"], detail=detail)
        )  # fmt: skip
    if budget.max_bytes is not None:
        checks.append(
            judge("budget.size", row["bytes"], budget.max_bytes, subject=name, unit="bytes",
                  detail="Size of the file chosen.")
        )  # fmt: skip
    if "survival" in row:
        told = (
            "Upper end of KL to the gated model minus KL to the base: negative if the gate "
            "survives in the file."
        )
        checks.append(
            judge("effect.survival", row["survival"], 0.0, comparison="<", subject=name,
                  unit="nats", detail=told)
        )  # fmt: skip
    return checks
