"""Test documents: what passes, what fails, and what they say."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from sectool.policy import TestResult, parse, run_tests

NOW = int(datetime(2026, 6, 1, tzinfo=UTC).timestamp()) * 1_000_000

RULES = """
kind: Policy
name: p
owner: o
rules:
  - allow app=web to call app=db on tcp/5432 encrypted
  - allow net:lan to call app=web on tcp/443
  - audit app=batch to call app=db
  - allow app=old to call app=db until 2026-05-01
---
kind: Guardrail
name: staged
owner: s
mode: stage
rules: [deny env=dev to call app=db]
---
kind: Network
name: lan
cidrs: [10.0.0.0/8]
---
kind: Test
name: t
"""


def run(lines: str) -> list[TestResult]:
    return run_tests(parse(RULES + lines, "f"), NOW)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("allow: ['app=web -> app=db tcp/5432']", ""),
        ("allow: ['app=web -> app=db tcp/5432 encrypted']", ""),
        ("allow: ['net:lan -> app=web tcp/443']", ""),
        ("allow: ['app=batch -> app=db tcp/1']", ""),
        ("deny: ['app=web -> app=db tcp/80']", ""),
        ("deny: ['ip:11.0.0.1 -> app=web tcp/443']", ""),
        ("deny: ['app=old -> app=db tcp/1']", ""),
        ("allow: ['app=web -> app=db tcp/80']", "must be allowed, but is denied by default"),
        (
            "deny: ['app=web -> app=db tcp/5432']",
            "must be denied, but is allowed by Policy p, rule 1 (owner o): allow",
        ),
        (
            "deny: ['app=batch -> app=db tcp/1']",
            "must be denied, but is let through for audit by Policy p, rule 3",
        ),
        (
            "allow: ['net:lan -> app=web tcp/443 encrypted']",
            "must be encrypted, but is allowed by Policy p, rule 2 (owner o): allow net:lan to call app=web on tcp/443 "
            "without encryption",
        ),
        ("allow: ['app=web,env=dev -> app=db tcp/5432']", ""),
        (
            "mode: stage\nallow: ['app=web,env=dev -> app=db tcp/5432']",
            "denied by Guardrail staged, rule 1 (owner s)",
        ),
        ("mode: stage\ndeny: ['app=web,env=dev -> app=db tcp/5432']", ""),
    ],
)
def test_one_line(lines: str, message: str) -> None:
    (result,) = run(lines)
    assert result.passed == (not message)
    assert message in result.message
    assert result.test == "t"
    assert result.where.startswith("f:")
    if message:
        assert result.lines()[1] == f"      at {result.where}: {result.message}"
        assert result.lines()[0].startswith("FAIL  t: ")
    else:
        assert result.lines() == [f"ok    t: {result.text}"]


def test_off_is_off_and_time_can_be_given() -> None:
    assert run("mode: off\nallow: ['app=x -> app=y tcp/1']") == []
    documents = parse(RULES + "allow: ['app=old -> app=db tcp/1']")
    year = 365 * 86_400_000_000
    assert [r.passed for r in run_tests(documents, NOW - year)] == [True]
    assert [r.passed for r in run_tests(documents, NOW + year)] == [False]
    assert len(run_tests(documents)) == 1


def test_lack_of_encryption_is_named() -> None:
    (result,) = run("allow: ['app=web -> net:lan tcp/5432']")
    assert not result.passed
    documents = parse(
        "kind: Policy\nname: p\nowner: o\nrules: [allow any to call any encrypted]\n---\n"
        "kind: Test\nname: t\nallow: ['app=web -> ip:192.0.2.1 tcp/1']\n"
    )
    (result,) = run_tests(documents, NOW)
    assert "denied for lack of encryption by Policy p" in result.message
