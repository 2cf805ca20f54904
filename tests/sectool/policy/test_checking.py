"""What a pipeline asks: parse, lint, conflicts, tests; and the report it shows."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from sectool.cli.main import main
from sectool.policy.checking import check_files
from sectool.policy.junit import junit

NOW = 1_780_000_000_000_000
GOOD = """kind: Policy
name: shop
owner: team-shop
rules: [allow app=web to call app=db on tcp/5432]
---
kind: Test
name: shop works
allow: [app=web -> app=db tcp/5432]
deny: [app=web -> app=db tcp/22]
"""
PARTLY = GOOD + "---\nkind: Guardrail\nname: box\nowner: security\nrules: [deny env=dev to call env=prod]\n"
VOID = GOOD + "---\nkind: Guardrail\nname: box\nowner: security\nrules: [deny app=web to call any]\n"
UNUSED = GOOD + "---\nkind: Network\nname: lan\ncidrs: [10.0.0.0/8]\n"


@pytest.mark.parametrize(
    ("text", "passed", "strict"),
    [
        (GOOD, True, True),
        (PARTLY, True, False),
        (UNUSED, True, False),
        (VOID, False, False),
        (GOOD.replace("tcp/22", "tcp/5432"), False, False),
    ],
)
def test_what_passes(tmp_path: Path, text: str, passed: bool, strict: bool) -> None:
    (tmp_path / "a.yaml").write_text(text)
    checked = check_files([tmp_path], NOW)
    assert (checked.passed(), checked.passed(strict=True)) == (passed, strict)


def test_staged_rules_that_would_be_void_stop_nobody(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(VOID.replace("owner: security", "owner: security\nmode: stage"))
    assert check_files([tmp_path], NOW).passed()


def test_the_report(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(VOID)
    root = ElementTree.fromstring(junit(check_files([tmp_path], NOW)))
    assert (root.get("tests"), root.get("failures")) == ("3", "2")
    tests, conflicts = root
    failed = [case for case in tests if case.find("failure") is not None]
    assert [case.get("name") for case in failed] == ["allow app=web -> app=db tcp/5432"]
    assert failed[0].get("classname") == "shop works"
    assert failed[0].get("line") == "8"
    failure = conflicts[0].find("failure")
    assert failure is not None
    assert failure.get("type") == "void"
    assert "deny app=web to call any" in str(failure.text)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(VOID)
    report = tmp_path / "out.xml"
    assert main(["policy", "check", str(tmp_path), "--junit", str(report)]) == 1
    said = capsys.readouterr()
    assert "void: Policy shop, rule 1 (owner team-shop) at" in said.out
    assert "FAIL  shop works: app=web -> app=db tcp/5432" in said.out
    assert report.read_text().startswith("<?xml")
    (tmp_path / "a.yaml").write_text(PARTLY)
    assert main(["policy", "check", str(tmp_path)]) == 0
    assert main(["policy", "check", str(tmp_path), "--strict"]) == 1
    assert main(["policy", "check", str(tmp_path), "-o", "json"]) == 0
    assert '"schema": "sectool.policy-check/1"' in capsys.readouterr().out
    (tmp_path / "a.yaml").write_text("kind: Polcy\n")
    assert main(["policy", "check", str(tmp_path)]) == 2
    assert "a.yaml:1:7" in capsys.readouterr().err
    assert main(["policy", "check", str(tmp_path), "--junit", "/no/such/folder/x.xml"]) == 2
