"""The Workload API, asked by the real `spiffe` client in processes of its own, by our own, and by nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from nfq.cgroup import Cgroups
from sectool.agent.svids import Callers
from sectool.errors import SectoolError
from sectool.events import now_us
from sectool.identity.workload import Facts, resolve
from sectool.spiffe.grpc import MAX_REQUEST, GrpcError, ServerConnection, Status, call, framed, unframed
from sectool.spiffe.messages import FETCH_BUNDLES, FETCH_SVID, X509SVIDResponse
from sectool.spiffe.workloadapi import MAX_OF_PROCESS, REQUIRED, Source, Svid, WorkloadApi

from .conftest import Domain

T = TypeVar("T")
DEADLINE_S = 30.0
CLIENT = str(Path(__file__).with_name("client.py"))
METADATA = dict([REQUIRED])


class Served:
    """The API in a thread with a loop of its own; SVIDs are of the workload that /proc shows."""

    def __init__(self, domain: Domain, folder: Path, other: Domain) -> None:
        self.domain = domain
        self.path = folder / "workload.sock"
        self.life_s = 3600
        self.asked: list[Facts] = []
        self.refused = ""
        self.domains = {d.host.trust_domain: d for d in (domain, other)}
        self.loop = asyncio.new_event_loop()
        self.api: WorkloadApi
        self._callers: Callers
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.do(self._start())

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    async def _start(self) -> None:
        self._callers = Callers(Cgroups())
        source = Source(
            self._callers.attest, self._svid, self._bundles, lambda: self.domain.host.trust_domain
        )
        self.api = WorkloadApi(self.path, source, now_us)
        await self.api.start()

    def _svid(self, facts: Facts) -> Svid:
        if self.refused:
            raise SectoolError(self.refused)
        self.asked.append(facts)
        path = resolve(facts, [], {}, host="gate-1").path
        made = self.domain.host.authority.issue_portable(path, now_us(), self.life_s)
        key = made.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return Svid(made.spiffe_id, made.leaf_der + made.host_der, key, made.renew_at_us)

    def _bundles(self) -> Mapping[str, bytes]:
        return {name: d.roots[0].certificate.public_bytes(Encoding.DER) for name, d in self.domains.items()}

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Something in the server's loop."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return future.result(DEADLINE_S)

    def changed(self) -> None:
        self.loop.call_soon_threadsafe(self.api.changed)

    def close(self) -> None:
        async def end() -> None:
            await self.api.close()
            self._callers.close()

        self.do(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(DEADLINE_S)
        self.loop.close()
        assert not self.path.exists()

    def ask(self, *what: str) -> dict[str, Any]:
        """The first line of the real client."""
        done = subprocess.run(
            [sys.executable, CLIENT, str(self.path), *what],
            capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        assert done.stdout, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
        return answer


@pytest.fixture
def served(domain: Domain, make_domain: Callable[[str], Domain]) -> Iterator[Served]:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are for their owner alone
        Path(folder).chmod(0o755)
        made = Served(domain, Path(folder), make_domain("other.example"))
        yield made
        made.close()


def until(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + DEADLINE_S
    wait = threading.Event()
    while not (found := condition()):
        assert time.monotonic() < end, f"not in time: {what}"
        wait.wait(0.01)
    return found


def status_of(path: Path, method: str, request: bytes = b"", metadata: Mapping[str, str] = METADATA) -> int:
    """How a call of our own client ends."""

    async def ask() -> int:
        try:
            async for _ in call(path, method, request, metadata):
                return Status.OK
        except GrpcError as error:
            return error.status
        return -1

    return asyncio.run(ask())


# -- the real client -------------------------------------------------------------------------------------------------


def test_an_unmodified_client_gets_its_own_svid_and_everybodys_bundles(served: Served) -> None:
    answer = served.ask("svid")
    assert answer["id"].startswith("spiffe://partner.example/host/gate-1/wl/python")
    assert (answer["chain"], answer["key_fits"]) == (2, True)
    assert served.ask("bundles") == {"bundles": {"partner.example": 1, "other.example": 1}}
    (facts,) = served.asked
    assert facts.executable == str(Path(sys.executable).resolve())
    assert len(facts.sha256) == 64


def test_jwt_svids_are_honestly_not_there(served: Served) -> None:
    assert "only X.509-SVIDs are issued here" in served.ask("jwt")["error"]


def test_who_has_no_identity_is_told_so(served: Served) -> None:
    served.refused = "nobody knows it"
    assert "no identity: nobody knows it" in served.ask("svid")["error"]


def test_another_user_and_another_program_are_other_workloads(served: Served, tmp_path: Path) -> None:
    """What a caller says of itself counts nothing: the same script asks each time."""
    copy = tmp_path / "bin" / "python-copy"
    copy.parent.mkdir()
    shutil.copy(Path(sys.executable).resolve(), copy)
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", tmp_path)  # so that it finds the packages
    (tmp_path / "lib").symlink_to(Path(sys.prefix) / "lib")
    ids = [served.ask("svid")["id"]]
    done = subprocess.run(
        [str(copy), CLIENT, str(served.path), "svid"],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    ids.append(json.loads(done.stdout.splitlines()[0])["id"])
    ids.append(served.ask("svid", "65534")["id"])
    assert len(set(ids)) == 3
    assert [facts.uid for facts in served.asked] == [0, 0, 65_534]


def test_renewals_and_new_bundles_are_pushed(served: Served) -> None:
    served.life_s = 2
    process = subprocess.Popen(
        [sys.executable, CLIENT, str(served.path), "watch"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        lines = (json.loads(line) for line in process.stdout)
        first, second = next(lines), next(lines)
        assert first["id"] == second["id"]
        assert first["serial"] != second["serial"]
        assert first["domains"] == ["other.example", "partner.example"]
        served.life_s = 3600
        del served.domains["other.example"]
        served.changed()
        assert next(line for line in lines if len(line["domains"]) == 1)["domains"] == ["partner.example"]
        process.kill()
    until(lambda: served.api.clients == 0, "the client is gone")


# -- our own client, and worse -----------------------------------------------------------------------------------------


def test_our_client_understands_our_server(served: Served) -> None:
    async def fetch() -> Any:
        async for message in call(served.path, FETCH_SVID, b"", METADATA):
            answer = X509SVIDResponse()
            answer.ParseFromString(message)
            return answer
        return None

    answer = asyncio.run(fetch())
    assert answer.svids[0].spiffe_id.startswith("spiffe://partner.example/host/gate-1/wl/")
    assert list(answer.federated_bundles) == ["spiffe://other.example"]


@pytest.mark.parametrize(
    ("method", "request_", "metadata", "status"),
    [
        (FETCH_SVID, b"", METADATA, Status.OK),
        (FETCH_BUNDLES, b"", METADATA, Status.OK),
        (FETCH_SVID, b"", {}, Status.INVALID_ARGUMENT),
        (FETCH_SVID, b"", {"workload.spiffe.io": "TRUE"}, Status.INVALID_ARGUMENT),
        ("/SpiffeWorkloadAPI/Other", b"", {}, Status.INVALID_ARGUMENT),
        ("/SpiffeWorkloadAPI/Other", b"", METADATA, Status.UNIMPLEMENTED),
        ("/SpiffeWorkloadAPI/FetchJWTSVID", b"", METADATA, Status.UNIMPLEMENTED),
        (FETCH_SVID, b"x" * (MAX_REQUEST + 1), METADATA, Status.RESOURCE_EXHAUSTED),
    ],
)
def test_calls_and_their_status(
    served: Served, method: str, request_: bytes, metadata: dict[str, str], status: Status
) -> None:
    assert status_of(served.path, method, request_, metadata) == status


def test_nobody_serves_there(tmp_path: Path) -> None:
    assert status_of(tmp_path / "none.sock", FETCH_SVID) == Status.UNAVAILABLE


HOLDER = """
import asyncio, os, sys
from pathlib import Path
sys.path[:0] = sys.argv[3].split(os.pathsep)
from sectool.spiffe.grpc import call
from sectool.spiffe.messages import FETCH_SVID
async def main():
    async for _ in call(Path(sys.argv[1]), FETCH_SVID, b"", {"workload.spiffe.io": "true"}):
        for fd in range(3, 64):
            try:
                os.set_inheritable(fd, True)
            except OSError:
                pass
        print("got it", flush=True)
        os.execv(sys.argv[2], [sys.argv[2], "60"])
asyncio.run(main())
"""


def test_who_becomes_another_program_gets_nothing_more(served: Served) -> None:
    """The connection lives on in the program that was run over it; its next answer would be that program's SVID."""
    sleep = shutil.which("sleep")
    assert sleep
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(served.path), sleep, os.pathsep.join(filter(None, sys.path))],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "got it\n"
        exe = Path(f"/proc/{process.pid}/exe")
        until(lambda: "python" not in str(exe.readlink()), "the exec")
        assert served.api.clients == 1
        served.changed()

        async def calls() -> int:
            return sum("_serve" in repr(task) for task in asyncio.all_tasks())

        until(lambda: served.do(calls()) == 0, "the end of its call")
        assert {facts.executable for facts in served.asked} == {str(Path(sys.executable).resolve())}
        process.kill()
    until(lambda: served.api.clients == 0, "the client is gone")


def test_a_process_has_so_many_connections_and_no_more(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_OF_PROCESS):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(served.path))
        until(lambda: served.api.clients == MAX_OF_PROCESS, "all are connected")
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.settimeout(DEADLINE_S)
        sock.connect(str(served.path))
        assert sock.recv(100) == b""
    until(lambda: served.api.clients == 0, "all are gone")
    assert status_of(served.path, FETCH_SVID) == Status.OK


@given(data=st.binary(max_size=200))
@settings(max_examples=int(os.environ.get("SECTOOL_EXAMPLES", "80")), deadline=None)
def test_messages_are_taken_whole_or_refused(data: bytes) -> None:
    try:
        messages, taken = unframed(data, 64)
    except GrpcError as error:
        assert error.status in (Status.UNIMPLEMENTED, Status.RESOURCE_EXHAUSTED)
        return
    assert b"".join(map(framed, messages)) == data[:taken]
    assert all(len(message) <= 64 for message in messages)


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@given(
    frames=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 255), st.integers(0, 9), st.binary(max_size=40)),
        max_size=6,
    ),
    preface=st.booleans(),
)
@settings(max_examples=int(os.environ.get("SECTOOL_EXAMPLES", "60")), deadline=None)
def test_any_bytes_end_in_order(frames: list[tuple[int, int, int, bytes]], preface: bool) -> None:
    """Garbage costs its sender the connection, and nobody anything else."""
    data = _PREFACE if preface else b""
    for kind, flags, stream, body in frames:
        data += struct.pack(">I", len(body))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + body

    async def converse() -> None:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        connection = ServerConnection(reader, writer, {}, None, REQUIRED)
        running = asyncio.create_task(connection.run())
        with theirs:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            await asyncio.wait_for(running, DEADLINE_S)

    asyncio.run(converse())
