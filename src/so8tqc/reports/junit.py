"""JUnit XML: a check is a test case, so that every CI shows them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from so8tqc.records import Check, Record, Verdict
from so8tqc.reports import commands

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, not even escaped."""


def junit_xml(records: Sequence[Record]) -> str:
    """One test suite for each record."""
    root = ET.Element("testsuites")
    for record in records:
        failures = sum(check.failed for check in record.checks)
        suite = ET.SubElement(
            root,
            "testsuite",
            name=f"so8tqc.{record.kind}",
            tests=str(len(record.checks)),
            failures=str(failures),
            skipped=str(sum(c.verdict is not Verdict.PASS for c in record.checks) - failures),
            errors="0",
            time=f"{record.run.seconds:.3f}",
            timestamp=record.run.started.isoformat(timespec="seconds"),
        )
        for check in record.checks:
            _case(suite, record.kind, check)
    for element in root.iter():
        _clean(element)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ET.Element, kind: str, check: Check) -> None:
    name = f"{check.id} [{check.subject}]" if check.subject else check.id
    case = ET.SubElement(suite, "testcase", classname=f"so8tqc.{kind}.{check.group}", name=name)
    if check.verdict is Verdict.FAIL:
        message = f"value {_number(check.value)}, must be {check.comparison} {_number(check.limit)}"
        if check.allowed:  # JUnit knows no failure that does not count
            ET.SubElement(case, "skipped", message=f"failed, allowed: {message}")
        else:
            ET.SubElement(
                case, "failure", message=message
            ).text = f"{check.detail}\n{commands.command('explain', check.id)}"
    elif check.verdict is Verdict.SKIP:
        ET.SubElement(case, "skipped", message=check.detail)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


def _clean(element: ET.Element) -> None:
    """File names and tools' messages may hold control characters; show them as U+FFFD."""
    for key, value in element.attrib.items():
        element.set(key, _NOT_XML.sub("\ufffd", value))
    if element.text:
        element.text = _NOT_XML.sub("\ufffd", element.text)
