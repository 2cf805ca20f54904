"""ICMP questions and their answers: one Exchange for all messages of one identifier between two addresses.

Other messages (a redirect, say) are exchanges without an identifier: what policy said of the first counts for the next.
"""

from __future__ import annotations

from collections import OrderedDict

from nfq.flow import Flow
from nfq.recorder import Counts

IDLE_US = 30_000_000  # as long as connection tracking remembers an echo


class Exchange:
    """A flow of messages that policy allowed, with what was counted."""

    __slots__ = ("answered", "asked", "flow", "last_us", "observed", "until_us")

    def __init__(self, flow: Flow, until_us: int, now_us: int) -> None:
        self.flow = flow
        self.until_us = until_us  # when policy may say otherwise
        self.last_us = now_us
        self.observed = False  # judged while nothing was enforced
        self.asked = (0, 0)  # octets, messages
        self.answered = (0, 0)

    def count(self, size: int, answer: bool) -> None:
        """One message more, of `size` octets with its IP header."""
        if answer:
            self.answered = (self.answered[0] + size, self.answered[1] + 1)
        else:
            self.asked = (self.asked[0] + size, self.asked[1] + 1)

    @property
    def counts(self) -> Counts:
        """What went either way."""
        return Counts(*self.asked, *self.answered)


class Exchanges:
    """Exchanges by key, the one longest silent first; bounded."""

    def __init__(self, limit: int = 16_384) -> None:
        self._known: OrderedDict[bytes, Exchange] = OrderedDict()
        self.limit = limit

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: bytes) -> Exchange | None:
        """The exchange of that key."""
        return self._known.get(key)

    def touch(self, key: bytes, exchange: Exchange, now_us: int) -> None:
        """It is in use."""
        exchange.last_us = now_us
        self._known.move_to_end(key)

    def add(self, key: bytes, exchange: Exchange) -> Exchange | None:
        """Insert or replace; gives what had to make room."""
        before = self._known.pop(key, None)
        self._known[key] = exchange
        if before is None and len(self._known) > self.limit:
            before = self._known.popitem(last=False)[1]
        return before

    def remove(self, key: bytes) -> Exchange | None:
        """Forget."""
        return self._known.pop(key, None)

    def silent(self, now_us: int) -> list[Exchange]:
        """Those that have been silent for IDLE_US, taken out."""
        out: list[Exchange] = []
        while self._known:
            key, exchange = next(iter(self._known.items()))
            if now_us - exchange.last_us < IDLE_US:
                break
            del self._known[key]
            out.append(exchange)
        return out
