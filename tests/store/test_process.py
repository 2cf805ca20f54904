"""The store process: exactly once through kill -9, damage set aside, full disks survived."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from sectool.events import Phase
from store import segment
from store.process import Limits
from store.query import run


def pids(reader: Any) -> list[int]:
    """The records' pids, in order of arrival; the tests number records by it."""
    table = reader.query("SELECT pid FROM flow_records ORDER BY seq", limit=1_000_000).table
    return list(table["pid"].to_pylist())


def test_events_go_in_and_come_out(lab: Any) -> None:
    lab.ring().put(lab.record(pid=1))
    lab.start()
    lab.ring("agent").put_blob({"type": "workload.start", "ts": lab.T0, "name": "web"})
    lab.ring().put(lab.record(pid=2))
    lab.stored(2, 1)
    assert pids(lab.live()) == [1, 2]
    (event,) = lab.live().events(["workload.*"]).table.to_pylist()
    assert event["type"] == "workload.start"
    assert event["body"] == f'{{"type":"workload.start","ts":{lab.T0},"name":"web"}}'
    assert lab.stop() == 0
    (sealed,) = segment.segment_files(lab.events)
    assert sealed.stat().st_mode & 0o777 == 0o440
    assert not (lab.run / "events.sock").exists()
    assert segment.verify_chain(lab.events) == []


KILLS = int(os.environ.get("SECTOOL_KILLS", "5"))


@pytest.mark.long
def test_killed_at_any_moment_nothing_is_lost_or_doubled(lab: Any) -> None:
    dice = random.Random(os.environ.get("PYTEST_XDIST_WORKER", "0"))
    ring = lab.ring(capacity=1 << 12)
    done = threading.Event()
    written = 0

    def produce() -> None:
        nonlocal written
        while not done.is_set():
            if not ring.pending < 3000:
                done.wait(0.001)
            elif written % 50 == 49:
                written += ring.put_blob({"type": "workload.start", "ts": lab.T0, "n": written})
            else:
                written += ring.put(lab.record(pid=written, flow=written))

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        for turn in range(
            KILLS
        ):  # at moments spread over what a batch takes, each by chance within its share
            before = written
            lab.start()
            lab.wait("some are taken in", lambda before=before: written > before + 200)
            done.wait((turn + dice.random()) / KILLS * 0.15)
            lab.kill()
    finally:
        done.set()
        producer.join()
    assert ring.lost == 0
    lab.start()
    lab.wait("the ring is drained", lambda: ring.pending == 0)
    lab.stop()
    reader = lab.reader()
    assert not reader.live
    flows = pids(reader)
    events = reader.query(
        "SELECT (body->>'n')::INT n FROM events WHERE type = 'workload.start' ORDER BY seq", limit=1_000_000
    )
    numbers = events.table["n"].to_pylist()
    assert sorted(flows + numbers) == list(range(written))
    assert flows == sorted(flows), "and in order"
    seqs = reader.query("SELECT count(*) n, count(DISTINCT seq) d FROM flow_records").table.to_pylist()[0]
    assert seqs["n"] == seqs["d"]
    assert segment.verify_chain(lab.events) == []


def test_a_crash_between_durable_and_confirmed_is_not_counted_twice(lab: Any) -> None:
    for pid in range(10):
        lab.ring().put(lab.record(pid=pid))
    store = lab.inside()
    ring = store.rings.readers["worker-0"]
    tail = ring._tail
    store.step()
    ring._cells[16] = tail  # the confirmation never reached the ring
    ring._tail = ring._next = tail
    store.close()
    again = lab.inside()
    lab.ring().put(lab.record(pid=10))
    again.step()
    assert run(again.catalog, "SELECT pid FROM flow_records ORDER BY seq").table["pid"].to_pylist() == list(
        range(11)
    )


def test_dictionaries_follow_into_new_segments(lab: Any) -> None:
    store = lab.inside(Limits(segment_bytes=1))
    labels = lab.labels("app=web")
    rule = lab.rule("allow app=web to call app=db")
    lab.ring().put(lab.record(flow=1, source_labels=labels, rule=rule))
    store.step()
    store._roll_if_due()
    lab.ring().put(lab.record(flow=2, source_labels=labels, rule=rule, start=lab.T0 + 1))
    store.step()
    store.tidy()
    assert len(store.catalog.segments) == 2
    rows = run(store.catalog, "SELECT source_labels, rule FROM flows ORDER BY seq").table.to_pylist()
    assert rows == [{"source_labels": "app=web", "rule": "allow app=web to call app=db"}] * 2
    store.close()
    oldest, _newest = segment.segment_files(lab.events)
    oldest.unlink()  # retention
    (row,) = lab.reader().query("SELECT source_labels FROM flows").table.to_pylist()
    assert row == {"source_labels": "app=web"}


def test_a_flow_may_end_in_a_later_segment(lab: Any) -> None:
    store = lab.inside(Limits(segment_bytes=1))
    lab.ring().put(lab.record())
    store.step()
    store._roll_if_due()
    lab.ring().put(lab.record(phase=Phase.END, end=lab.T0 + 10, source_bytes=77))
    store.step()
    (row,) = run(store.catalog, "SELECT open, source_bytes FROM flows").table.to_pylist()
    assert row == {"open": False, "source_bytes": 77}
    store.tidy()
    (row,) = run(store.catalog, "SELECT open, source_bytes FROM flows").table.to_pylist()
    assert row == {"open": False, "source_bytes": 77}


def test_sequence_numbers_go_on_after_a_restart(lab: Any) -> None:
    for life in range(3):
        store = lab.inside()
        lab.ring().put(lab.record(flow=life))
        store.step()
        store.close()
    seqs = lab.reader().query("SELECT seq FROM flow_records ORDER BY seq").table["seq"].to_pylist()
    assert seqs == [1, 2, 3]
    chain = [entry["segment"] for entry in segment.entries(lab.events)]
    assert len(chain) == len(set(chain)) == 3


def test_a_reader_that_holds_an_unsealed_segment_only_delays(lab: Any) -> None:
    lab.start()
    lab.ring().put(lab.record(pid=1))
    lab.stored(1)
    lab.kill()
    reader = lab.reader()
    assert not reader.live
    assert pids(reader) == [1]
    lab.start()
    lab.ring().put(lab.record(pid=2))
    lab.stored(1)
    assert pids(lab.live()) == [2]
    assert len(lab.live().stats()["unopened_segments"]) == 1
    reader.close()
    lab.stored(2)
    assert pids(lab.live()) == [1, 2], "and numbers are still in the order of arrival"
    assert damages(lab.live()) == []
    lab.stop()
    assert segment.verify_chain(lab.events) == []


def test_old_segments_are_retired_and_the_chain_says_so(lab: Any) -> None:
    names = [sealed_segment(lab, pid + 1).name for pid in range(4)]
    known = segment.sealed(lab.events)
    room = sum(int(known[name]["bytes"]) for name in names[2:])
    store = lab.inside(Limits(keep_bytes=room))
    store.tidy()
    assert [path.name for path in segment.segment_files(lab.events)][:2] == names[2:]
    assert segment.verify_chain(lab.events) == []
    assert run(store.catalog, "SELECT count(*) n FROM flow_records").table["n"].to_pylist() == [3 + 4]


def test_a_segment_that_kills_the_store_is_set_aside_the_third_time(lab: Any) -> None:
    poison = sealed_segment(lab)
    for death in range(4):
        (lab.run / ".store.opening").write_text(
            poison.name
        )  # as a store leaves it that died while opening it
        store = lab.inside()
        if death < 2:
            store.close()
            assert poison.exists()
            (lab.run / ".store.suspect").write_text("\n".join([poison.name] * (death + 1)))
        else:
            break
    store.step()
    assert not poison.exists()
    assert list(lab.events.glob(f"{poison.name}.damaged-*"))
    assert "three times" in run(store.catalog, "SELECT body FROM events").table["body"][0].as_py()


def test_a_start_without_events_leaves_no_segment(lab: Any) -> None:
    lab.start()
    lab.stop()
    assert segment.segment_files(lab.events) == []
    assert segment.chain_head(lab.events) == (0, segment.GENESIS)


def spoil(path: Path, at: float = 0.5, count: int = 4096) -> None:
    """Overwrite the middle of a file with noise."""
    path.chmod(0o640)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(int(size * at))
        file.write(random.Random(1).randbytes(min(count, size)))


def damages(reader: Any) -> list[str]:
    table = reader.events(["store.damaged"]).table
    return list(table["body"].to_pylist())


def sealed_segment(lab: Any, count: int = 5) -> Path:
    before = set(segment.segment_files(lab.events))
    store = lab.inside()
    for pid in range(count):
        lab.ring().put(lab.record(pid=pid, flow=pid))
    store.step()
    store.close()
    (new,) = set(segment.segment_files(lab.events)) - before
    return Path(new)


@pytest.mark.parametrize("where", ["header", "cut", "empty", "noise"])
def test_a_damaged_sealed_segment_is_set_aside_and_reported(lab: Any, where: str) -> None:
    broken, whole = sealed_segment(lab), sealed_segment(lab)
    if where == "header":
        spoil(broken, 0)
    elif where == "cut":
        broken.chmod(0o640)
        os.truncate(broken, 5000)
    elif where == "empty":
        broken.chmod(0o640)
        broken.write_bytes(b"")
    else:
        broken.chmod(0o640)
        broken.write_bytes(random.Random(2).randbytes(100_000))
    lab.start()
    reader = lab.live()
    assert len(pids(reader)) == 5, "the other segment is read"
    lab.wait("the damage is reported", lambda: damages(reader))
    assert broken.name in damages(reader)[0]
    assert not broken.exists()
    (kept,) = lab.events.glob(f"{broken.name}.damaged-*")
    assert kept.exists()
    assert whole.exists()
    lab.ring().put(lab.record(pid=99))
    lab.stored(6)
    assert broken.name in {problem.where for problem in segment.verify_chain(lab.events)}


def left_by_kill(lab: Any, checkpointed: int, logged: int) -> Path:
    """A segment as kill -9 leaves it: some rows written out, some only in its log."""
    lab.start("--checkpoint-seconds", "4")
    for pid in range(checkpointed):
        lab.ring().put(lab.record(pid=pid, flow=pid))
    lab.stored(checkpointed)
    (path,) = segment.segment_files(lab.events)
    size = path.stat().st_size
    lab.wait(
        "the log is written out",
        lambda: path.stat().st_size > size and not segment.wal_of(path).exists(),
    )
    for pid in range(checkpointed, checkpointed + logged):
        lab.ring().put(lab.record(pid=pid, flow=pid))
    lab.stored(checkpointed + logged)
    lab.kill()
    assert segment.wal_of(path).stat().st_size > 100
    return Path(path)


@pytest.mark.parametrize("how", ["whole", "noise", "torn"])
def test_a_log_left_by_a_crash(lab: Any, how: str) -> None:
    path = left_by_kill(lab, 20, 20)
    wal = segment.wal_of(path)
    if how == "noise":
        spoil(wal, 0.5, 200)
    elif how == "torn":
        os.truncate(wal, wal.stat().st_size - 50)
    lab.start()
    got = pids(lab.live())
    if how == "whole":
        assert got == list(range(40))
    else:
        assert got[:20] == list(range(20)), "what was written out is there"
        assert got == list(range(len(got)))
    if how == "noise":
        assert wal.name in lab.wait("the damage is reported", lambda: damages(lab.live()))[0]
        assert list(lab.events.glob(f"{wal.name}.damaged-*"))
    lab.ring().put(lab.record(pid=1000))
    lab.wait("the store goes on", lambda: pids(lab.live())[-1] == 1000)
    assert path.name in segment.sealed(lab.events)


def test_a_torn_chain_is_mended_and_reported(lab: Any) -> None:
    sealed_segment(lab)
    with (lab.events / segment.CHAIN).open("ab") as file:
        file.write(b'{"n": 2, "segm')
    lab.start()
    assert "chain.jsonl" in lab.wait("the damage is reported", lambda: damages(lab.live()))[0]
    lab.stop()
    assert segment.verify_chain(lab.events) == []
    assert segment.chain_head(lab.events)[0] == 2


def test_a_ring_with_a_bad_header_is_reported_once_and_taken_again_when_replaced(lab: Any) -> None:
    path = lab.run / "ring-bad"
    path.write_bytes(b"nonsense" * 10_000)
    lab.start()
    lab.ring().put(lab.record(pid=1))
    lab.stored(1, 1)
    assert "ring-bad" in damages(lab.live())[0]
    lab.ring("bad").put(lab.record(pid=2))  # its producer starts anew
    lab.stored(2, 1)
    assert len(damages(lab.live())) == 1


def test_garbage_in_a_ring_is_counted(lab: Any) -> None:
    ring = lab.ring()
    ring.put(lab.record(pid=1))
    ring.put(bytes(len(lab.record())))
    ring.put(b"\xff" * len(lab.record()))
    ring.put(lab.record(pid=2))
    lab.start()
    lab.stored(2, 1)
    (lost,) = lab.live().events(["events.lost"]).table.to_pylist()
    assert '"count":2' in lost["body"]
    assert lab.live().stats()["damaged_slots"] == 2


def test_losses_of_a_ring_become_events_once(lab: Any) -> None:
    ring = lab.ring(capacity=4)
    for pid in range(10):
        ring.put(lab.record(pid=pid))
    lab.start()
    lab.stored(4, 1)
    (lost,) = lab.live().events(["events.lost"]).table.to_pylist()
    assert '"count":6' in lost["body"]
    assert lab.live().stats()["lost"] == 6
    lab.kill()
    lab.start()
    ring.put(lab.record(pid=11))
    lab.stored(5, 1)
    assert lab.live().events(["events.lost"]).table.num_rows == 1


def test_strange_events_are_kept(lab: Any) -> None:
    strange = [
        {},
        {"type": 5, "ts": "x"},
        {"type": "x" * 100, "ts": -1},
        {"type": "workload.start", "ts": 1 << 62, "name": "\ud800\x00\x1b[31m"},
        {"type": "dict.labels", "id": "no number", "labels": {"a": "b"}},
        {"type": "dict.labels", "id": 5, "labels": {"a": 7}},
        {"type": "dict.rule", "id": 1 << 64},
        {"type": "workload.start", "ts": 5, "x": float("nan"), "y": 10**400},
    ]
    for blob in strange:
        assert lab.ring().put_blob(blob)
    store = lab.inside()
    store.step()
    table = run(store.catalog, "SELECT type, body, json_valid(body) AS sound FROM events ORDER BY seq").table
    assert table.num_rows == len(strange)
    assert all(table["sound"].to_pylist())
    assert table["type"].to_pylist()[:3] == ["?", "?", "?"]


def test_one_store_per_folder(lab: Any) -> None:
    lab.start()
    argv = [sys.executable, "-m", "store", "--state", lab.state, "--run", lab.run]
    other = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert other.returncode == 4
    assert "another store runs" in other.stderr
    assert "Traceback" not in other.stderr
    lab.ring().put(lab.record())
    lab.stored(1)


def test_it_ends_with_its_parent(lab: Any) -> None:
    ours, theirs = os.pipe()
    os.set_inheritable(ours, True)
    lab.ring().put(lab.record())
    lab.process = subprocess.Popen(
        [sys.executable, "-m", "store", "--state", lab.state, "--run", lab.run, "--parent-fd", str(ours)],
        pass_fds=[ours],
        stderr=subprocess.DEVNULL,
    )
    os.close(ours)
    lab.wait("the store answers", lab.answers)
    lab.stored(1)
    os.close(theirs)
    assert lab.process.wait(20) == 0
    assert segment.verify_chain(lab.events) == []


def small_disk(lab: Any, size: str) -> tuple[str, ...]:
    """Words before a command that give it a tmpfs of that size as its state folder, seen by it alone."""
    script = f'mount -t tmpfs -o size={size} none {lab.state} && exec "$@"'
    return ("unshare", "--mount", "--propagation=private", "sh", "-c", script, "-")


def test_a_full_disk_is_survived_and_told(lab: Any) -> None:
    """A real, small tmpfs as the state folder, in a mount namespace of its own."""
    ring = lab.ring(capacity=1 << 12)
    lab.start(
        "--reserve-bytes",
        str(4 << 20),
        wait_for_it=False,
        prefix=small_disk(lab, "24m"),
    )
    lab.wait("the store answers", lab.answers)
    reader, written = lab.live(), 0
    root = Path(f"/proc/{lab.process.pid}/root{lab.state}")

    def fill() -> str:
        nonlocal written
        while ring.put(lab.record(pid=written, flow=written)):
            written += 1
        return str(reader.stats()["degraded"])

    ballast = root / "ballast"
    ballast.write_bytes(b"x" * (12 << 20))
    why = lab.wait("the disk is full", lambda: "full" in fill() and reader.stats()["degraded"])
    assert "MiB" in why
    lab.wait("the ring overflows", lambda: ring.lost > 0 or not fill())
    assert reader.query("SELECT 42 AS x").table["x"].to_pylist() == [42], "questions are answered meanwhile"
    ballast.unlink()
    lab.wait("it recovers", lambda: reader.stats()["degraded"] == "")
    lab.wait("the ring is drained", lambda: ring.pending == 0)
    lab.stored(written)
    assert pids(reader) == list(range(written)), "what fitted into the ring is there, once"
    lost = reader.query(
        "SELECT sum((body->>'count')::INT)::INT n FROM events WHERE type = 'events.lost'"
    ).table
    assert lost["n"][0].as_py() == ring.lost
    assert lab.process.poll() is None


def test_write_errors_beyond_the_reserve_lose_nothing_that_the_ring_holds(lab: Any) -> None:
    """The same without a reserve: the engine itself meets the end of the disk."""
    ring = lab.ring(capacity=1 << 12)
    lab.start(
        "--reserve-bytes",
        "0",
        wait_for_it=False,
        prefix=small_disk(lab, "16m"),
    )
    lab.wait("the store answers", lab.answers)
    reader, written = lab.live(), 0
    root = Path(f"/proc/{lab.process.pid}/root{lab.state}")
    ballast = root / "ballast"
    ballast.write_bytes(b"x" * (10 << 20))

    def fill() -> str:
        nonlocal written
        while ring.put(lab.record(pid=written, flow=written)):
            written += 1
        return str(reader.stats()["degraded"])

    lab.wait("writing fails", fill)
    ballast.unlink()
    lab.wait("it recovers", lambda: reader.stats()["degraded"] == "")
    lab.wait("the ring is drained", lambda: ring.pending == 0)
    lab.stored(written)
    assert pids(reader) == list(range(written))
    assert lab.process.poll() is None, lab.log
    assert lab.stop() == 0


def test_sigint_seals_too(lab: Any) -> None:
    lab.ring().put(lab.record())
    lab.start()
    lab.process.send_signal(signal.SIGINT)
    assert lab.process.wait(20) == 0
    assert len(segment.sealed(lab.events)) == 1
    assert pids(lab.reader()) == [7]


def test_asked_again_and_again_to_end_it_ends(lab: Any) -> None:
    """A signal may come while the one before is being minded."""
    lab.ring().put(lab.record())
    lab.start()
    while lab.process.poll() is None:
        lab.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            lab.process.wait(0.0001)
    assert lab.process.returncode == 0
    assert pids(lab.reader()) == [7]
