"""One recorded flow, found by its id, and the question that policy was asked about it."""

from __future__ import annotations

import ipaddress
import uuid
from typing import TYPE_CHECKING, Any, Final

from sectool.errors import UsageError
from sectool.labels import LabelSet
from sectool.policy import Party, Request
from sectool.policy.selector import Fqdn
from sectool.policy.sentence import parse_sentence
from sectool.policy.service import ICMP, ICMP6, PROTOCOLS

if TYPE_CHECKING:
    from store.reader import Reader

_POLICY_REASONS: Final = (
    "default_deny",
    "intent_deny",
    "guardrail_deny",
    "encryption_unavailable",
    "policy_changed",
)


def find_flow(reader: Reader, event_id: str) -> dict[str, Any]:
    """The row of the view `flows` with this id, and its start as `start_us` (UTC microseconds). Raises UsageError."""
    try:
        number = uuid.UUID(event_id)
    except ValueError:
        raise UsageError(
            f"{event_id!r} is not the id of a connection", "sectool flows -o json shows event.id"
        ) from None
    # The id holds the millisecond in which the flow began: only those segments are looked at.
    begun = (number.int >> 80) * 1000
    rows = reader.query(
        "SELECT *, epoch_us(event_start) AS start_us FROM flows "  # noqa: S608 -- a number and a parsed UUID
        f"WHERE event_start BETWEEN make_timestamp({begun - 1000}) AND make_timestamp({begun + 2000}) "
        f"AND event_id = '{number}' LIMIT 1",
        begun=(begun - 1000, begun + 2001),
    ).table.to_pylist()
    if not rows:
        raise UsageError(
            f"no connection {number} is on record",
            "it may be older than what is kept; sectool flows lists what there is",
        )
    return dict(rows[0])


def request_of(stored: dict[str, Any]) -> Request:
    """What policy was asked. Host names are not on record but for the one that the deciding rule spoke of."""
    transport = stored["transport"]
    protocol = PROTOCOLS.get("icmp6" if transport == "icmpv6" else transport)
    icmp = protocol in (ICMP, ICMP6)
    source = _party(stored, "source")
    destination = _party(stored, "destination")
    name = _named(stored)
    if name and destination.labels is None:
        destination = Party(None, None, destination.address, frozenset((name,)))
    return Request(
        source,
        destination,
        int(transport) if protocol is None else protocol,
        stored["source_port"] if icmp else stored["destination_port"],
        stored["destination_port"] if icmp else 0,
        source.labels is not None and destination.labels is not None,
    )


def decided_by_policy(stored: dict[str, Any]) -> bool:
    """Whether the verdict on record is our own policy's, and not a handshake's, a peer's or a bound's."""
    if stored["decider"] == "peer" or stored["adopted"]:
        return False
    return stored["action"] in ("allow", "audit") or stored["drop_reason"] in _POLICY_REASONS


def _party(stored: dict[str, Any], end: str) -> Party:
    text = stored[f"{end}_labels"]
    labels = LabelSet.parse(text) if stored[f"{end}_identity"] is not None and text is not None else None
    return Party(labels, stored[f"{end}_identity"], ipaddress.ip_address(stored[f"{end}_ip"]))


def _named(stored: dict[str, Any]) -> str:
    text = stored["rule"]
    if not text or "fqdn:" not in text:
        return ""
    target = parse_sentence(text).destination
    if not isinstance(target, Fqdn):
        return ""
    return f"host.{target.name}" if target.wildcard else target.name
