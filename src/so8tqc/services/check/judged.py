"""What was found of a thing so far, and the words of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from so8tqc.records import Check, Diagnosis, FileRef, Verdict
from so8tqc.reports.commands import command
from so8tqc.wording import counted


@dataclass
class Judged:
    """What was found so far.

    Attributes:
        what: what it is, a sentence.
        checks, diagnosis, notices: as in a record.
        proofs: what passed, in words, the strongest last.
        unseen: what was not looked at, and what to give for it.
        found: role → what was found beside it and used.
        next: the command that comes next, filled in.
        serve: how a trustworthy file is given to a runtime, "" for others.
        problem: why it cannot be judged at all, "" if it can.
        proved: whether it was compared with what it should be, and not only with itself.
    """

    what: str
    checks: list[Check] = field(default_factory=list)
    diagnosis: list[Diagnosis] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    proofs: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    found: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, FileRef] = field(default_factory=dict)
    next: str = ""
    serve: str = ""
    problem: str = ""
    proved: bool = False

    def add(self, checks: Sequence[Check], proof: str = "") -> bool:
        """Add checks, and what they prove if none of them failed; whether none did."""
        self.checks += checks
        good = all(check.verdict is not Verdict.FAIL for check in checks)
        if good and proof and any(check.verdict is Verdict.PASS for check in checks):
            self.proofs.append(proof)
        return good

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.failed]

    @property
    def judged(self) -> bool:
        """Whether anything was."""
        return any(check.verdict is not Verdict.SKIP for check in self.checks)

    def trust(self) -> str:
        """Whether it is to be trusted, a sentence or two."""
        if self.problem:
            return f"Not to be used: {_sentence(self.problem)}"
        if self.failed:
            first = self.diagnosis[0].text if self.diagnosis else self.failed[0].detail
            more = len(self.failed) - 1
            others = f" ({counted(more, 'more check')} failed, too)" if more else ""
            return f"Not to be trusted: {_sentence(first)}{others}"
        if not self.judged:
            return "Not judged: there is nothing here that it could be judged by."
        shown = "; ".join(reversed(self.proofs))
        if self.proved:
            return f"Trustworthy: {_sentence(shown)}"
        return f"Sound, as far as it tells by itself: {_sentence(shown)}"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."


def told(*parts: object) -> str:
    """A command of so8tqc as a shell line."""
    return command(*parts)


def reading_flags(words: Mapping[str, object]) -> list[str]:
    """``--convention column`` and so on, of what is known."""
    names = ("parametrization", "convention", "site")
    return [part for n in names if words.get(n) for part in (f"--{n}", str(words[n]))]


def named(path: Path) -> str:
    """A path's last part, for sentences."""
    return path.name or str(path)
