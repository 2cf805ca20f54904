"""`sectool policy diff --effective` on files and a history."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sectool.labels import LabelSet
from tests.bench.history import End, Talk, write_history

Cli = Callable[..., Any]


def policy(path: Path, rule: str) -> Path:
    path.write_text(f"kind: Policy\nname: shop\nowner: team-shop\nrules: ['{rule}']\n")
    return path


def test_files(inside: Cli, tmp_path: Path) -> None:
    old = policy(tmp_path / "old.yaml", "allow app=web to call app=db on tcp/5432")
    new = policy(tmp_path / "new.yaml", "allow app in (web) to call app=db on tcp/5432,tcp/22")
    web, db = (End(LabelSet({"app": app}), "10.0.0.1/32") for app in ("web", "db"))
    write_history(tmp_path / "past", [Talk(web, db)], 2, 1)
    done = inside("policy", "diff", "--effective", old, new, "--store", tmp_path / "past", "-o", "json")
    assert done.code == 1
    document = json.loads(done.out)
    known, possible = document["items"]
    assert (known["effect"], known["services"], known["pairs"]) == ("newly_allowed", "tcp/22", 1)
    assert (possible["effect"], possible["services"], possible["known"]) == ("newly_allowed", "tcp/22", False)
    assert "newly allowed" in inside("policy", "diff", "--effective", old, new).out


def test_the_same_in_other_words(inside: Cli, tmp_path: Path) -> None:
    old = policy(tmp_path / "old.yaml", "allow app=web to call app=db on tcp/5432")
    new = policy(tmp_path / "new.yaml", "allow app in (web) to call app=db on tcp/5432")
    assert inside("policy", "diff", old, new).code == 1
    done = inside("policy", "diff", "--effective", old, new)
    assert (done.code, done.out) == (0, "")
    assert "no difference in effect" in done.err
