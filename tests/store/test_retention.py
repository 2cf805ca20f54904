"""The setting of what is kept: whatever is in its file, it is understood or refused, and refused deletes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.cli.main import main
from sectool.clock import DAY, HOUR
from sectool.errors import StoreError, UsageError
from store import retention, segment
from store.retention import Retention, WhenFull, changed, load, parse, save, span, words

EXAMPLES = int(os.environ.get("SECTOOL_HYPOTHESIS", "60"))
CHOSEN = Retention(90 * DAY, 20 << 30, 7 * DAY, WhenFull.DROP_OLDEST, 2 * DAY, 5, "root", "because")


def test_it_is_kept_as_it_was_chosen(tmp_path: Path) -> None:
    assert load(tmp_path) == Retention()
    save(tmp_path, CHOSEN)
    assert load(tmp_path) == CHOSEN
    assert (tmp_path / retention.FILE).stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == [retention.FILE]


values = st.none() | st.integers(-(1 << 70), 1 << 70) | st.text(max_size=20) | st.booleans() | st.floats()


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=200) | st.dictionaries(st.sampled_from(sorted(CHOSEN.document())), values))
def test_any_bytes_are_a_sound_setting_or_refused(found: bytes | dict[str, Any]) -> None:
    data = found if isinstance(found, bytes) else json.dumps({**CHOSEN.document(), **found}).encode()
    try:
        setting = parse(data)
    except ValueError:
        return
    assert parse(json.dumps(setting.document()).encode()) == setting
    for bound in (setting.keep_us, setting.keep_bytes, setting.compact_us):
        assert bound is None or bound > 0, "a bound of nothing would delete everything"


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"{}", b'{"keep_us": 5}', b"null"])
def test_a_file_that_says_nothing_sound(tmp_path: Path, data: bytes) -> None:
    (tmp_path / retention.FILE).write_bytes(data)
    with pytest.raises(StoreError, match="cannot read"):
        load(tmp_path)


def test_only_what_is_given_changes() -> None:
    after = changed(CHOSEN, {"keep_us": DAY, "keep_bytes": 0, "reason": "less"}, "eve", 9)
    assert after == Retention(DAY, None, 7 * DAY, WhenFull.DROP_OLDEST, 2 * DAY, 9, "eve", "less")
    assert changed(CHOSEN, {"off": True}, "eve", 9) == Retention(since_us=9, by="eve")


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"off": True, "keep_us": 5},
        {"keep_us": -1},
        {"keep_us": True},
        {"keep_bytes": 1.5},
        {"when_full": "burn"},
        {"keep_us": 5, "reason": "x" * 1001},
        {"keep_us": 5, "reason": "\x1b[31m"},
        {"keep_us": 5, "reason": ["x"]},
        {"spare_us": "1d"},
        {"off": 1},
    ],
)
def test_what_makes_no_sense_is_refused(wanted: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        changed(CHOSEN, wanted, "eve", 9)


def test_in_words() -> None:
    assert span(90 * DAY) == "90d"
    assert span(36 * HOUR) == "36h"
    assert "everything" in words(Retention())
    told = words(CHOSEN)
    assert all(part in told for part in ("older than 90d", "20G", "older than 7d", "younger than 2d"))


def test_by_command(lab: Any, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--state", str(lab.state), "--run", str(lab.run), "store")
    for life in range(2):
        store = lab.inside()
        lab.ring().put(lab.record(flow=life))
        store.step()
        store.close()
    old, _ = segment.segment_files(lab.events)
    assert main([*where, "retention"]) == 0
    assert "when full  stop" in capsys.readouterr().out
    assert main([*where, "retention", "--keep-days", "30", "--dry-run", "-o", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["would_delete"]) == 2
    assert old.exists()
    assert main([*where, "retention", "--compact-after", "1000w", "--reason", "room"]) == 0
    lab.start()
    assert main([*where, "retention", "--keep-days", "30", "--reason", "the law"]) == 0
    said = capsys.readouterr().out
    assert "age        30d" in said
    assert "compact    after 7000d" in said, "the rest stays as it was chosen"
    assert "the law" in said
    lab.wait("the old ones are deleted", lambda: not old.exists())
    reader = lab.live()
    lab.wait("it is told", lambda: reader.events(["store.pruned"]).table.num_rows)
    (pruned,) = reader.events(["store.pruned"]).table["body"].to_pylist()
    assert json.loads(pruned)["why"] == "age"
    assert old.name in json.loads(pruned)["segments"]
    chosen = [json.loads(body) for body in reader.events(["store.retention"]).table["body"].to_pylist()]
    assert [event["reason"] for event in chosen] == ["room", "the law"]
    lab.stop()
    assert main([*where, "stats"]) == 0
    assert "kept: segments older than 30d" in capsys.readouterr().err
    assert main([*where, "retention", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["keep_us"] == 30 * DAY
    for wrong in (
        ["--keep-days", "0"],
        ["--keep-days", "nan"],
        ["--keep", "0"],
        ["--when-full", "burn"],
        ["--off", "--keep", "1G"],
        ["--reason", "none"],
    ):
        assert main([*where, "retention", *wrong]) == 2, wrong
    assert main(["--store", str(lab.state), "store", "retention", "--off"]) == 2
    assert segment.verify_chain(lab.events) == []
