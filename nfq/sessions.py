"""The sessions of one packet worker: those it holds as initiator and those it has issued as responder.

Bounded in number, in all and by peer; expired ones are forgotten. `where` is whatever names a destination for the
caller (address, protocol and port): an initiator has to choose before it knows who listens there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from nfq.handshake import Grant, HandshakeError
from nfq.packet import TCP
from nfq.session import Held, Issued, Request, Resume
from sectool.events import DropReason

SWEEP_US = 10_000_000

Lane = Callable[[int], int]


def one_lane(_workers: int) -> int:
    """For a responder with one worker, and for whoever does not spread connections."""
    return 0


class Sessions:
    """All sessions of one packet worker, as initiator and as responder."""

    def __init__(self, *, held_limit: int = 16_384, issued_limit: int = 65_536, per_peer: int = 256) -> None:
        """`per_peer` bounds the sessions of one peer credential, so that nobody pushes out those of others."""
        self._held: OrderedDict[tuple[int, Hashable], dict[int, Held]] = OrderedDict()
        self._workers: dict[tuple[int, Hashable], int] = {}
        self._issued: dict[bytes, Issued] = {}
        self._of_peer: dict[int, dict[bytes, Issued]] = {}
        self._held_limit = held_limit
        self._issued_limit = issued_limit
        self._per_peer = per_peer
        self._swept_us = 0

    @property
    def counts(self) -> tuple[int, int]:
        """Sessions held as initiator, and issued as responder."""
        return sum(len(lanes) for lanes in self._held.values()), len(self._issued)

    # -- initiator -------------------------------------------------------------------------------------------

    def choose(self, local: int, where: Hashable, now_us: int, lane: Lane = one_lane) -> Held | None:
        """The session for a connection of identity `local` to `where`; None: make a full handshake.

        `lane` tells to which of n workers of the responder the connection's addresses lead.
        """
        name = local, where
        lanes = self._held.get(name)
        if lanes is None:
            return None
        which = lane(self._workers[name])
        session = lanes.get(which)
        if session is None:
            return None
        if session.retired or not session.alive(now_us):
            self._drop(name, which)
            return None
        self._held.move_to_end(name)
        return None if session.due(now_us) else session

    def learn(self, session: Held, where: Hashable, grant: Grant, lane: Lane = one_lane) -> bool:
        """Keep a new session, instead of the one before. False: its worker is not the one the addresses lead to.

        (Then an address translator lies between, and nobody can tell which worker the next connection would meet.)
        """
        if lane(grant.workers) != grant.worker:
            return False
        name = session.local, where
        if self._workers.get(name) != grant.workers:
            self._held.pop(name, None)
        self._workers[name] = grant.workers
        self._held.setdefault(name, {})[grant.worker] = session
        self._held.move_to_end(name)
        if len(self._held) > self._held_limit:
            oldest, _ = self._held.popitem(last=False)
            del self._workers[oldest]
        return True

    def forget(self, session: Held) -> None:
        """The responder does not know it, or does not answer: no further connections (`choose` takes it out)."""
        session.retired = True

    def _drop(self, name: tuple[int, Hashable], which: int) -> None:
        del self._held[name][which]
        if not self._held[name]:
            del self._held[name], self._workers[name]

    # -- responder -------------------------------------------------------------------------------------------

    def issue(self, session: Issued) -> None:
        """The initiator has proven itself: its next connections may use the session."""
        mine = self._of_peer.setdefault(session.peer.id, {})
        mine[session.id] = self._issued[session.id] = session
        if len(mine) > self._per_peer:
            self._remove(next(iter(mine.values())))
        if len(self._issued) > self._issued_limit:
            self._remove(next(iter(self._issued.values())))

    def open(self, payload: bytes, now_us: int, protocol: int = TCP) -> Resume:
        """Authenticate a SYN payload of an IP protocol. Its number counts as used only after `Resume.take`.

        Raises HandshakeError; SESSION_UNKNOWN deserves a hint (`unknown`). A made-up id costs one look into a dict.
        """
        request = Request.parse(payload)
        session = self._issued.get(request.session_id)
        if session is None:
            raise HandshakeError(DropReason.SESSION_UNKNOWN, "no such session")
        if not session.vouches(payload, protocol):
            raise HandshakeError(DropReason.SESSION_FORGED, "the SYN's tag does not hold")
        if not session.alive(now_us):
            self._remove(session)
            raise HandshakeError(DropReason.SESSION_UNKNOWN, "the session has expired")
        if not session.window.fresh(request.number):
            raise HandshakeError(DropReason.SYN_REPLAYED, "connection number used before")
        return Resume(session, request)

    def _remove(self, session: Issued) -> None:
        self._issued.pop(session.id, None)
        mine = self._of_peer[session.peer.id]
        mine.pop(session.id, None)
        if not mine:
            del self._of_peer[session.peer.id]

    # -- both ------------------------------------------------------------------------------------------------

    def revoke(self, predicate: Callable[[Held | Issued], bool]) -> int:
        """End at once all sessions that `predicate` names, connections half made under them included; how many."""
        n = 0
        for name, lanes in list(self._held.items()):
            for which, held in list(lanes.items()):
                if predicate(held):
                    held.ended = True
                    self._drop(name, which)
                    n += 1
        for issued in list(self._issued.values()):
            if predicate(issued):
                issued.ended = True
                self._remove(issued)
                n += 1
        return n

    def clear(self) -> int:
        """End all: whom to trust has changed."""
        return self.revoke(lambda _: True)

    def tick(self, now_us: int) -> None:
        """Forget what has expired; looks through the tables every SWEEP_US."""
        if abs(now_us - self._swept_us) >= SWEEP_US:
            self._swept_us = now_us
            self.revoke(lambda session: not session.alive(now_us))
