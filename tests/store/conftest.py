"""A store process of the tests' own: folders, rings, records, and the patience to wait for conditions."""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sectool.api.client import Client
from sectool.errors import SectoolError
from sectool.events import FIELDS, FLOW_STRUCT, INDEX, Action, ConnState, Kind, Phase
from sectool.flowids import community_id, new_event_id
from sectool.labels import LabelSet, stable_id
from sectool.ring import RingWriter
from store.process import Limits, Store
from store.reader import LiveReader, Reader, open_reader
from tests import preloaded

T0 = 1_772_330_584_000_000  # 2026-03-01T02:03:04Z


def wait(what: str, condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The first truthy value of `condition`; fails past the deadline."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds:g} s")
        pause.wait(0.01)
    return value


class StoreLab:
    """A state and a run folder, and what a host puts into them."""

    T0 = T0
    wait = staticmethod(wait)

    def __init__(self, base: Path) -> None:
        self.base = base
        self.state, self.run = base / "state", base / "run"
        self.state.mkdir()
        self.run.mkdir()
        self.events = self.state / "events"
        self.process: subprocess.Popen[bytes] | preloaded.Forked | None = None
        self._rings: dict[str, RingWriter] = {}
        self._open: list[Any] = []

    # --- what goes in ----------------------------------------------------------------------------------------

    def ring(self, name: str = "worker-0", capacity: int = 1 << 14) -> RingWriter:
        """The ring of a producer, opened once."""
        if name not in self._rings:
            self._rings[name] = RingWriter(self.run / f"ring-{name}", capacity)
        return self._rings[name]

    @staticmethod
    def record(**fields: Any) -> bytes:
        """A packed flow record: an allowed TCP flow from 10.0.0.1 to 10.0.0.2:443 unless told otherwise.

        Addresses are text; `flow` (a number) stands for an event_id.
        """
        start = fields.setdefault("start", T0)
        flow = fields.pop("flow", 1)
        given: dict[str, Any] = {
            "kind": Kind.FLOW,
            "phase": Phase.VERDICT,
            "point": 1,
            "action": Action.ALLOW,
            "transport": 6,
            "direction": 1,
            "source_port": 40000,
            "destination_port": 443,
            "ts": start,
            "uid": 1000,
            "pid": 7,
            "source_ip": "10.0.0.1",
            "destination_ip": "10.0.0.2",
            "ip_version": 4,
            "flow_count": 1,
            "event_id": new_event_id(start)[:8] + flow.to_bytes(8, "big"),
            "conn_state": ConnState.S1,
            "auth_method": 1,
            "auth_result": 2,
            "encryption": 1,
            "history": b"Sh",
            **fields,
        }
        for name in ("source_ip", "destination_ip"):
            address = ipaddress.ip_address(given[name])
            mapped = b"" if address.version == 6 else bytes(10) + b"\xff\xff"
            given[name] = mapped + address.packed
        wide = given["ip_version"] == 6
        ends = [given[name][0 if wide else -4 :] for name in ("source_ip", "destination_ip")]
        sport, dport = given["source_port"], given["destination_port"]
        given["community"] = community_id(ends[0], ends[1], sport, dport, given["transport"])
        values: list[Any] = [b"" if code.endswith("s") else 0 for _, code in FIELDS]
        for name, value in given.items():
            values[INDEX[name]] = value
        return FLOW_STRUCT.pack(*values)

    def event_id(self, start: int, flow: int) -> bytes:
        """The id that `record` gives the flow."""
        return new_event_id(start)[:8] + flow.to_bytes(8, "big")

    def labels(self, text: str, ring: str = "worker-0") -> int:
        """Put a label set into the dictionary; its id."""
        labels = LabelSet.parse(text)
        assert self.ring(ring).put_blob({"type": "dict.labels", "id": labels.id, "labels": dict(labels)})
        return labels.id

    def identity(self, spiffe_id: str, labels: int, ring: str = "worker-0") -> int:
        """Put an identity into the dictionary; its id."""
        number = stable_id(spiffe_id.encode())
        blob = {
            "type": "dict.identity",
            "id": number,
            "spiffe_id": spiffe_id,
            "trust_domain": "lab.example",
            "labels_id": labels,
            "fingerprint": "ab" * 32,
            "serial": 1 << 70,
            "issuer": "host1",
            "not_before": T0,
            "not_after": T0 + 86_400_000_000,
        }
        assert self.ring(ring).put_blob(blob)
        return number

    def workload(self, name: str, labels: int, ring: str = "worker-0") -> int:
        """Put a workload into the dictionary; its id."""
        number = stable_id(name.encode())
        blob = {
            "type": "dict.workload",
            "id": number,
            "name": name,
            "labels_id": labels,
            "uid": 33,
            "user": "www",
        }
        assert self.ring(ring).put_blob(blob)
        return number

    def rule(self, text: str, ring: str = "worker-0") -> int:
        """Put a rule into the dictionary; its id."""
        number = stable_id(text.encode())
        blob = {
            "type": "dict.rule",
            "id": number,
            "policy": "shop",
            "kind": "intent",
            "owner": "team-a",
            "index": 2,
            "text": text,
            "revision": 3,
        }
        assert self.ring(ring).put_blob(blob)
        return number

    # --- the store -------------------------------------------------------------------------------------------

    def start(
        self, *options: str, wait_for_it: bool = True, prefix: tuple[str, ...] = ()
    ) -> subprocess.Popen[bytes] | preloaded.Forked:
        """Start the store process; behind a `prefix` it is a program, else forked."""
        args = ["--state", str(self.state), "--run", str(self.run), *options]
        with (self.base / "store.log").open("ab") as log:
            if prefix:
                self.process = subprocess.Popen(
                    [*prefix, sys.executable, "-m", "store", *args], stderr=log, stdout=log
                )
            else:
                preloaded.start()
                self.process = preloaded.begin("store", args, log.fileno())
        if wait_for_it:
            process = self.process
            wait("the store answers", lambda: self.answers() or process.poll() is not None)
            assert process.poll() is None, self.log
        return self.process

    def answers(self) -> bool:
        """Whether the store process answers."""
        try:
            with Client(self.run / "events.sock", timeout=10) as client:
                client.call("ping")
        except SectoolError:
            return False
        return True

    def stop(self) -> int:
        """End the store as its agent does; its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self.process = None
        return code

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    @property
    def log(self) -> str:
        """What the store wrote to stderr."""
        return (self.base / "store.log").read_text()

    def reader(self) -> Reader:
        """A reader, closed at the end of the test."""
        reader = open_reader(self.state, self.run)
        self._open.append(reader)
        return reader

    def live(self) -> LiveReader:
        """A reader of the running store."""
        reader = self.reader()
        assert isinstance(reader, LiveReader)
        return reader

    def stored(self, records: int, events: int = 0) -> None:
        """Wait until so many flow records and events are in the segments."""
        reader = self.live()
        asked = time.monotonic()

        def enough() -> bool:
            nonlocal asked
            # A query costs more than all the rest of a test: it waits until the rings say that they are empty.
            if any(ring.pending for ring in self._rings.values()) and time.monotonic() - asked < 1.0:
                return False
            asked = time.monotonic()
            row = reader.query(
                "SELECT (SELECT count(*) FROM flow_records) r, (SELECT count(*) FROM events) e"
            ).table
            return bool(row["r"][0].as_py() >= records and row["e"][0].as_py() >= events)

        wait(f"{records} records and {events} events are stored", enough)

    def inside(self, limits: Limits | None = None) -> Store:
        """A store in this process, opened, driven with `step`."""
        store = Store(self.state, self.run, limits)
        store.open()
        self._open.append(store)
        return store

    def close(self) -> None:
        for thing in reversed(self._open):
            with contextlib.suppress(Exception):
                thing.close()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for ring in self._rings.values():
            ring.close()


def _folder(fallback: Path) -> Path:
    """On a tmpfs, as the real run folder is."""
    return Path(
        tempfile.mkdtemp(prefix="st-store-", dir="/dev/shm" if Path("/dev/shm").is_dir() else fallback)
    )


@pytest.fixture(scope="session")
def make_lab() -> Iterator[Callable[[Path], StoreLab]]:
    """Makes store labs; their folders go at the end."""
    bases: list[Path] = []

    def make(fallback: Path) -> StoreLab:
        bases.append(_folder(fallback))
        return StoreLab(bases[-1])

    yield make
    for base in bases:
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[StoreLab]:
    """A store lab in a folder of its own."""
    lab = StoreLab(_folder(tmp_path))
    try:
        yield lab
    finally:
        lab.close()
        shutil.rmtree(lab.base, ignore_errors=True)
