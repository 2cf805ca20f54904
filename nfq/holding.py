"""Packets that wait for the workload of their socket to be identified. The kernel goes on with others meanwhile."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from nfq.burst import Packet

TIMEOUT_US = 5_000_000
LIMIT = 1024
ASK_AGAIN_US = 100_000

Facts = dict[str, Any]


class Holding:
    """Holds packets by attribution key, bounded in number and time; asks once for each key."""

    def __init__(
        self,
        facts_later: Callable[[Hashable, Callable[[Facts | None], None]], None],
        ask: Callable[[Hashable, Facts], None],
        give_up: Callable[[Packet], None] = Packet.drop,
    ) -> None:
        """`facts_later` gathers what the kernel attests about a key, `ask` hands it to the agent.

        `give_up` gives a packet its verdict that cannot wait, or has waited in vain.
        """
        self._give_up = give_up
        self._facts_later = facts_later
        self._ask = ask
        self._held: dict[Hashable, tuple[int, list[Packet]]] = {}
        self._asked: OrderedDict[Hashable, int] = OrderedDict()
        self.count = 0

    def hold(self, packet: Packet, key: Hashable, now_us: int) -> None:
        """Keep a packet until `take`; what cannot be kept is dropped, and its stack sends it again."""
        held = self._held.get(key)
        if self.count >= LIMIT or (held is None and now_us - self._asked.get(key, 0) < ASK_AGAIN_US):
            # The latter: what the agent has just given is of no use (expired). Do not ask in a circle.
            self._give_up(packet)
            return
        self.count += 1
        if held is not None:
            held[1].append(packet)
            return
        self._held[key] = (now_us, [packet])
        self._asked[key] = now_us
        if len(self._asked) > LIMIT:
            self._asked.popitem(last=False)
        self._facts_later(key, lambda facts: self._known(key, facts))

    def _known(self, key: Hashable, facts: Facts | None) -> None:
        if facts is not None:
            self._ask(key, facts)
        else:  # the process has gone
            self._drop(key)

    def take(self, key: Hashable) -> list[Packet]:
        """The packets that waited for `key`."""
        _, packets = self._held.pop(key, (0, []))
        self.count -= len(packets)
        return packets

    def expire(self, now_us: int) -> None:
        """Give up what has waited too long."""
        for key in [k for k, (since, _) in self._held.items() if now_us - since > TIMEOUT_US]:
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        for packet in self.take(key):
            self._give_up(packet)
