"""Which checks count: patterns of --fail-on and --allow against a literal restatement."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from so8tqc.records import Check, Verdict, judge, overall, skipped
from so8tqc.services.qc.profiles import load_profile
from so8tqc.services.qc.tuning import tuned

IDS = ("kl.mean", "kl.max", "algebra.exact", "structure.config")
PATTERNS = ("kl.*", "*", "algebra.exact", "structure.conf", "*.max", "kl.maen")


def check(check_id: str, verdict: Verdict) -> Check:
    if verdict is Verdict.SKIP:
        return skipped(check_id, "not looked at")
    return judge(check_id, float(verdict is Verdict.FAIL), 0.5, detail="Measured.")


patterns = st.lists(st.sampled_from(PATTERNS), max_size=3, unique=True)


@given(st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from(Verdict))), patterns, patterns)
def test_what_counts_is_chosen_and_not_allowed(
    drawn: list[tuple[str, Verdict]], fail_on: list[str], allow: list[str]
) -> None:
    checks = [check(*one) for one in drawn]
    result, notices = tuned(checks, load_profile("default"), fail_on, allow)
    failing = False
    for before, after in zip(checks, result[: len(checks)], strict=True):
        chosen = not fail_on or any(fnmatch.fnmatch(before.id, p) for p in fail_on)
        free = any(fnmatch.fnmatch(before.id, p) for p in allow)
        counts = chosen and not free
        assert after.allowed == (before.verdict is not Verdict.PASS and not counts)
        assert after.verdict is before.verdict
        failing |= counts and before.verdict is Verdict.FAIL
    here = {one.id for one in checks}
    idle = [p for p in fail_on if not any(fnmatch.fnmatch(i, p) for i in here)]
    assert (overall(result) is Verdict.FAIL) == (failing or bool(idle))
    assert [one.id for one in result[len(checks) :]] == ["profile.fail_on"] * bool(idle)
    told = " ".join(notices)
    for pattern in allow:
        used = any(fnmatch.fnmatch(i, pattern) for i in here)
        assert (f"--allow {pattern} matches no check" in told) == (not used)


@pytest.mark.parametrize("skips", ["allow", "forbid"])
def test_a_profile_can_forbid_skips(skips: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"mine: {{skips: {skips}, models: {{}}, gguf: {{default: {{}}}}}}\n")
    profile = load_profile(str(own))
    found = [
        judge("kl.mean", 0.0, 1.0, detail="Near."),
        skipped("algebra.nearest", "an unknown place"),
    ]
    checks, _ = tuned(found, profile, (), ())
    assert overall(checks) is (Verdict.PASS if skips == "allow" else Verdict.FAIL)
    if skips == "forbid":
        (forbidden,) = [check for check in checks if check.id == "profile.skips"]
        assert "algebra.nearest" in forbidden.detail
        checks, _ = tuned(found, profile, (), ("algebra.*",))
        assert overall(checks) is Verdict.PASS
