"""Message 2 of the handshake, from a SYN-ACK or RST: `Hello.read`.

Any bytes but the responder's own raise HandshakeError; the genuine message reads the same each time, also after any
number of failures.
"""

from __future__ import annotations

from nfq.handshake import HandshakeError
from tests.fuzz.script import FLIP, Script, change
from tests.fuzz.world import NOW_US, hosts, shaken


def one(data: bytes) -> None:
    """An odd first byte: the rest is the message; an even one: the rest changes a genuine one."""
    script = Script(data)
    raw = script.below(256) & 1
    shake = shaken()
    verifier = hosts().verifier
    payload = script.rest() if raw else script.changed(shake.answer)
    try:
        said = shake.hello.read(payload, verifier, NOW_US)
    except HandshakeError:
        assert payload != shake.answer
        assert shake.hello.read(shake.answer, verifier, NOW_US) == shake.said
        return
    assert payload == shake.answer, "a message was believed that nobody made"
    assert said == shake.said


def seeds() -> dict[str, bytes]:
    """A genuine message as it is, and changed in its fields."""
    answer = shaken().answer
    out = {"raw": b"\1" + answer, "genuine": b"\0\0", "short": b"\1" + answer[:90]}
    for at in (0, 1, 2, 33, 60, 90, 120, 300):
        out[f"flip-{at}"] = b"\0\1" + change(FLIP, at, 0, size=len(answer))
    return out
