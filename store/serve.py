"""events.sock: one thread per client, one answer per request, and `tail` until the client hangs up.

Who may ask is decided by the kernel's word about the peer (SO_PEERCRED): root, the user the store runs as, and the
members of the socket's group. Nothing a client does can stop ingest: queries run on cursors of their own with time
limits and end with the connection they were asked on, sends to a client that does not read end after `SEND_S`, and a
follower that is too slow gets a counted gap.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pwd
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from sectool.api import wire
from sectool.api.server import Peer
from sectool.errors import Exit, PrivilegeError, SectoolError, UsageError
from sectool.filters import Filter
from store import query, questions
from store.absent import Absent
from store.flows import Tail, list_events, list_flows, no_new_flows
from store.process import Store
from store.query import Result

log = logging.getLogger("store.api")

MAX_CLIENTS = 64
MAX_OTHERS = 48  # of them by users who only read: they cannot lock out root and the agent
MAX_QUERIES = 4  # at once
MAX_OTHERS_QUERIES = 3
QUEUE_S = 5.0
SEND_S = 30.0
IDLE_S = 600.0
TAIL_S = 0.25  # at most four answers a second to one follower
TAIL_ROWS = 5000
TAIL_BEHIND = 200_000  # a follower further behind than this many events loses those in between
MAX_REQUEST = 1 << 20
HELD_BYTES = 8 << 20  # an answer larger than this keeps its place among the queries until it is taken
QUERYING = frozenset({"query", "explain", "flows", "events", "ask"})

Answer = tuple[dict[str, Any], bytes]


class Server:
    """Serves `store` on a unix socket at `path` that belongs to root and `group_id` (mode 0660)."""

    def __init__(self, store: Store, path: Path, group_id: int | None = None) -> None:
        self.store = store
        self.path = path
        self._group = group_id
        self._clients: dict[socket.socket, Peer] = {}
        self._lock = threading.Lock()
        self._gone = threading.Condition(self._lock)
        self._queries = threading.BoundedSemaphore(MAX_QUERIES)
        self._others_queries = threading.BoundedSemaphore(MAX_OTHERS_QUERIES)
        self._closing = False
        self._absent = Absent(lambda thread: self.store.catalog.interrupt_queries(thread))
        self._operations: dict[str, Callable[[Mapping[str, Any]], Answer]] = {
            "ping": lambda _: ({"pid": os.getpid(), "next_seq": self.store.next_seq}, b""),
            "stats": lambda _: (self.store.stats(), b""),
            "query": self._query,
            "explain": self._explain,
            "flows": self._flows,
            "events": self._events,
            "ask": self._ask,
        }
        self._maintenance: dict[str, Callable[[Mapping[str, Any]], Answer]] = {
            "prune": self._prune,
            "compact": self._compact,
            "retain": lambda request: (self.store.upkeep.choose(request, request["actor"]).document(), b""),
        }
        self._listener = self._listen()

    def _listen(self) -> socket.socket:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(self.path.lstat().st_mode):
                self.path.unlink()  # of a store that died; a living one holds the lock of the run folder
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        before = os.umask(0o177)
        try:
            listener.bind(str(self.path))
        except OSError as error:
            listener.close()
            raise SectoolError(f"cannot listen on {self.path}: {error.strerror or error}") from None
        finally:
            os.umask(before)
        os.chown(self.path, -1, self._group if self._group is not None else -1)
        self.path.chmod(0o660)
        listener.listen(128)
        return listener

    def start(self) -> None:
        """Answer from now on, in threads."""
        self._warm_up()
        threading.Thread(target=self._accept, name="events.sock", daemon=True).start()

    def _warm_up(self) -> None:
        """Ask everything once: first times load modules for half a second, with ingest waiting behind."""
        with contextlib.suppress(SectoolError):
            to_ipc(
                query.run(self.store.catalog, "SELECT action, count(*) FROM flows GROUP BY ALL LIMIT 0").table
            )
            list_flows(self.store.catalog, Filter(), last=1)
            no_new_flows(self.store.catalog)

    def close(self) -> None:
        """Hang up on everybody and remove the socket."""
        self._closing = True
        self._absent.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self.store.committed:
            self.store.committed.notify_all()
        for how in (socket.SHUT_RD, socket.SHUT_RDWR):  # first let followers say that this is the end
            with self._lock:
                for client in self._clients:
                    with contextlib.suppress(OSError):
                        client.shutdown(how)
                self._gone.wait_for(lambda: not self._clients, 1.0)

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNABORTED):
                    return  # closed
                log.warning("accept: %s", error)
                time.sleep(0.2)
                continue
            try:
                peer = Peer.of(client)
                with self._lock:
                    if not self._admit(peer):
                        client.close()
                        continue
                    self._clients[client] = peer
                threading.Thread(
                    target=self._converse, args=(client, peer), name="client", daemon=True
                ).start()
            except (
                OSError,
                RuntimeError,
                MemoryError,
            ) as error:  # no thread more, no memory: now, not for ever
                log.warning("a client is turned away: %s", error)
                with self._lock:
                    self._clients.pop(client, None)
                client.close()

    def _admit(self, peer: Peer) -> bool:
        """Whether there is a place for one more of this user's connections."""
        others = sum(not _owner(known) for known in self._clients.values())
        return len(self._clients) < MAX_CLIENTS and (_owner(peer) or others < MAX_OTHERS)

    def _converse(self, client: socket.socket, peer: Peer) -> None:
        try:
            client.settimeout(SEND_S)
            if not allowed(peer, self.path):
                log.warning("%s (pid %d) has no access", peer.name, peer.pid)
                _refuse(
                    client,
                    PrivilegeError(
                        f"{peer.name} may not read events", "run it with sudo, or join the socket's group"
                    ),
                )
                return
            log.info("%s (pid %d) connected", peer.name, peer.pid)
            while self._turn(client, peer):
                pass
        except (OSError, EOFError):
            log.debug("a client went away")
        finally:
            with self._lock:
                self._clients.pop(client, None)
                self._gone.notify_all()
            client.close()

    def _turn(self, client: socket.socket, peer: Peer) -> bool:
        """Answer one request; False when the conversation is over."""
        readable, _, _ = select.select([client], [], [], IDLE_S)
        if not readable:
            return False
        try:
            frame = wire.read(client, MAX_REQUEST)
        except wire.WireError as error:
            _refuse(client, error)
            _let_read(client)
            return False
        if frame is None:
            return False
        op = frame.header.get("op")
        level = (
            logging.INFO if op in ("query", "stream", "explain", "tail") else logging.DEBUG
        )  # a screen that refreshes asks all the time
        log.log(level, "%s by %s (pid %d)", op if isinstance(op, str) else "?", peer.name, peer.pid)
        with contextlib.ExitStack() as place:
            try:
                if op == "tail":
                    self._tail(client, frame.header)
                    return False
                if op == "stream":
                    self._stream(client, peer, frame.header, place)
                    return True
                message = self._answer(client, peer, frame.header, place)
            except SectoolError as error:
                _refuse(client, error)
                return True
            except Exception as error:  # a defect in one answer must not end the conversations of others
                if isinstance(error, OSError) and op in ("tail", "stream"):
                    raise  # who listened went away
                log.exception("%s failed", op)
                _refuse(
                    client,
                    SectoolError(
                        f"{op} failed in the store: {type(error).__name__}", "see agent.log in the run folder"
                    ),
                )
                return True
            if len(message) <= HELD_BYTES:
                place.close()  # else who is slow to take it holds memory, and may not ask for more from elsewhere
            client.sendall(message)
        return True

    def _answer(
        self, client: socket.socket, peer: Peer, request: Mapping[str, Any], place: contextlib.ExitStack
    ) -> bytes:
        """The answer to one request. A question that takes the engine gets its place among the queries in `place`."""
        op = request.get("op")
        operation = self._operations.get(op) if isinstance(op, str) else None
        if operation is None and isinstance(op, str) and op in self._maintenance:
            operation = self._for_owner(peer, op)
        if operation is None:
            raise UsageError(f"the store knows no operation {op!r}", "client and store may differ in version")
        if op in QUERYING:
            place.enter_context(self._place(peer))
        with self._absent.noticed(client):
            fields, payload = operation(request)
        return wire.encode({"ok": True, **fields}, payload)

    # --- operations ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _place(self, peer: Peer) -> Iterator[None]:
        """One of the queries that run at once; the last place is for root and the store's own user."""
        with contextlib.ExitStack() as held:
            for places in (self._queries,) if _owner(peer) else (self._others_queries, self._queries):
                if not places.acquire(timeout=QUEUE_S):
                    raise SectoolError("the store is busy with other queries", "try again in a moment")
                held.callback(places.release)
            yield

    def _explain(self, request: Mapping[str, Any]) -> Answer:
        analyze = request.get("analyze", False)
        if not isinstance(analyze, bool):
            raise UsageError("explain: analyze is true or false")
        timeout_ms = _number(request, "timeout_ms", query.DEFAULT_TIMEOUT_MS)
        assert timeout_ms is not None
        plan = query.explain(self.store.catalog, _sql(request), analyze=analyze, timeout_ms=timeout_ms)
        return {}, plan.encode()

    def _query(self, request: Mapping[str, Any]) -> Answer:
        sql = _sql(request)
        limit = _number(request, "limit", query.DEFAULT_ROWS)
        timeout_ms = _number(request, "timeout_ms", query.DEFAULT_TIMEOUT_MS)
        assert limit is not None
        assert timeout_ms is not None
        since, until = _number(request, "begun_since"), _number(request, "begun_until")
        begun = None if since is None or until is None else (since, until)
        return _table(query.run(self.store.catalog, sql, limit=limit, timeout_ms=timeout_ms, begun=begun))

    def _stream(
        self, client: socket.socket, peer: Peer, request: Mapping[str, Any], place: contextlib.ExitStack
    ) -> None:
        """All rows of a query, frame by frame. Its place among the queries is held until the last is taken."""
        timeout_ms = _number(request, "timeout_ms", query.DEFAULT_TIMEOUT_MS)
        assert timeout_ms is not None
        sql = _sql(request)
        place.enter_context(self._place(peer))
        with (
            self._absent.noticed(client),
            contextlib.closing(query.stream(self.store.catalog, sql, timeout_ms=timeout_ms)) as tables,
        ):
            for table in tables:
                client.sendall(wire.encode({"ok": True, "rows": table.num_rows}, to_ipc(table)))
        client.sendall(wire.encode({"ok": True, "end": True}))

    def _flows(self, request: Mapping[str, Any]) -> Answer:
        filter_ = Filter.from_json(request.get("filter"))
        bounds = {name: _number(request, name) for name in ("since", "until", "at", "first", "last")}
        timeout_ms = _number(request, "timeout_ms", query.DEFAULT_TIMEOUT_MS)
        assert timeout_ms is not None
        return _table(list_flows(self.store.catalog, filter_, timeout_ms=timeout_ms, **bounds))

    def _events(self, request: Mapping[str, Any]) -> Answer:
        types = request.get("types") or []
        if not isinstance(types, list) or not all(isinstance(t, str) for t in types) or len(types) > 100:
            raise UsageError("events: types is a list of texts")
        bounds = {name: _number(request, name) for name in ("since", "until", "first", "last")}
        timeout_ms = _number(request, "timeout_ms", query.DEFAULT_TIMEOUT_MS)
        assert timeout_ms is not None
        return _table(list_events(self.store.catalog, types, timeout_ms=timeout_ms, **bounds))

    def _ask(self, request: Mapping[str, Any]) -> Answer:
        document = questions.answer(self.store.catalog, request.get("question"), request)
        return {}, questions.encode(document)

    def _for_owner(self, peer: Peer, op: str) -> Callable[[Mapping[str, Any]], Answer]:
        """What changes files is for root and the user the store runs as; readers by their group alone may not."""
        if not _owner(peer):
            raise PrivilegeError(f"{peer.name} may not {op} the store", "run it with sudo")
        log.info("%s by %s (pid %d)", op, peer.name, peer.pid)
        operation = self._maintenance[op]
        return lambda request: operation({**request, "actor": peer.name})

    def _prune(self, request: Mapping[str, Any]) -> Answer:
        keep_bytes, keep_us = _number(request, "keep_bytes"), _number(request, "keep_us")
        if keep_bytes is None and keep_us is None:
            raise UsageError("prune: say what to keep: keep_bytes or keep_us")
        return {"retired": self.store.prune(keep_bytes, keep_us, request["actor"])}, b""

    def _compact(self, request: Mapping[str, Any]) -> Answer:
        name, left = self.store.compact_next(_number(request, "older_us", 0) or 0)
        return {"done": name, "left": left}, b""

    def _tail(self, client: socket.socket, request: Mapping[str, Any]) -> None:
        """Send new flows until the client hangs up or the store ends."""
        store = self.store
        start = _number(request, "from_seq")
        tail = Tail(
            Filter.from_json(request.get("filter")), store.next_seq if start is None else max(0, start)
        )
        client.sendall(wire.encode({"ok": True, "next_seq": tail.next_seq}))
        while not self._closing:
            with store.committed:
                store.committed.wait_for(lambda: store.next_seq > tail.next_seq or self._closing, 1.0)
            end = store.next_seq
            gap = 0
            if end - tail.next_seq > TAIL_BEHIND and start is None:
                gap = end - TAIL_ROWS - tail.next_seq
                tail.next_seq += gap
            before = tail.next_seq
            table = None
            if end > before:
                table = tail.advance(store.catalog, store.recent(before), end, TAIL_ROWS)
            if table is not None or gap:
                header: dict[str, Any] = {"ok": True, "next_seq": tail.next_seq}
                if gap:
                    header["gap"] = gap
                client.sendall(wire.encode(header, b"" if table is None else to_ipc(table)))
            if tail.next_seq >= end:
                start = None  # caught up: from now on a slow client loses the middle, not its connection
                readable, _, _ = select.select([client], [], [], TAIL_S)
                if readable and not client.recv(1, socket.MSG_PEEK):
                    break
        with contextlib.suppress(OSError):
            client.sendall(wire.encode({"ok": True, "next_seq": tail.next_seq, "end": True}))


def allowed(peer: Peer, path: Path) -> bool:
    """Whether `peer` may read: root, our own user, or a member of the socket's group."""
    if _owner(peer):
        return True
    group = path.stat().st_gid
    if peer.gid == group:
        return True
    try:
        user = pwd.getpwuid(peer.uid)
    except KeyError:
        return False
    return group in os.getgrouplist(user.pw_name, user.pw_gid)


def _owner(peer: Peer) -> bool:
    """Root, or the user the store runs as."""
    return peer.uid in (0, os.geteuid())


def to_ipc(table: pa.Table) -> bytes:
    """A table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _table(result: Result) -> Answer:
    fields: dict[str, Any] = {"rows": result.table.num_rows, "truncated": result.truncated}
    if result.limited:
        fields["limited"] = result.limited
    payload = to_ipc(result.table)
    if len(payload) > wire.MAX_PAYLOAD:
        raise UsageError(
            f"the answer has {len(payload) >> 20} MiB; {wire.MAX_PAYLOAD >> 20} are the most",
            "ask for fewer rows at once, or for a shorter time",
        )
    return fields, payload


def _sql(request: Mapping[str, Any]) -> str:
    sql = request.get("sql")
    if not isinstance(sql, str):
        raise UsageError(f"{request.get('op')}: sql has to be text")
    return sql


def _number(request: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    value = request.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise UsageError(f"{name} has to be a whole number from 0 up")
    return value


def _let_read(client: socket.socket) -> None:
    """Take what the peer still sends: closing over unread bytes would tear our last words from its hands."""
    client.shutdown(socket.SHUT_WR)
    client.settimeout(1.0)
    for _ in range(64):
        if not client.recv(65536):
            return


def _refuse(client: socket.socket, error: SectoolError) -> None:
    client.sendall(
        wire.encode(
            {
                "ok": False,
                "error": error.message,
                "hint": error.hint,
                "exit": int(error.exit_code or Exit.DENIED),
            }
        )
    )
