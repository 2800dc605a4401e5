"""JUnit XML: a check is a test case, so that every CI shows them."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as ET

from so8tqc.records import Check, Record, Verdict


def junit_xml(records: Sequence[Record]) -> str:
    """One test suite for each record."""
    root = ET.Element("testsuites")
    for record in records:
        verdicts = [check.verdict for check in record.checks]
        suite = ET.SubElement(
            root,
            "testsuite",
            name=f"so8tqc.{record.kind}",
            tests=str(len(verdicts)),
            failures=str(verdicts.count(Verdict.FAIL)),
            skipped=str(verdicts.count(Verdict.SKIP)),
            errors="0",
            time=f"{record.run.seconds:.3f}",
            timestamp=record.run.started.isoformat(timespec="seconds"),
        )
        for check in record.checks:
            _case(suite, record.kind, check)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ET.Element, kind: str, check: Check) -> None:
    name = f"{check.id} [{check.subject}]" if check.subject else check.id
    case = ET.SubElement(suite, "testcase", classname=f"so8tqc.{kind}.{check.group}", name=name)
    if check.verdict is Verdict.FAIL:
        message = f"value {check.value:.6g}, must be {check.comparison} {check.limit:.6g}"
        ET.SubElement(case, "failure", message=message).text = check.detail
    elif check.verdict is Verdict.SKIP:
        ET.SubElement(case, "skipped", message=check.detail)
