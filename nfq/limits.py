"""Bounds against floods: token buckets by source prefix, and a memory of handshakes already seen."""

from __future__ import annotations

from collections import OrderedDict


class TokenBuckets:
    """One token bucket per source prefix (IPv4 /24, IPv6 /48), bounded in number; the least used prefix goes first.

    `rate` is tokens a second, `burst` the bucket's size. A prefix not seen lately starts with a full bucket.
    """

    def __init__(self, rate: float, burst: float, limit: int = 16_384) -> None:
        self.rate = rate
        self.burst = burst
        self.limit = limit
        self._buckets: OrderedDict[bytes, tuple[float, int]] = OrderedDict()

    def take(self, address: bytes, now_us: int) -> bool:
        """Take one token for a 4- or 16-byte address; False when there is none."""
        prefix = address[:3] if len(address) == 4 else address[:6]
        tokens, last = self._buckets.get(prefix, (self.burst, now_us))
        tokens = min(self.burst, tokens + max(0, now_us - last) * self.rate / 1e6)
        allowed = tokens >= 1.0
        self._buckets[prefix] = (tokens - 1.0 if allowed else tokens, now_us)
        self._buckets.move_to_end(prefix)
        if len(self._buckets) > self.limit:
            self._buckets.popitem(last=False)
        return allowed


class SeenHandshakes:
    """Ephemeral keys of recent SYNs, kept for as long as their timestamps are acceptable.

    Two generations of `window_us` each bound age and memory; when one is full early it is retired early, and
    `overflowed` counts how often, since a replay of a retired handshake is then only stopped by its missing proof.
    """

    def __init__(self, window_us: int, limit: int = 131_072) -> None:
        self.window_us = window_us
        self.limit = limit
        self.overflowed = 0
        self._young: set[bytes] = set()
        self._old: set[bytes] = set()
        self._since_us = 0

    def __contains__(self, ephemeral: bytes) -> bool:
        return ephemeral in self._young or ephemeral in self._old

    def add(self, ephemeral: bytes, now_us: int) -> None:
        """Remember a 32-byte ephemeral key."""
        full = len(self._young) >= self.limit
        if full or now_us - self._since_us >= self.window_us:
            self.overflowed += full
            self._old, self._young, self._since_us = self._young, set(), now_us
        self._young.add(ephemeral)


class Addresses:
    """Addresses heard of lately; bounded, the one longest unheard of goes first."""

    def __init__(self, limit: int = 16_384) -> None:
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self.limit = limit

    def add(self, raw: bytes) -> None:
        """Heard of (4 or 16 bytes)."""
        self._known[raw] = None
        self._known.move_to_end(raw)
        if len(self._known) > self.limit:
            self._known.popitem(last=False)

    def __contains__(self, raw: bytes) -> bool:
        return raw in self._known
