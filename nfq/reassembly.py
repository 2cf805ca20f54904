"""Records that arrive in pieces: bounded buffers that collect a record's ciphertext until all of it is there.

Nothing here is verified, so nothing here is believed: pieces are told apart by the whole record option (counter,
start, length and tag), which who cannot see the flow cannot guess, and what is complete still has to pass its tag.
"""

from __future__ import annotations

from nfq.suites import TAG_LEN

FLOW_BYTES = 4 << 20  # per flow: what may be under way out of order at once
EARLY_BYTES = 128 << 10  # while no record of the flow has been verified yet
POOL_BYTES = 64 << 20  # all flows of a worker together
MAX_AGE_US = 2_000_000  # the pieces of a record leave in one burst; what is older has lost one


class Partial:
    """One record under way. `view`: its ciphertext, then its tag."""

    __slots__ = (
        "born_us",
        "ce",
        "counter",
        "flags",
        "flow",
        "have",
        "key",
        "length",
        "mask",
        "seq",
        "urgent",
        "view",
    )

    def __init__(self, flow: Pieces, key: bytes, counter: int, seq: int, length: int, now_us: int) -> None:
        self.flow = flow
        self.key = key
        self.counter = counter  # all 64 bits of it
        self.seq = seq  # of the record's first byte
        self.length = length
        self.born_us = now_us
        self.have = 0  # bytes 0 to have are here
        self.mask = 0  # and beyond those, bit i for byte i
        self.flags = (
            0  # TCP flags that belong to the whole: FIN and PSH of its end, CWR and URG of its beginning
        )
        self.urgent = b"\0\0"  # the beginning's urgent pointer
        self.ce = False  # some piece met congestion
        self.view = memoryview(bytearray(length + TAG_LEN))
        self.view[length:] = key[-TAG_LEN:]

    def add(self, at: int, data: memoryview | bytes, size: int) -> bool:
        """Copy a piece; whether the record is complete now. `at + size <= length` is the caller's to check."""
        self.view[at : at + size] = data
        have = self.have
        if at > have:
            self.mask |= ((1 << size) - 1) << at
            return False
        if at + size > have:
            self.have = have = at + size
            if self.mask:
                beyond = self.mask >> have
                run = (~beyond & (beyond + 1)).bit_length() - 1  # ones at the low end
                self.have = have = have + run
        return have == self.length


class Pool:
    """All partial records of a worker, oldest first."""

    def __init__(self, limit: int = POOL_BYTES, max_age_us: int = MAX_AGE_US) -> None:
        self.limit = limit
        self.max_age_us = max_age_us
        self.bytes = 0
        self.given_up = 0  # partial records dropped because they were too old or room was needed
        self._parts: dict[Partial, None] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def enter(self, part: Partial) -> None:
        """Count a new partial record in."""
        self._parts[part] = None
        self.bytes += part.length

    def leave(self, part: Partial) -> None:
        """Count a partial record out."""
        del self._parts[part]
        self.bytes -= part.length

    def oldest(self) -> Partial:
        """The one that has waited longest."""
        return next(iter(self._parts))

    def expire(self, now_us: int) -> int:
        """Give up what is too old, of every flow. Returns how many; they are counted in `given_up`."""
        n = 0
        while self._parts:
            part = self.oldest()
            if now_us - part.born_us <= self.max_age_us:
                break
            part.flow.give_up(part)
            n += 1
        return n


POOL = Pool()  # a worker is one process with one thread


class Pieces:
    """The partial records of one flow's incoming direction."""

    __slots__ = ("bytes", "given_up", "parts", "pool")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.parts: dict[bytes, Partial] = {}  # by record option, oldest first
        self.bytes = 0
        self.given_up = 0

    def begin(
        self, key: bytes, counter: int, seq: int, length: int, now_us: int, *, early: bool
    ) -> Partial | None:
        """Room for a record of which the first piece is here; None (and counted) when there is none to have.

        `early`: nothing of this flow has been verified yet; such a flow gets little room and never takes another's.
        """
        pool = self.pool
        limit = EARLY_BYTES if early else FLOW_BYTES
        while self.bytes + length > limit:
            if not self.parts:
                self._refused()
                return None
            self.give_up(next(iter(self.parts.values())))
        while pool.bytes + length > pool.limit:
            if early or not len(pool):
                self._refused()
                return None
            oldest = pool.oldest()
            oldest.flow.give_up(oldest)
        part = Partial(self, key, counter, seq, length, now_us)
        self.parts[key] = part
        self.bytes += length
        pool.enter(part)
        return part

    def remove(self, part: Partial) -> None:
        """Its record is complete."""
        del self.parts[part.key]
        self.bytes -= part.length
        self.pool.leave(part)

    def came_whole(self, key: bytes) -> None:
        """The record has been delivered from one packet: pieces of a copy of it are of no use any more."""
        part = self.parts.get(key)
        if part is not None:
            self.remove(part)

    def _refused(self) -> None:
        self.given_up += 1
        self.pool.given_up += 1

    def give_up(self, part: Partial) -> None:
        """Drop a record that will not be completed."""
        self.remove(part)
        self.given_up += 1
        self.pool.given_up += 1

    def expire(self, now_us: int) -> int:
        """Give up what is too old. Returns how many."""
        n = 0
        while self.parts:
            part = next(iter(self.parts.values()))
            if now_us - part.born_us <= self.pool.max_age_us:
                break
            self.give_up(part)
            n += 1
        return n

    def clear(self) -> None:
        """The flow is over: free its buffers without counting them as given up."""
        for part in list(self.parts.values()):
            self.remove(part)
