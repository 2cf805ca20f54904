"""Released flows in a root-only tmpfs file, so that a restarted worker can still judge, cut and account for them.

No key is in it: a released flow needs none. Fixed slots in a shared mapping (a store to memory per flow, no system
call), and beside it a file of JSON lines with the identities that slots refer to.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nfq.core import address
from nfq.flow import Flow, LocalWorkload, Owner, State
from nfq.noise import KeyPair
from sectool.errors import SectoolError
from sectool.events import Auth, AuthResult, ConnState, DropReason, Point
from sectool.identity.verify import PeerIdentity
from sectool.labels import LabelError, LabelSet
from sectool.policy import Party, Request

_MAGIC = b"sectool flows 1\n"
_HEADER = 64
# used, point, auth, key length, key, isn, revision, pid, uid, cgroup, event id, start,
# local workload, local identity, peer workload (loopback), peer identity
_SLOT = struct.Struct("<BBBB36sIIIIxxxxQ16sqqqqq")
_SIZE = 160
_JUDGED, _ADOPTED = 1, 2  # how a slot is used
_NO_KEY = KeyPair.of(bytes(31) + b"\x40")  # stands where a restored workload's key would; never used

assert _SLOT.size <= _SIZE


class Journal:
    """Slots by number; a flow keeps its slot while it lives. When all are taken, flows go without (`skipped`)."""

    def __init__(self, path: Path, slots: int = 65_536) -> None:
        self.path = path
        self.slots = slots
        self.skipped = 0
        self._names = path.with_name(path.name + ".identities")
        self._written: set[int] = set()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = _HEADER + slots * _SIZE
            try:
                os.posix_fallocate(fd, 0, size)  # a full tmpfs must be an error now, not a signal later
            except OSError as e:
                raise SectoolError(
                    f"cannot make the flow journal {path}: {e.strerror}", "make room in the run folder"
                ) from e
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        names = os.open(self._names, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._out = os.fdopen(names, "w", encoding="ascii")
        self._out.write("\n")  # ends a line that a crash has torn
        if self._map[: len(_MAGIC)] != _MAGIC:
            self._map[_HEADER:size] = bytes(size - _HEADER)
            self._map[: len(_MAGIC)] = _MAGIC
        self._free = [i for i in range(slots - 1, -1, -1) if not self._map[_HEADER + i * _SIZE]]

    def add(self, flow: Flow) -> None:
        """Write the flow into a free slot."""
        if flow.journal_slot >= 0:
            return
        if not self._free:
            self.skipped += 1
            return
        peer = flow.peer_local.identity if flow.peer_local is not None else flow.peer
        try:
            for identity in (flow.local.identity if flow.local else None, peer):
                if identity is not None and identity.id not in self._written:
                    self._remember(identity)
        except OSError:  # no room for the identity: without it the slot would mean nothing
            self.skipped += 1
            return
        slot = self._free.pop()
        at = _HEADER + slot * _SIZE
        owner = flow.owner
        _SLOT.pack_into(
            self._map,
            at,
            0,
            flow.point,
            flow.auth,
            len(flow.key),
            flow.key,
            flow.isn,
            flow.revision,
            owner.pid,
            owner.uid,
            owner.cgroup,
            flow.event_id,
            flow.start_us,
            flow.local.id if flow.local else 0,
            flow.local.identity.id if flow.local else 0,
            flow.peer_local.id if flow.peer_local else 0,
            peer.id if peer else 0,
        )
        self._map[at] = _ADOPTED if flow.adopted else _JUDGED  # last: a slot torn by a crash stays unused
        flow.journal_slot = slot

    def remove(self, flow: Flow) -> None:
        """Free the flow's slot, if it has one."""
        if flow.journal_slot >= 0:
            self._map[_HEADER + flow.journal_slot * _SIZE] = 0
            self._free.append(flow.journal_slot)
            flow.journal_slot = -1

    def _remember(self, identity: PeerIdentity) -> None:
        self._out.write(json.dumps(_to_json(identity)) + "\n")
        self._out.flush()
        self._written.add(identity.id)

    def restore(self) -> Iterator[Flow]:
        """Flows left by the worker before; a slot that cannot be understood is freed and passed over."""
        identities = self._identities()
        self._written.update(identities)
        for slot in range(self.slots):
            at = _HEADER + slot * _SIZE
            if not self._map[at]:
                continue
            try:
                flow = _restored(_SLOT.unpack_from(self._map, at), identities)
            except (KeyError, ValueError):
                self._map[at] = 0
                self._free.append(slot)
                continue
            flow.journal_slot = slot
            yield flow

    def _identities(self) -> dict[int, PeerIdentity]:
        out: dict[int, PeerIdentity] = {}
        for line in self._names.read_text(encoding="ascii", errors="replace").splitlines():
            try:
                identity = _from_json(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, LabelError):
                continue  # a line torn by a crash
            out[identity.id] = identity
        return out

    def close(self) -> None:
        """Unmap; the files stay."""
        self._map.close()
        self._out.close()


def _to_json(i: PeerIdentity) -> dict[str, object]:
    return {
        "id": i.id,
        "spiffe_id": i.spiffe_id,
        "trust_domain": i.trust_domain,
        "labels": dict(i.labels),
        "x25519": i.x25519.hex(),
        "not_before_us": i.not_before_us,
        "not_after_us": i.not_after_us,
        "fingerprint": i.fingerprint.hex(),
        "serial": i.serial,
        "host": i.host,
    }


def _from_json(d: dict[str, Any]) -> PeerIdentity:
    labels = d.pop("labels")
    x25519, fingerprint = bytes.fromhex(str(d.pop("x25519"))), bytes.fromhex(str(d.pop("fingerprint")))
    if not isinstance(labels, dict):
        raise ValueError("labels")
    return PeerIdentity(labels=LabelSet(labels), x25519=x25519, fingerprint=fingerprint, **d)


def _restored(fields: tuple[Any, ...], identities: dict[int, PeerIdentity]) -> Flow:
    (used, point, auth, n, raw, isn, revision, pid, uid, cgroup, event_id, start, lw, li, pw, pi) = fields
    key = raw[:n]
    if len(key) not in (12, 36):
        raise ValueError("key")
    flow = Flow(key, len(key) == 36, Point(point), State.AUTHORISED, isn, start)
    flow.auth, flow.auth_result = Auth(auth), AuthResult.PROVEN if auth else AuthResult.NONE
    flow.event_id, flow.revision, flow.recorded = event_id, revision, True
    flow.owner = Owner(pid, uid, cgroup)
    flow.conn_state, flow.reason = ConnState.S1, DropReason.NONE
    mine = identities[li] if li else None
    theirs = identities[pi] if pi else None
    if mine is not None:
        flow.local = LocalWorkload(lw, "", _NO_KEY, b"", mine)
    if pw and theirs is not None:
        flow.peer_local = LocalWorkload(pw, "", _NO_KEY, b"", theirs)
    else:
        flow.peer = theirs
    if used == _ADOPTED:
        flow.adopted, flow.conn_state = True, ConnState.OTH
        return flow  # never judged
    here = Party(mine.labels if mine else None, mine.spiffe_id if mine else None, address(flow.local_address))
    there = Party(
        theirs.labels if theirs else None, theirs.spiffe_id if theirs else None, address(flow.remote_address)
    )
    if flow.point is Point.RESPONDER:
        flow.request = Request(there, here, 6, flow.local_port)
    else:
        flow.request = Request(here, there, 6, flow.remote_port)
    return flow
