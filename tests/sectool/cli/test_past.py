"""Commands that ask about the past, run as their user runs them, on the files of a small history."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sectool.cli.conftest import Cli
from tests.store.conftest import StoreLab
from tests.store.shop import HOUR, fill, settle


@pytest.fixture(scope="module")
def shop() -> Iterator[StoreLab]:
    """Two days of a shop, in files."""
    base = Path(tempfile.mkdtemp(prefix="st-past-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    lab = StoreLab(base)
    try:
        fill(lab)
        settle(lab)
        yield lab
    finally:
        lab.close()
        shutil.rmtree(base, ignore_errors=True)


def _unix(lab: StoreLab, hours: float) -> str:
    return str(lab.T0 + round(hours * HOUR))


def test_timeline_tells_people_and_programs(cli: Cli, shop: StoreLab) -> None:
    window = ("--since", _unix(shop, 23), "--until", _unix(shop, 28))
    done = cli("--store", shop.state, "timeline", *window)
    assert done.code == 0
    assert "alice applied policy revision 2: reason 2" in done.out
    assert "app=web was denied app=db tcp/5432: default_deny x300 in 29s" in done.out
    assert "\x1b" not in done.out
    assert "\\x1b[31mred" in done.out
    done = cli("--store", shop.state, "timeline", *window, "--kind", "loss", "-o", "json")
    document = json.loads(done.out)
    assert [item["type"] for item in document["items"]] == ["events.lost"]
    assert document["truncated"] is False


def test_nothing_there_is_said(cli: Cli, tmp_path: Path) -> None:
    done = cli("--store", tmp_path / "none", "timeline")
    assert done.code == 3
    assert "none" in done.err
    assert cli("--store", tmp_path, "--state", tmp_path, "timeline").code == 2


def test_diff_and_map(cli: Cli, shop: StoreLab) -> None:
    store = ("--store", shop.state)
    done = cli(*store, "diff", "--from", _unix(shop, 24), "--to", _unix(shop, 48))
    assert done.code == 1
    assert "policy: revision 1 -> 2" in done.out
    assert "+ app=web -> app=cache tcp/6379: 1 allowed" in done.out
    assert "~ app=web -> app=db tcp/5432: 10 allowed -> 300 denied" in done.out
    done = cli(*store, "diff", "--from", _unix(shop, 40), "--to", _unix(shop, 41), "--window", "1h")
    assert (done.code, done.out) == (0, "")
    window = ("--since", _unix(shop, 0), "--until", _unix(shop, 48))
    done = cli(*store, "map", *window, "--to-label", "app=cache")
    assert done.out.splitlines()[1].split() == ["app=web", "app=cache", "tcp/6379", "1"]
    done = cli(*store, "map", *window, "-o", "svg")
    assert done.out.startswith("<svg ")


def test_replay_status_and_ends(cli: Cli, shop: StoreLab) -> None:
    store = ("--store", shop.state)
    done = cli(
        *store, "replay", "--from", _unix(shop, 24), "--to", _unix(shop, 28), "--speed", "0", "-o", "jsonl"
    )
    assert len(done.out.splitlines()) == 302
    assert "policy revision 2" in done.err
    done = cli(*store, "status", "--at", _unix(shop, 30))
    assert done.code == 0
    assert "revision 2 by alice on host1" in done.out
    done = cli("ends", "--store", f"a={shop.state}", "--store", f"b={shop.state}", "--since", _unix(shop, 0))
    assert "have their other end elsewhere" in done.err
    assert cli("ends", "--store", shop.state).code == 2


@pytest.mark.long
def test_a_case_is_written_checked_and_opened(cli: Cli, shop: StoreLab, tmp_path: Path) -> None:
    state = ("--state", shop.state, "--run", shop.run)
    assert cli(*state, "case", "export", "early", "--since", _unix(shop, 0)).code == 2  # no host key
    assert cli(*state, "ca", "init", "--trust-domain", "shop.example").code == 0
    assert cli(*state, "host", "enroll", "--name", "host1").code == 0
    done = cli(*state, "case", "export", "case-1", "--since", _unix(shop, 24), "--until", _unix(shop, 30))
    assert done.code == 0, done.err
    assert "host     host1 in shop.example" in done.out
    assert cli("case", "verify", "case-1").code == 4
    assert "--root" in cli("case", "verify", "case-1").err
    told = cli("--store", "case-1", "timeline", "--since", _unix(shop, 24), "--kind", "policy")
    assert told.out.count("revision 2") == 2
    bad = tmp_path / "case-1" / "policies" / "revision-2.yaml"
    bad.chmod(0o640)
    bad.write_text("")
    done = cli(*state, "case", "verify", "case-1")
    assert (done.code, done.out) == (1, "policies/revision-2.yaml: was changed\n")
