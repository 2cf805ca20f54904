"""An initiator's refusal, from a RST: `open_refusal`.

Any bytes but the initiator's own raise HandshakeError.
"""

from __future__ import annotations

from functools import cache

from nfq.handshake import HandshakeError, Refusal, open_refusal, seal_refusal
from sectool.events import DropReason
from tests.fuzz.script import FLIP, Script, change
from tests.fuzz.world import shaken

SAID = Refusal(DropReason.DEFAULT_DENY, 7, 123_456)


@cache
def _genuine() -> bytes:
    return seal_refusal(shaken().keys, SAID)


def one(data: bytes) -> None:
    """An odd first byte: the rest is the message; an even one: the rest changes a genuine one."""
    script = Script(data)
    raw = script.below(256) & 1
    genuine = _genuine()
    payload = script.rest() if raw else script.changed(genuine)
    try:
        assert open_refusal(shaken().keys, payload) == SAID
    except HandshakeError:
        assert payload != genuine
        return
    assert payload == genuine, "a refusal was believed that nobody made"


def seeds() -> dict[str, bytes]:
    """A genuine message as it is, and changed in its fields."""
    genuine = _genuine()
    out = {"raw": b"\1" + genuine, "genuine": b"\0\0", "empty": b"\1"}
    for at in (0, 1, 2, len(genuine) - 1):
        out[f"flip-{at}"] = b"\0\1" + change(FLIP, at, 0, size=len(genuine))
    return out
