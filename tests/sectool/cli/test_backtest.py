"""`sectool policy backtest` as a pipeline uses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sectool.labels import LabelSet
from tests.bench.history import End, Talk, write_history

Cli = Callable[..., Any]

WEB = End(LabelSet({"app": "web"}), "10.0.0.1/32")
DB = End(LabelSet({"app": "db"}), "10.0.0.2/32")
RULE = "allow app=web to call app=db on tcp/5432"


@pytest.fixture
def past(tmp_path: Path) -> Path:
    """A folder of segments: 8 flows of web to db, 2 from outside."""
    folder = tmp_path / "past"
    outside = Talk(
        End(None, "192.0.2.7/32"), DB, low=22, high=22, weight=1, rule="allow any to call app=db on tcp/22"
    )
    write_history(folder, [Talk(WEB, DB, low=5432, high=5432, weight=3, rule=RULE), outside], 10, 3)
    return folder


def candidate(tmp_path: Path, *rules: str, mode: str = "enforce") -> Path:
    file = tmp_path / "candidate.yaml"
    lines = "".join(f"- {rule}\n" for rule in rules)
    file.write_text(f"kind: Policy\nname: shop\nowner: team-shop\nmode: {mode}\nrules:\n{lines}")
    return file


def test_regressions_exit_1(inside: Cli, tmp_path: Path, past: Path) -> None:
    file = candidate(tmp_path, RULE)
    done = inside("policy", "backtest", file, "--store", past)
    assert done.code == 1
    assert "newly denied" in done.out
    assert "ip:192.0.2.7" in done.out
    assert "10 flows" in done.err
    assert inside("policy", "backtest", file, "--store", past, "--until", "2020-01-01").code == 0


def test_as_data(inside: Cli, tmp_path: Path, past: Path) -> None:
    done = inside("policy", "backtest", candidate(tmp_path, RULE), "--store", past, "-o", "json")
    document = json.loads(done.out)
    assert document["schema"] == "sectool.policy-backtest/1"
    assert document["regressions"] is True
    (item,) = document["items"]
    assert (item["kind"], item["source"], item["service"]) == ("newly_denied", "ip:192.0.2.7", "tcp/22")
    assert item["flows"] + 0 == document["changed"]["newly_denied"] < document["flows"] == 10
    assert item["was"] == "Policy past: allow any to call app=db on tcp/22"


def test_staged_documents_are_judged_when_asked(inside: Cli, tmp_path: Path, past: Path) -> None:
    file = candidate(tmp_path, RULE, "allow any to call app=db on tcp/22", mode="stage")
    assert inside("policy", "backtest", file, "--store", past).code == 1
    assert inside("policy", "backtest", file, "--store", past, "--staged", "--strict").code == 0
    wider = candidate(tmp_path, RULE, "audit any to call app=db on tcp/22")
    assert inside("policy", "backtest", wider, "--store", past).code == 0
    assert inside("policy", "backtest", wider, "--store", past, "--strict").code == 1


def test_a_folder_without_history_is_named(inside: Cli, tmp_path: Path) -> None:
    done = inside("policy", "backtest", candidate(tmp_path, RULE), "--store", tmp_path / "nowhere")
    assert done.code == 4
    assert "there is no history in" in done.err


def test_a_state_folder_or_bundle_stands_for_the_segments_in_it(
    inside: Cli, tmp_path: Path, past: Path
) -> None:
    home = tmp_path / "state"
    home.mkdir()
    past.rename(home / "events")
    assert "10 flows" in inside("policy", "backtest", candidate(tmp_path, RULE), "--store", home).err


def test_a_folder_without_segments_is_no_green_back_test(inside: Cli, tmp_path: Path) -> None:
    done = inside("policy", "backtest", candidate(tmp_path, RULE), "--store", tmp_path)
    assert done.code == 2
    assert "no segments" in done.err
