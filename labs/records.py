"""What the enforcers recorded, read the way an operator would: `sectool flows -o json`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from labs.lab import SECTOOL

if TYPE_CHECKING:
    from labs.cases import Seen
    from labs.lab import Node

DEADLINE = 6.0  # seconds after which an event that is not on record counts as missing
PATIENCE = 2.0  # seconds for which a follower is trusted to have it first


@dataclass(frozen=True, slots=True)
class Flow:
    """One recorded flow, as far as the demo judges it."""

    start: float  # seconds since the epoch
    action: str
    reason: str
    cipher: str  # '' when plain
    peer_reason: str  # why the other side's enforcer refused
    rule: str
    port: int
    source: str  # SPIFFE IDs, '' when not known
    destination: str
    total_bytes: int

    def __str__(self) -> str:
        why = f"{self.reason} ({self.peer_reason})" if self.peer_reason else self.reason
        words = [self.action, why, self.cipher, f"[{self.rule}]" if self.rule else ""]
        return " ".join(filter(None, words))


def _seconds(value: Any) -> float:
    """A time of the event format (ISO 8601 or microseconds since the epoch) in seconds since the epoch."""
    if isinstance(value, int | float):
        return value / 1e6
    moment = datetime.fromisoformat(str(value))
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def parse(row: Mapping[str, Any]) -> Flow:
    """A row of `sectool flows -o json`."""

    def text(name: str) -> str:
        value = row.get(name)
        return "" if value is None else str(value)

    return Flow(
        start=_seconds(row["event.start"]),
        action=text("event.action").lower(),
        reason=text("drop_reason").lower(),
        cipher=text("encryption.cipher").lower().replace("none", ""),
        peer_reason=text("peer_reason").lower(),
        rule=text("rule.text"),
        port=int(row.get("destination.port") or 0),
        source=text("source.identity"),
        destination=text("destination.identity"),
        total_bytes=int(row.get("source.bytes") or 0) + int(row.get("destination.bytes") or 0),
    )


def flows(node: Node, since: float, last: int = 40) -> list[Flow]:
    """The flows that began on this host at `since` (seconds since the epoch) or later, oldest first."""
    rows = node.json("flows", "--last", str(last))["items"]
    return sorted((f for f in map(parse, rows) if f.start >= since), key=lambda f: f.start)


def matches(flow: Flow, seen: Seen, port: int) -> bool:
    """Is this flow the event that `seen` asks for?"""
    return (
        flow.port == port
        and flow.action == seen.action
        and (not seen.reason or flow.reason == seen.reason)
        and (not seen.cipher or flow.cipher == seen.cipher)
        and (not seen.peer_reason or flow.peer_reason == seen.peer_reason)
        and seen.rule in flow.rule
        and (not seen.peer or seen.peer in flow.source or seen.peer in flow.destination)
    )


class Follower:
    """`sectool flows -f` on one host: what is recorded there, a moment after it is."""

    def __init__(self, node: Node) -> None:
        self._flows: dict[str, Flow] = {}
        self._process = node.popen(
            [SECTOOL, "flows", "--follow", "--last", "0", "-o", "jsonl"], group="sectool"
        )
        self._thread = threading.Thread(target=self._read, name=f"follow {node.name}", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            row = json.loads(line)
            self._flows[row["event.id"]] = parse(row)  # a later line of a flow replaces the one before

    def since(self, moment: float) -> list[Flow]:
        """The flows that began at `moment` or later."""
        return [flow for flow in list(self._flows.values()) if flow.start >= moment]

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._thread.join(timeout=5)


def await_flow(
    node: Node,
    since: float,
    port: int,
    wanted: Callable[[Flow], bool],
    follower: Follower | None = None,
) -> tuple[Flow | None, list[Flow]]:
    """Wait for a recorded flow to `port` that is `wanted`: it (None: it never came), and all flows to that port.

    A follower is looked at first: it is cheap. Without one, or when it has nothing, the store is asked.
    """
    end = time.monotonic() + DEADLINE
    patience = time.monotonic() + PATIENCE
    while True:
        if follower is not None and time.monotonic() < patience:
            candidates = follower.since(since)
        else:
            candidates = flows(node, since)
        found = [f for f in candidates if f.port == port]
        for flow in found:
            if wanted(flow):
                return flow, found
        if time.monotonic() > end:
            return None, found
        time.sleep(0.02 if follower is not None else 0.1)
