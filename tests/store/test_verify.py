"""`store verify`: what was done to real files behind the store's back is found, and the place named."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sectool.cli.main import main
from sectool.errors import UsageError
from store import segment
from store.control import Actor, ControlHistory
from store.verify import anchor, verify

ME = Actor(0, "root")


@pytest.fixture(scope="module")
def made(make_lab: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with three sealed segments and five changes."""
    lab = make_lab(tmp_path_factory.mktemp("verify"))
    for life in range(3):
        store = lab.inside()
        for pid in range(20):
            lab.ring().put(lab.record(pid=pid, flow=20 * life + pid))
        store.step()
        store.close()
    with ControlHistory(lab.state / "control.sqlite") as control:
        for number in range(1, 5):
            control.append("policy", str(number), {"text": f"rule {number}"}, ME, "why", lab.T0 + number)
        control.close("policy", "4", ME, "gone", lab.T0 + 9)
    return Path(lab.state)


@pytest.fixture
def history(made: Path, lab: Any) -> Path:
    """A copy of it, as the state folder of `lab`."""
    shutil.copytree(made, lab.state, dirs_exist_ok=True)
    return Path(lab.state)


def files(state: Path) -> list[Path]:
    return segment.segment_files(state / "events")


def flip(path: Path, at: int) -> None:
    path.chmod(0o640)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    path.chmod(0o440)


def lines(state: Path, change: Callable[[list[bytes]], Any]) -> None:
    chain = state / "events" / segment.CHAIN
    content = chain.read_bytes().splitlines(keepends=True)
    change(content)
    chain.write_bytes(b"".join(content))


def sql(state: Path, *statements: str) -> None:
    """As somebody with the file in hands: the triggers are no obstacle."""
    connection = sqlite3.connect(state / "control.sqlite")
    triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        connection.execute(statement)
    for _, again in triggers:
        connection.execute(again)
    connection.commit()
    connection.close()


def swap_files(state: Path) -> None:
    one, two, _ = files(state)
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def unlist(state: Path) -> None:
    (state / "events" / segment.CHAIN).unlink()


def test_sound_history(history: Path) -> None:
    verdict = verify(history)
    assert verdict.problems == ()
    assert [(head.chain, head.entries) for head in verdict.heads] == [("events", 3), ("control", 5)]
    assert verdict.segments == 3
    assert verdict.bytes == sum(path.stat().st_size for path in files(history))
    assert verify(history, [head.hash for head in verdict.heads]).problems == ()


TAMPERING: list[tuple[str, Callable[[Path], Any], int, str]] = [
    ("a bit at the start", lambda s: flip(files(s)[0], 10), 0, "was changed after"),
    (
        "a bit in the middle",
        lambda s: flip(files(s)[1], files(s)[1].stat().st_size // 2),
        1,
        "was changed after",
    ),
    ("a bit at the end", lambda s: flip(files(s)[2], -1), 2, "was changed after"),
    ("a file gone", lambda s: files(s)[1].unlink(), -1, "is missing"),
    ("files in each other's place", swap_files, 0, "was changed after"),
    ("entries swapped", lambda s: lines(s, lambda c: c.insert(0, c.pop(1))), -1, "entry 1 is missing"),
    ("an entry gone", lambda s: lines(s, lambda c: c.pop(1)), -1, "entry 2 is missing"),
    ("the newest entry gone", lambda s: lines(s, lambda c: c.pop()), 2, "the chain does not list it"),
    ("the chain gone", unlist, 0, "the chain does not list it"),
    (
        "an entry edited",
        lambda s: lines(s, lambda c: c.__setitem__(1, c[1].replace(b'"records": 20', b'"records": 19'))),
        -1,
        "entry 2 was edited",
    ),
    (
        "a policy edited",
        lambda s: sql(s, "UPDATE rows SET body = replace(body, 'rule 2', 'rule 7') WHERE key = '2'"),
        -1,
        "a row of transaction 2",
    ),
    ("a row gone", lambda s: sql(s, "DELETE FROM rows WHERE key = '3'"), -1, "a row of transaction 3"),
    (
        "a change gone",
        lambda s: sql(s, "DELETE FROM transactions WHERE id = 3"),
        -1,
        "transaction 3 is missing",
    ),
    (
        "an end unsaid",
        lambda s: sql(s, "UPDATE rows SET tx_to = NULL, closed_by = NULL WHERE key = '4'"),
        -1,
        "a row of transaction 5",
    ),
    (
        "another author",
        lambda s: sql(s, "UPDATE transactions SET actor = 'eve' WHERE id = 4"),
        -1,
        "transaction 4 was edited",
    ),
    (
        "changes swapped",
        lambda s: sql(
            s,
            "UPDATE transactions SET id = 99 WHERE id = 2",
            "UPDATE transactions SET id = 2 WHERE id = 3",
            "UPDATE transactions SET id = 3 WHERE id = 99",
        ),
        -1,
        "transaction 2 does not follow",
    ),
]


@pytest.mark.parametrize(
    ("change", "place", "what"), [t[1:] for t in TAMPERING], ids=[t[0] for t in TAMPERING]
)
def test_tampering_is_found_and_placed(
    history: Path, change: Callable[[Path], Any], place: int, what: str
) -> None:
    names = [path.name for path in files(history)]
    change(history)
    first = verify(history).problems[0]
    assert what in first.what
    if place >= 0:
        assert first.where == names[place]


def test_the_newest_part_cut_off_is_found_by_a_noted_head(history: Path) -> None:
    heads = [head.hash for head in verify(history).heads]
    files(history)[-1].unlink()
    lines(history, lambda c: c.pop())
    sql(
        history,
        "DELETE FROM transactions WHERE id = 5",
        "DELETE FROM rows WHERE tx = 5",
        "UPDATE rows SET tx_to = NULL, closed_by = NULL WHERE closed_by = 5",
    )
    assert verify(history).problems == (), "without a noted head it looks whole"
    problems = verify(history, heads).problems
    assert [p.where for p in problems] == [f"anchor {head[:16]}…" for head in heads]


def test_what_is_being_written_is_told_apart(history: Path, lab: Any) -> None:
    store = lab.inside()
    lab.ring().put(lab.record(pid=1))
    store.step()
    verdict = verify(history)
    assert verdict.problems == ()
    assert verdict.unsealed == (files(history)[-1].name,)


@pytest.mark.parametrize("text", ["", "12", "g" * 64, "a" * 65])
def test_an_anchor_is_a_hash(text: str) -> None:
    with pytest.raises(UsageError):
        anchor(text)


def test_the_command(history: Path, lab: Any, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--state", str(lab.state), "--run", str(lab.run), "store")
    assert main([*where, "verify", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sound"]
    noted = [head["hash"] for head in found["heads"]]
    assert main([*where, "verify", "--anchor", noted[0], "--anchor", noted[1]]) == 0
    assert "2 noted heads are in place" in capsys.readouterr().out
    flip(files(history)[1], 5000)
    assert main([*where, "verify"]) == 1
    assert f"DOES NOT HOLD  {files(history)[1].name}" in capsys.readouterr().out
    assert main([*where, "verify", "--anchor", "nonsense"]) == 2
    assert main([*where, "stats", "-o", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["rows"] for row in listed["items"]] == [20, 20, 20]
    assert listed["rows"] == 60
