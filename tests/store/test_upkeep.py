"""The store minds what is kept: by age, size and room on the disk, and makes old segments compact beside ingest."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sectool.api.client import Client
from sectool.clock import DAY
from sectool.errors import SectoolError
from store import compaction, retention, segment
from store.process import Limits
from store.query import run
from store.retention import Retention
from store.verify import verify


def sealed(lab: Any, count: int) -> list[Path]:
    for life in range(count):
        store = lab.inside()
        lab.ring().put(lab.record(flow=life, pid=life))
        store.step()
        store.close()
    return segment.segment_files(lab.events)


def told(store: Any, kind: str) -> list[dict[str, Any]]:
    store.step()
    rows = run(store.catalog, f"SELECT body FROM events WHERE type = '{kind}' ORDER BY seq").table
    return [json.loads(body) for body in rows["body"].to_pylist()]


def test_size_is_kept_and_told(lab: Any) -> None:
    files = sealed(lab, 3)
    store = lab.inside()
    store.upkeep.choose({"keep_bytes": segment.size_of(files[2])}, "eve")
    store.tidy()
    assert [path.exists() for path in files] == [False, False, True]
    (event,) = told(store, "store.pruned")
    assert (event["why"], event["segments"], event["actor"]) == ("size", [p.name for p in files[:2]], "")
    store.upkeep.choose({"off": True, "reason": "enough"}, "eve")
    store.tidy()
    last = told(store, "store.retention")[-1]
    assert (last["actor"], last["reason"], last["setting"]["keep_bytes"]) == ("eve", "enough", None)
    assert last["before"]["keep_bytes"] == segment.size_of(files[2])
    store.close()
    again = lab.inside(Limits(keep_bytes=1))
    again.tidy()
    assert files[2].exists(), "what was chosen counts, not what the store was started with"
    assert verify(lab.state).problems == ()


def test_who_asked_for_a_deletion_is_told(lab: Any) -> None:
    files = sealed(lab, 2)
    store = lab.inside()
    assert store.prune(0, None, "eve") == [path.name for path in files]
    (event,) = told(store, "store.pruned")
    assert (event["why"], event["actor"], event["count"]) == ("asked", "eve", 2)


def test_a_setting_that_cannot_be_read_deletes_nothing_and_is_said(lab: Any) -> None:
    files = sealed(lab, 2)
    (lab.state / retention.FILE).write_text('{"keep_bytes": 1')
    store = lab.inside(Limits(keep_bytes=1))
    store.tidy()
    assert all(path.exists() for path in files)
    assert "retention --off" in store.stats()["degraded"]
    store.upkeep.choose({"off": True}, "root")
    assert store.stats()["degraded"] == ""


def test_old_segments_become_compact_one_after_the_other(lab: Any) -> None:
    sealed(lab, 2)
    retention.save(lab.state, Retention(compact_us=DAY, since_us=1))
    store = lab.inside()

    def compacted() -> int:
        store.upkeep._rests = store.upkeep._again = 0.0
        store.tidy()
        return sum(map(segment.compact, segment.segment_files(lab.events)))

    lab.wait("the first", lambda: compacted() == 1)
    lab.wait("the second", lambda: compacted() == 2)
    assert run(store.catalog, "SELECT pid FROM flow_records ORDER BY seq").table["pid"].to_pylist() == [0, 1]
    store.upkeep.stop()
    store.close()
    assert verify(lab.state).problems == ()


def test_compaction_gives_way_to_events(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment that is being made compact when the rings fill up is given up, whole as it was, and tried again."""
    (native,) = sealed(lab, 1)
    retention.save(lab.state, Retention(compact_us=DAY, since_us=1))
    store = lab.inside()
    ring = lab.ring("full", 8)
    store.rings.look()
    write = compaction.write_compact

    def endless(cursor: Any, alias: str, path: Path) -> Path:
        while ring.pending < 6:
            ring.put(lab.record())
        cursor.execute(
            "SELECT count(*) FROM range(10_000_000_000) a, range(10) b WHERE a.range % 7 = b.range"
        )
        return write(cursor, alias, path)

    monkeypatch.setattr(compaction, "write_compact", endless)
    store.tidy()
    thread = store.upkeep._thread

    def over() -> bool:
        store.upkeep.give_way()
        return not thread.is_alive()

    lab.wait("it gives way", over)
    assert native.exists()
    store.upkeep._rests = store.upkeep._again = 0.0
    store.tidy()
    assert store.upkeep._thread is thread, "not while the rings are full"
    while ring.pending:
        store.step()
    monkeypatch.setattr(compaction, "write_compact", write)
    store.upkeep._again = 0.0
    lab.wait("it is tried again", lambda: store.tidy() or not native.exists())
    store.upkeep.stop()
    assert verify(lab.state).problems == ()


def test_a_segment_that_cannot_be_made_compact_bars_no_other(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = sealed(lab, 2)
    retention.save(lab.state, Retention(compact_us=DAY, since_us=1))
    store = lab.inside()
    write = compaction.write_compact

    def fail(cursor: Any, alias: str, path: Path) -> Path:
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return write(cursor, alias, path)

    monkeypatch.setattr(compaction, "write_compact", fail)

    def tried() -> bool:
        store.upkeep._rests = store.upkeep._again = 0.0
        store.tidy()
        return not good.exists()

    lab.wait("the other is compact", tried)
    assert bad.exists()
    store.upkeep.stop()


def test_the_chain_says_what_goes_though_it_has_no_room(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    oldest, middle, _ = sealed(lab, 3)
    append = segment.append_entry
    full = True

    def no_room(events: Path, fields: dict[str, Any]) -> None:
        nonlocal full
        if full:
            full = oldest.exists()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(events, fields)

    monkeypatch.setattr(segment, "append_entry", no_room)
    with contextlib.suppress(OSError):
        compaction.retire(lab.events, oldest)  # as if killed before the second try
    assert not oldest.exists()
    monkeypatch.setattr(segment, "append_entry", append)
    assert "is missing" in verify(lab.state).problems[0].what
    lab.inside().close()
    assert verify(lab.state).problems == (), "the start wrote what was to be said"
    assert not list(lab.events.glob(f"*{compaction.GOING}"))
    full = False
    compaction.retire(lab.events, middle)
    assert not middle.exists()


def test_an_entry_that_finds_no_room_leaves_the_chain_whole(lab: Any) -> None:
    """A real limit of the size of files, in a process of its own."""
    sealed(lab, 1)
    chain = lab.events / segment.CHAIN
    before = chain.read_bytes()
    child = os.fork()
    if child == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, len(before) + 20))
        try:
            segment.append_entry(lab.events, {"retired": "x" * 50})
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert chain.read_bytes() == before


def test_the_oldest_make_room_on_a_full_disk_if_that_was_chosen(lab: Any) -> None:
    """A real, small tmpfs, filled by somebody else."""
    script = f'mount -t tmpfs -o size=64m none {lab.state} && exec "$@"'
    prefix = ("unshare", "--mount", "--propagation=private", "sh", "-c", script, "-")
    lab.start("--reserve-bytes", str(4 << 20), "--segment-bytes", "1", wait_for_it=False, prefix=prefix)
    lab.wait("the store answers", lab.answers)
    root = Path(f"/proc/{lab.process.pid}/root{lab.state}")
    reader, ring, written = lab.live(), lab.ring(), 0
    events = root / "events"
    while len(segment.sealed(events)) < 3:
        before = len(segment.segment_files(events))
        for _ in range(40):
            assert ring.put_blob({"type": "workload.start", "ts": lab.T0, "noise": os.urandom(30_000).hex()})
        ring.put(lab.record(pid=written, flow=written))
        written += 1
        lab.wait("the next segment", lambda before=before: len(segment.segment_files(events)) > before)
        lab.wait("it is sealed", lambda before=before: len(segment.sealed(events)) >= before)
    oldest = segment.segment_files(events)[0]
    disk = os.statvfs(root)
    ballast = disk.f_bavail * disk.f_frsize - (4 << 20) + (64 << 10)  # 64 KiB are missing to the reserve
    (root / "ballast").write_bytes(bytes(ballast))
    lab.wait("the disk is full", lambda: "retention --when-full" in reader.stats()["degraded"])
    assert oldest.exists(), "nothing goes that nobody gave up"
    with Client(lab.run / "events.sock", timeout=20) as client:
        client.call("retain", when_full="drop-oldest", reason="room")
    lab.wait("it recovers by itself", lambda: reader.stats()["degraded"] == "")
    assert not oldest.exists()
    lab.wait("it is told", lambda: reader.events(["store.pruned"]).table.num_rows)
    event = json.loads(reader.events(["store.pruned"]).table["body"][0].as_py())
    assert event["why"] == "room"
    assert oldest.name in event["segments"]
    assert segment.verify_chain(events) == []
    ring.put(lab.record(pid=written))
    lab.wait(
        "it takes events in",
        lambda: (
            reader.query(f"SELECT count(*) n FROM flow_records WHERE pid = {written}").table["n"][0].as_py()
        ),
    )


def test_the_young_are_not_given_up_for_room(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    old, young = sealed(lab, 2)
    store = lab.inside()
    monkeypatch.setattr("store.upkeep.now_us", lambda: lab.T0 + DAY // 2)
    store.upkeep.choose({"when_full": "drop-oldest"}, "root")
    store.limits = Limits(reserve=1 << 60)
    store.tidy()
    assert old.exists()
    store.upkeep.choose({"spare_us": DAY // 4}, "root")
    store.tidy()
    assert not old.exists()
    assert not young.exists()
    assert "none younger than 6h" in store.stats()["degraded"]


def test_readers_choose_nothing(lab: Any) -> None:
    lab.start()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            lab.base.chmod(0o755)
            (lab.run / "events.sock").chmod(0o666)
            os.chown(lab.run / "events.sock", 0, 65534)
            os.setgid(65534)
            os.setuid(65534)
            with Client(lab.run / "events.sock", timeout=20) as client:
                try:
                    client.call("retain", keep_us=1)
                except SectoolError as error:
                    os._exit(7 if "may not retain" in error.message else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not (lab.state / retention.FILE).exists()
