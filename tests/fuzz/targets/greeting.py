"""Message 1 of the handshake, from a SYN: `Greeting`, and whose credential it shows.

Any bytes raise HandshakeError with a drop reason, or are a greeting of the right size; its credential counts only if
the blob and the Noise key are the ones a CA vouches for. The genuine message is accepted.
"""

from __future__ import annotations

from nfq.handshake import MAX_PAYLOAD, MIN_SYN, Greeting, HandshakeError
from sectool.events import DropReason
from tests.fuzz.script import FLIP, Script, change
from tests.fuzz.world import NOW_US, hosts, shaken


def one(data: bytes) -> None:
    """An odd first byte: the rest is the message; an even one: the rest changes a genuine one."""
    script = Script(data)
    raw = script.below(256) & 1
    genuine = shaken().syn
    payload = script.rest() if raw else script.changed(genuine)
    try:
        greeting = Greeting(payload, NOW_US)
        assert MIN_SYN <= len(payload) <= MAX_PAYLOAD
        assert len(greeting.ephemeral) == 32
        assert payload.endswith(greeting.blob)
        peer = greeting.peer(hosts().verifier, NOW_US)
    except HandshakeError as e:
        assert e.reason in DropReason
        assert e.reason is not DropReason.NONE
        assert payload != genuine
        return
    # From the static key on all is signed; before it only the ephemeral and what a sender wishes may differ.
    assert payload[44:] == genuine[44:]
    assert peer.x25519 == genuine[44:76]


def seeds() -> dict[str, bytes]:
    """A genuine message as it is, cut short, and changed in its fields."""
    syn = shaken().syn
    size = len(syn)
    out = {"raw": b"\1" + syn, "genuine": b"\0\0", "short": b"\1" + syn[: MIN_SYN - 1]}
    for name, at in (("version", 0), ("type", 1), ("time", 4), ("e", 20), ("s", 50), ("blob", 90)):
        out[f"flip-{name}"] = b"\0\1" + change(FLIP, at, 0, size=size)
    return out
