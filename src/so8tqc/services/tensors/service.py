"""All tensors of a GGUF file, and the checks that follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from so8tqc.check_guide import DIAGNOSES
from so8tqc.gguf.file import GGUFFile
from so8tqc.gguf.tensor_map import GENERATED
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.tensors import TensorRow
from so8tqc.records import Check, Diagnosis, judge, skipped
from so8tqc.services.tensors.expected import Expected
from so8tqc.services.tensors.judge import Case, judge_tensor
from so8tqc.services.tensors.verdict import SIGMAS
from so8tqc.threads import WORKERS, one_torch_thread

_CODES = {
    "coarser source": "coarser_source",
    "edited": "foreign_edit",
    "other tensor": "other_tensor",
    "damaged": "damaged_tensor",
    "unexplained": "foreign_edit",
}
"""Verdict → code of its diagnosis."""


def judge_tensors(
    gguf: GGUFFile, expected: Expected, progress: Progress = SILENT
) -> list[TensorRow]:
    """Every tensor of a file, in its order."""
    case = Case(gguf, expected)

    def work(name: str) -> TensorRow:
        row = judge_tensor(case, name)
        task.advance(gguf.tensors[name].elements, item=name)
        return row

    names = [name for name in gguf.tensors if name in expected.names]
    total = sum(gguf.tensors[name].elements for name in names)
    with (
        progress.task("judging the tensors", total=total, unit="weights") as task,
        one_torch_thread(),
        ThreadPoolExecutor(max_workers=WORKERS) as pool,
    ):
        return _alone(list(pool.map(work, names)))


def _alone(rows: list[TensorRow]) -> list[TensorRow]:
    """Doubt that tensors are compensated which do not show it together, or most of whose kind are
    not.

    Who makes up for errors does so in every layer; a change of low rank, which makes errors of
    columns go together, too, is mostly one of a few tensors.
    """
    kinds = Counter(row.role for row in rows if row.honest)
    compensated = Counter(row.role for row in rows if row.verdict == "compensated")

    sigmas = [row.together for row in rows if row.verdict == "compensated" and row.together]
    shown = sum(sigmas) > SIGMAS * len(sigmas) ** 0.5

    def doubted(row: TensorRow) -> TensorRow:
        if row.verdict != "compensated":
            return row
        if shown and 2 * compensated[row.role] > kinds[row.role]:
            return row
        others = kinds[row.role] - compensated[row.role]
        words = f"{row.detail}, which {others} others of its kind are not: weights were added"
        return row.model_copy(update={"verdict": "edited", "detail": words})

    return [doubted(row) for row in rows]


def wrong_of(rows: Sequence[TensorRow]) -> list[TensorRow]:
    """The tensors that no honest encoder explains."""
    return [row for row in rows if not row.honest and row.verdict != "not looked at"]


def tensor_checks(
    rows: Sequence[TensorRow], gguf: GGUFFile, expected: Expected, subject: str = ""
) -> list[Check]:
    """``tensors.honest``, ``tensors.missing``, ``tensors.extra`` and ``tensors.seen``."""
    wrong = wrong_of(rows)
    seen = [row for row in rows if row.verdict != "not looked at"]
    unseen = [row.name for row in rows if row.verdict == "not looked at"]
    known = set(expected.names)
    extra = [name for name in gguf.tensors if name not in known and name not in GENERATED]
    if expected.conversion is None:  # names that the name map does not know may be anything
        unseen += extra
    checks = []
    if seen:
        first = f" First: {wrong[0].name}, {wrong[0].verdict}: {wrong[0].detail}." if wrong else ""
        detail = (
            f"{len(seen) - len(wrong)} of {len(seen)} tensors are what an honest encoder of their "
            f"type stores ({_listed(rows)}).{first}"
        )
        checks.append(judge("tensors.honest", len(wrong), 0, subject=subject, detail=detail))
        lacks = _none("tensors.missing", _missing(gguf, expected), "The file lacks", subject)
        checks.append(lacks)
        if expected.conversion is not None:
            checks.append(_none("tensors.extra", extra, "Made of nothing in the model", subject))
    if unseen:
        reasons = [row.detail for row in rows if row.verdict == "not looked at"]
        reason = reasons[0] if reasons else expected.untraced
        detail = f"{len(unseen)} tensors were not looked at, first {unseen[0]}: {reason}."
        checks.append(skipped("tensors.seen", detail, subject=subject))
    return checks


def _missing(gguf: GGUFFile, expected: Expected) -> list[str]:
    """Tensors that the file lacks; without a history a tied head cannot be told from a lost one."""
    tied = {"output.weight"} if expected.conversion is None else set()
    return [name for name in expected.names if name not in gguf.tensors and name not in tied]


def _listed(rows: Sequence[TensorRow]) -> str:
    counts = Counter(row.verdict for row in rows)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())


def _none(check_id: str, names: Sequence[str], what: str, subject: str) -> Check:
    shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "") or "none"
    return judge(check_id, len(names), 0, subject=subject, detail=f"{what}: {shown}.")


def diagnose_tensors(rows: Sequence[TensorRow], subject: str) -> list[Diagnosis]:
    """One diagnosis for each kind of fault, with the tensors it concerns."""
    found = []
    codes = {row.name: _code(row) for row in wrong_of(rows)}
    for code in dict.fromkeys(codes.values()):
        concerned = [row for row in rows if codes.get(row.name) == code]
        shown = "; ".join(f"{row.name}: {row.detail}" for row in concerned[:3])
        more = f"; {len(concerned) - 3} more" if len(concerned) > 3 else ""
        fault = DIAGNOSES[code]
        found.append(
            Diagnosis(
                code=code,
                layers=tuple(sorted({r.layer for r in concerned if r.layer is not None})),
                text=f"{fault.finding}: {shown}{more} ({len(concerned)} of {len(rows)} tensors of "
                f"{subject}).",
                remedy=fault.remedy,
            )
        )
    return found


def _code(row: TensorRow) -> str:
    """Of a tensor whose codes are right and whose error is not, more rounding than it bears."""
    if row.verdict == "unexplained" and row.over_plain is not None and not row.outside:
        return "storage_rounding"
    return _CODES[row.verdict]
