"""`sectool policy suggest`: what it prints is taken by the other commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sectool.events import Action
from sectool.labels import LabelSet
from tests.bench.history import End, Talk, write_history

Cli = Callable[..., Any]

DB = End(LabelSet({"app": "db", "env": "prod", "host": "h9"}), "10.0.0.9/32")
WEBS = [End(LabelSet({"app": "web", "env": "prod", "host": f"h{n}"}), f"10.0.0.{n}/32") for n in range(1, 4)]


@pytest.fixture
def past(tmp_path: Path) -> Path:
    """A folder of segments: three web servers call a database, clients the web, a scanner is denied."""
    folder = tmp_path / "past"
    talks = [Talk(web, DB, low=5432, high=5432, weight=5, action=Action.AUDIT) for web in WEBS]
    talks += [Talk(End(None, "10.7.0.0/16"), web, weight=20) for web in WEBS]
    talks.append(Talk(End(None, "192.0.2.1/32"), DB, low=22, high=22, action=Action.DENY, drop_reason=1))
    write_history(folder, talks, 400, 5)
    return folder


def test_its_text_covers_the_past_and_leaves_the_scanner_out(inside: Cli, tmp_path: Path, past: Path) -> None:
    done = inside("policy", "suggest", "--store", past, "--owner", "team-shop")
    assert done.code == 0
    assert "allow app=web,env=prod to call app=db,env=prod on tcp/5432" in done.out
    assert "allow net:10.7.0.0/16 to call app=web,env=prod on tcp/443" in done.out
    assert "denied because no rule allowed them" in done.out
    file = tmp_path / "suggested.yaml"
    file.write_text(done.out)
    assert inside("policy", "test", file).code == 0
    judged = json.loads(inside("policy", "backtest", file, "--store", past, "--staged", "-o", "json").out)
    assert judged["regressions"] is False
    assert judged["changed"]["newly_allowed"] == 0
    again = inside("policy", "suggest", "--store", past, "--owner", "team-shop")
    assert again.out == done.out


def test_only_for_some_and_only_what_is_missing(inside: Cli, tmp_path: Path, past: Path) -> None:
    done = inside("policy", "suggest", "--store", past, "--for", "app=db", "-o", "json")
    rules = json.loads(done.out)["items"]
    assert [rule["rule"] for rule in rules] == ["allow app=web,env=prod to call app=db,env=prod on tcp/5432"]
    assert (rules[0]["pairs_seen"], rules[0]["pairs_covered"]) == (3, 3)
    file = tmp_path / "base.yaml"
    file.write_text("kind: Policy\nname: all\nowner: me\nrules: [allow any to call any]\n")
    nothing = inside("policy", "suggest", "--store", past, "--base", file)
    assert nothing.code == 1
    assert "Nothing to suggest" in nothing.out
    assert inside("policy", "suggest", "--store", past, "--base", file, "--anew").code == 0


def test_a_bad_selector_is_pointed_at(inside: Cli, past: Path) -> None:
    done = inside("policy", "suggest", "--store", past, "--for", "app=web to")
    assert done.code == 2
    assert "--for:1:9" in done.err
