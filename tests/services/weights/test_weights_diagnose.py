"""What was done instead: one diagnosis for each code, with its layers and the remedy."""

from __future__ import annotations

import pytest

from so8tqc.check_guide import DIAGNOSES, GUIDE
from so8tqc.records import Check, judge, skipped
from so8tqc.services.weights import diagnose as module
from so8tqc.services.weights.diagnose import (
    diagnose_logits,
    diagnose_structure,
    summarise_findings,
)
from so8tqc.services.weights.examine import Finding


def test_layers_with_one_code_are_one_diagnosis() -> None:
    findings = [
        Finding(3, "transposed", "Rᵀ instead of R"),
        Finding(0, "foreign_edit", "row 1"),
        Finding(1, "transposed", "Rᵀ instead of R"),
    ]
    first, second = summarise_findings(findings, 5, "baked")
    assert (first.code, first.layers) == ("transposed", (1, 3))
    assert first.text == (
        "The transposed rotation was folded: Rᵀ instead of R (2 of 5 tensors of baked)."
    )
    assert first.remedy == DIAGNOSES["transposed"].remedy
    assert (second.code, second.layers) == ("foreign_edit", (0,))


def test_not_baked_in_some_layers_has_a_name_of_its_own() -> None:
    missing = [Finding(i, "not_baked", "the base's") for i in range(2)]
    assert [d.code for d in summarise_findings(missing, 2, "m")] == ["not_baked"]
    assert [d.code for d in summarise_findings(missing, 3, "m")] == ["layer_missing"]


def test_few_notes_are_told_and_another_remedy_holds() -> None:
    findings = [Finding(i, "foreign_edit", f"note {i}") for i in range(9)]
    (found,) = summarise_findings(findings, 9, "m", {"foreign_edit": "Export again."})
    assert found.text.count("note") == 3
    assert found.remedy == "Export again."


def structure(check_id: str, value: float) -> Check:
    return judge(check_id, value, 0, detail=f"{value:.0f} tensor(s): w.")


def test_edits_beside_the_fold_are_named_by_their_checks() -> None:
    checks = [
        structure("structure.untouched", 2),
        structure("structure.finite", 1),
        structure("structure.config", 0),
        structure("algebra.exact", 9),
    ]
    found = {d.code: d for d in diagnose_structure(checks, "m")}
    assert set(found) == {"foreign_edit", "non_finite"}
    assert found["non_finite"].remedy == GUIDE["structure.finite"].remedy
    assert "in m: 1 tensor(s)" in found["non_finite"].text
    same = [structure("structure.untouched", 1), structure("structure.finite", 1)]
    assert [d.code for d in diagnose_structure(same, "m")] == ["non_finite"]  # the same tensor
    assert diagnose_structure([structure("structure.config", 0)], "m") == []


NEAREST = judge("algebra.nearest", 0, 0, detail="Right.", subject="q4")
FAR = judge("kl.mean", 0.9, 0.1, detail="Far.", subject="q4")
ERASED = judge("effect.survival", 0.1, 0.0, detail="No.", subject="q4", comparison="<")


@pytest.mark.parametrize(
    ("checks", "named", "wanted"),
    [
        ([NEAREST], (), []),
        ([NEAREST, FAR], (), [("storage_rounding", module._FINER)]),
        ([NEAREST, ERASED], (), [("storage_rounding", module._FINER)]),
        ([ERASED], (), [("not_baked", module.EXPORT)]),
        ([FAR], (), []),  # the files were not looked at: nothing is claimed
        ([NEAREST, FAR, ERASED], ("q4",), []),
        ([skipped("algebra.nearest", "unknown place", subject="q4"), ERASED], (),
         [("not_baked", module.EXPORT)]),
        ([judge("effect.kl", 0.0, 1e-5, detail="", comparison=">=")], (),
         [("storage_rounding", module._TRAIN)]),
    ],
)  # fmt: skip
def test_what_only_logits_show(
    checks: list[Check], named: tuple[str, ...], wanted: list[tuple[str, str]]
) -> None:
    assert [(d.code, d.remedy) for d in diagnose_logits(checks, named)] == wanted
