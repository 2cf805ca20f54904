"""Reading `sectool flows -o json` and comparing it with what a case asks for."""

from __future__ import annotations

from typing import Any

import pytest

from labs.cases import Seen
from labs.records import Flow, matches, parse

ROW: dict[str, Any] = {
    "event.start": "2026-01-02T03:04:05.500000Z",
    "event.action": "deny",
    "drop_reason": "peer_denied",
    "peer_reason": "default_deny",
    "rule.text": None,
    "destination.port": 5432,
    "source.identity": "spiffe://lab.example/host/batch/x",
    "destination.identity": None,
    "source.bytes": 60,
    "destination.bytes": None,
}


def test_parse_takes_a_row() -> None:
    flow = parse(ROW)
    assert flow.start == pytest.approx(1767323045.5)
    assert (flow.action, flow.reason, flow.peer_reason, flow.rule) == (
        "deny",
        "peer_denied",
        "default_deny",
        "",
    )
    assert flow.port == 5432
    assert flow.total_bytes == 60


@pytest.mark.parametrize(
    ("seen", "port", "wanted"),
    [
        (Seen("db", "deny"), 5432, True),
        (Seen("db", "deny", "peer_denied"), 5432, True),
        (Seen("db", "deny", "peer_denied", peer_reason="default_deny"), 5432, True),
        (Seen("db", "deny", "peer_denied", peer_reason="intent_deny"), 5432, False),
        (Seen("db", "deny", "guardrail_deny"), 5432, False),
        (Seen("db", "allow"), 5432, False),
        (Seen("db", "deny"), 80, False),
        (Seen("db", "deny", rule="deny env=dev"), 5432, False),
        (Seen("db", "deny", cipher="aes_256_gcm"), 5432, False),
        (Seen("db", "deny", peer="spiffe://lab.example/"), 5432, True),
        (Seen("db", "deny", peer="spiffe://rogue.example/"), 5432, False),
    ],
)
def test_matches_looks_at_every_field_that_is_asked_for(seen: Seen, port: int, wanted: bool) -> None:
    assert matches(parse(ROW), seen, port) is wanted


def test_a_flow_tells_itself_in_words() -> None:
    flow = Flow(
        0, "deny", "peer_denied", "", "guardrail_deny", "deny env=dev to call env=prod", 5432, "", "", 0
    )
    assert str(flow) == "deny peer_denied (guardrail_deny) [deny env=dev to call env=prod]"


def test_an_encrypted_flow_has_its_cipher() -> None:
    flow = parse({**ROW, "encryption.cipher": "aes_256_gcm"})
    assert matches(flow, Seen("db", "deny", cipher="aes_256_gcm"), 5432)
    assert not matches(flow, Seen("db", "deny", cipher="chacha20_poly1305"), 5432)
