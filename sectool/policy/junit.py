"""Findings as JUnit XML, which every CI system shows: one test case per line of a Test, and one per grave conflict."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement, indent, tostring

from sectool.policy.checking import Checked
from sectool.policy.conflicts import SAYS, Conflict
from sectool.policy.yamlpos import clean


def junit(checked: Checked) -> str:
    """The report, one suite for tests and one for conflicts."""
    grave = checked.grave
    root = Element(
        "testsuites", name="sectool policy", tests=str(len(checked.tests) + len(grave)),
        failures=str(checked.failed + len(grave)),
    )  # fmt: skip
    tests = SubElement(
        root, "testsuite", name="tests", tests=str(len(checked.tests)), failures=str(checked.failed)
    )
    for result in checked.tests:
        verb = "allow" if result.allow else "deny"
        case = _case(tests, clean(result.test), clean(f"{verb} {result.text}"), result.where)
        if not result.passed:
            _fail(case, "test", result.message, f"{result.where}: {result.message}")
    conflicts = SubElement(
        root, "testsuite", name="conflicts", tests=str(len(grave)), failures=str(len(grave))
    )
    for conflict in grave:
        case = _case(conflicts, conflict.rule.policy, conflict.rule.text, conflict.rule.where)
        _fail(case, str(conflict.kind), _about(conflict), "\n".join(conflict.lines()))
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _case(suite: Element, group: str, name: str, where: str) -> Element:
    file, _, rest = where.rpartition(":")
    file, _, line = file.rpartition(":")
    at = {"file": file, "line": line} if line.isdigit() and rest.isdigit() else {}
    return SubElement(suite, "testcase", classname=group, name=name, attrib=at)


def _fail(case: Element, kind: str, message: str, text: str) -> None:
    failure = SubElement(case, "failure", type=kind, message=clean(message))
    failure.text = "\n".join(clean(line) for line in text.split("\n"))


def _about(conflict: Conflict) -> str:
    return f"{conflict.rule.title}: {conflict.why or SAYS[conflict.kind]}"
