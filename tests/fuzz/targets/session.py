"""Messages of sessions: SYN payloads, answers, and the hint that a session is not known.

A SYN is accepted only if it is one that was made, and once; an answer only if it is the responder's to this very SYN.
Whatever is refused raises HandshakeError and changes nothing.
"""

from __future__ import annotations

from contextlib import suppress

from nfq.handshake import Decision, HandshakeError
from nfq.session import (
    UNKNOWN_SIZE,
    Attempt,
    Held,
    Issued,
    is_resume,
    is_resumed,
    is_unknown,
    unknown,
)
from nfq.sessions import Sessions
from tests.fuzz.script import FLIP, Script, change
from tests.fuzz.world import NOW_US, hosts, shaken

LIMIT = 3


def one(data: bytes) -> None:
    """Steps: a first byte says which message comes next and whether the following changes it or is it."""
    script = Script(data)
    shake = shaken()
    peer = hosts().verifier.verify(hosts().web.blob, NOW_US)
    held = Held(1, shake.said.peer, shake.keys, 120, NOW_US)
    sessions = Sessions(issued_limit=4, per_peer=2)
    sessions.issue(Issued(2, peer, shake.keys, 120, NOW_US))
    attempts = [held.attempt(3) for _ in range(LIMIT)]
    syns = {attempt.payload for attempt in attempts}
    taken: set[bytes] = set()
    for _ in range(24):
        if not script:
            break
        step = script.below(256)
        attempt = attempts[step >> 4 & 1]
        payload = script.piece() if step & 1 else script.changed(attempt.payload)
        if step & 2:
            _answered(attempt, sessions, script)
        else:
            _opened(sessions, payload, syns, taken)
    last = attempts[-1].payload  # nothing that came has used up a number that was not its own
    if last not in taken:
        sessions.open(last, NOW_US)
    assert sessions.counts[1] <= 4


def _opened(sessions: Sessions, payload: bytes, syns: set[bytes], taken: set[bytes]) -> None:
    is_resume(payload)
    try:
        resume = sessions.open(payload, NOW_US)
    except HandshakeError:
        assert payload not in syns or payload in taken
        return
    assert payload in syns, "a SYN was believed that nobody made"
    assert payload not in taken, "a SYN was accepted twice"
    resume.take()
    taken.add(payload)


def _answered(attempt: Attempt, sessions: Sessions, script: Script) -> None:
    with suppress(HandshakeError):
        genuine, keys = sessions.open(attempt.payload, NOW_US).answer(Decision.PLAIN, suite=1, revision=3)
        answer = script.changed(genuine)
        is_resumed(answer)
        try:
            said = attempt.read(answer, NOW_US)
        except HandshakeError:
            assert answer != genuine
        else:
            assert answer == genuine, "an answer was believed that nobody made"
            assert said.keys == keys
            assert said.suite == 1
    hint = unknown(attempt.payload)
    changed = script.changed(hint)
    assert attempt.unknown(changed) == (changed == hint)
    if is_unknown(changed):
        assert len(changed) == UNKNOWN_SIZE


def seeds() -> dict[str, bytes]:
    """Genuine ones, repeated ones, changed ones."""
    shake = shaken()
    raw = Held(1, shake.said.peer, shaken(17).keys, 120, NOW_US).attempt(1).payload  # of another session
    out = {
        "genuine": b"\0\0",
        "twice": b"\0\0\0\0",
        "both": b"\0\0\x10\0\0\0\x10\0",
        "raw": b"\1" + len(raw).to_bytes(2, "big") + raw,
        "answer": b"\2\0\0\0",
        "answers": b"\2\0\0\0\x12\0\0\0\0\0",
    }
    for at in (0, 1, 2, 4, 20, 30, 51):
        out[f"flip-{at}"] = b"\0\1" + change(FLIP, at, 0, size=52)
        out[f"answer-{at}"] = b"\2\0\1" + change(FLIP, at % 50, 0, size=50)
    return out
