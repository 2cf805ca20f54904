"""Sessions: resumption, replay, forgery, expiry, rotation and revocation, from both ends, as bytes."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nfq.handshake import Answer, Decision, Grant, HandshakeError, check_proof, proof_option
from nfq.noise import KeyPair, TransportKeys
from nfq.record import STATE_SIZE, Records
from nfq.recordstate import read, words_of
from nfq.replay import WINDOW
from nfq.session import (
    ANSWER_SIZE,
    CLOCK_SLACK_US,
    EARLY_S,
    LIFETIME_S,
    ROTATION_PATIENCE_US,
    SYN_SIZE,
    Attempt,
    Held,
    Issued,
    is_resume,
    is_unknown,
    lifetime_s,
    unknown,
)
from nfq.sessions import SWEEP_US, Sessions
from nfq.suites import AES_256_GCM
from sectool.events import DropReason
from sectool.identity.verify import PeerIdentity
from sectool.labels import LabelSet

NOW_US = 1_790_000_000_000_000
SECOND = 1_000_000
WHERE = (b"\x0a\0\0\2", 5432)
CLIENT, SERVER = 11, 22
REFUSED = (
    DropReason.VERSION_UNSUPPORTED,
    DropReason.HANDSHAKE_MALFORMED,
    DropReason.SESSION_UNKNOWN,
    DropReason.SESSION_FORGED,
)


def identity(number: int, not_after_us: int = NOW_US + 3600 * SECOND) -> PeerIdentity:
    return PeerIdentity(
        f"spiffe://lab.example/host/h/wl/{number}",
        "lab.example",
        LabelSet({"app": f"w{number}"}),
        KeyPair.generate().public,
        NOW_US - SECOND,
        not_after_us,
        number.to_bytes(32, "big"),
        f"{number:x}",
        "h",
        number,
    )


def handshake_keys() -> TransportKeys:
    """What a full handshake gives both sides alike."""
    return TransportKeys(os.urandom(32), os.urandom(32), os.urandom(32), os.urandom(32))


@dataclass
class Ends:
    """An initiator and a responder with one session between them."""

    client: Sessions
    server: Sessions
    held: Held
    issued: Issued

    def attempt(self, suites: int = 0, now_us: int = NOW_US) -> Attempt:
        session = self.client.choose(CLIENT, WHERE, now_us)
        assert session is not None
        return session.attempt(suites)

    def connect(self, now_us: int = NOW_US) -> None:
        """A whole connection: both sides have the same keys."""
        attempt = self.attempt(now_us=now_us)
        resume = self.server.open(attempt.payload, now_us)
        resume.take()
        payload, keys = resume.answer(Decision.PLAIN)
        assert attempt.read(payload, now_us).keys == keys


def make_ends(lifetime: int = LIFETIME_S, now_us: int = NOW_US) -> Ends:
    keys = handshake_keys()
    client, server = Sessions(), Sessions()
    held = Held(CLIENT, identity(SERVER), keys, lifetime, now_us)
    issued = Issued(SERVER, identity(CLIENT), keys, lifetime, now_us)
    assert client.learn(held, WHERE, Grant(lifetime))
    server.issue(issued)
    return Ends(client, server, held, issued)


@pytest.fixture
def ends() -> Ends:
    return make_ends()


def refused(work: Callable[[], object]) -> DropReason:
    with pytest.raises(HandshakeError) as error:
        work()
    return error.value.reason


# -- a connection --------------------------------------------------------------------------------------------


def test_a_connection_is_resumed_with_keys_of_its_own(ends: Ends) -> None:
    attempt = ends.attempt(suites=0b11)
    assert len(attempt.payload) == SYN_SIZE
    assert is_resume(attempt.payload)
    resume = ends.server.open(attempt.payload, NOW_US)
    assert resume.session.peer.id == CLIENT
    assert resume.suites == 0b11
    resume.take()
    payload, keys = resume.answer(
        Decision.ENCRYPT, suite=2, reason=DropReason.NONE, revision=7, rule=-(2**60)
    )
    assert len(payload) == ANSWER_SIZE
    answer = attempt.read(payload, NOW_US)
    assert (answer.peer.id, answer.decision, answer.suite) == (SERVER, Decision.ENCRYPT, 2)
    assert (answer.revision, answer.rule, answer.keys) == (7, -(2**60), keys)
    assert keys.initiator_to_responder != keys.responder_to_initiator
    other = ends.attempt(suites=0b11)
    again = ends.server.open(other.payload, NOW_US)
    assert not {*again.answer(Decision.PLAIN)[1][:2]} & {*keys[:2]}


def test_a_refusal_tells_why(ends: Ends) -> None:
    attempt = ends.attempt()
    payload, _ = ends.server.open(attempt.payload, NOW_US).answer(
        Decision.REFUSE, reason=DropReason.GUARDRAIL_DENY, revision=3, rule=9
    )
    answer = attempt.read(payload, NOW_US)
    assert isinstance(answer, Answer)
    assert (answer.decision, answer.reason, answer.rule) == (Decision.REFUSE, DropReason.GUARDRAIL_DENY, 9)


def test_both_nonces_make_the_keys(ends: Ends) -> None:
    resume = ends.server.open(ends.attempt().payload, NOW_US)
    assert resume.answer(Decision.PLAIN)[1] != resume.answer(Decision.PLAIN)[1]


def test_a_side_that_cannot_encrypt_offers_nothing(ends: Ends) -> None:
    payload = ends.attempt(suites=0).payload
    assert payload[2] == 0
    assert ends.server.open(payload, NOW_US).suites == 0


def test_numbers_are_never_used_twice(ends: Ends) -> None:
    numbers = {ends.server.open(ends.attempt().payload, NOW_US).number for _ in range(100)}
    assert len(numbers) == 100


# -- what others can do ------------------------------------------------------------------------------------------


def test_a_replayed_syn_is_refused_and_reordered_ones_are_not(ends: Ends) -> None:
    syns = [ends.attempt().payload for _ in range(5)]
    for syn in (syns[4], syns[0], syns[2], syns[3], syns[1]):
        ends.server.open(syn, NOW_US).take()
    for syn in syns:
        assert refused(lambda s=syn: ends.server.open(s, NOW_US)) is DropReason.SYN_REPLAYED  # type: ignore[misc]


def test_a_syn_that_is_held_for_a_moment_is_no_replay(ends: Ends) -> None:
    syn = ends.attempt().payload
    ends.server.open(syn, NOW_US)
    ends.server.open(syn, NOW_US).take()
    assert refused(lambda: ends.server.open(syn, NOW_US)) is DropReason.SYN_REPLAYED


@pytest.mark.parametrize("where", range(SYN_SIZE))
def test_every_changed_byte_of_a_syn_is_refused(ends: Ends, where: int) -> None:
    syn = ends.attempt(suites=1).payload
    for bit in range(8):
        changed = bytearray(syn)
        changed[where] ^= 1 << bit
        reason = refused(lambda c=bytes(changed): ends.server.open(c, NOW_US))  # type: ignore[misc]
        expected = {
            0: DropReason.VERSION_UNSUPPORTED,
            1: DropReason.HANDSHAKE_MALFORMED,
            **dict.fromkeys(range(4, 20), DropReason.SESSION_UNKNOWN),
        }.get(where, DropReason.SESSION_FORGED)
        assert reason is expected
    ends.server.open(syn, NOW_US)


@pytest.mark.parametrize("where", range(ANSWER_SIZE))
def test_every_changed_byte_of_an_answer_is_refused(ends: Ends, where: int) -> None:
    attempt = ends.attempt(suites=1)
    payload, _ = ends.server.open(attempt.payload, NOW_US).answer(Decision.ENCRYPT, suite=1)
    for bit in range(8):
        changed = bytearray(payload)
        changed[where] ^= 1 << bit
        reason = refused(lambda c=bytes(changed): attempt.read(c, NOW_US))  # type: ignore[misc]
        expected = {0: DropReason.VERSION_UNSUPPORTED, 1: DropReason.HANDSHAKE_MALFORMED}
        assert reason is expected.get(where, DropReason.SESSION_FORGED)
    attempt.read(payload, NOW_US)


@settings(deadline=None)
@given(data=st.binary(max_size=80), head=st.booleans(), name=st.booleans())
def test_garbage_is_refused(data: bytes, head: bool, name: bool) -> None:
    ends = make_ends()
    if head:
        data = b"\x01\x04\x01\x01" + (ends.issued.id if name else b"") + data
    assert refused(lambda: ends.server.open(data, NOW_US)) in REFUSED
    assert refused(lambda: ends.attempt().read(data, NOW_US)) in REFUSED
    assert not ends.attempt().unknown(data)
    assert ends.server.counts == (0, 1)
    ends.connect()


def test_an_answer_to_another_connection_is_refused(ends: Ends) -> None:
    one, two = ends.attempt(), ends.attempt()
    payload, _ = ends.server.open(one.payload, NOW_US).answer(Decision.PLAIN)
    assert refused(lambda: two.read(payload, NOW_US)) is DropReason.SESSION_FORGED


def test_a_syn_of_one_protocol_is_none_of_another(ends: Ends) -> None:
    tcp, udp = ends.attempt().payload, ends.held.attempt(0, 17).payload
    assert refused(lambda: ends.server.open(tcp, NOW_US, 17)) is DropReason.SESSION_FORGED
    assert refused(lambda: ends.server.open(udp, NOW_US)) is DropReason.SESSION_FORGED
    ends.server.open(udp, NOW_US, 17)


def test_another_session_vouches_for_nothing(ends: Ends) -> None:
    stranger = make_ends()
    syn = stranger.attempt().payload
    assert refused(lambda: ends.server.open(syn, NOW_US)) is DropReason.SESSION_UNKNOWN
    renamed = syn[:4] + ends.issued.id + syn[20:]
    assert refused(lambda: ends.server.open(renamed, NOW_US)) is DropReason.SESSION_FORGED


def test_neither_suite_nor_encryption_can_be_forced_down(ends: Ends) -> None:
    """A responder that has the keys and still answers what was not offered is not believed either."""
    attempt = ends.attempt(suites=0b01)
    resume = ends.server.open(attempt.payload, NOW_US)
    for decision, suite in (
        (Decision.ENCRYPT, 2),
        (Decision.PLAIN, 2),
        (Decision.ENCRYPT, 0),
        (Decision.PLAIN, 200),
    ):
        payload, _ = resume.answer(decision, suite=suite)
        assert refused(lambda p=payload: attempt.read(p, NOW_US)) is DropReason.HANDSHAKE_MALFORMED  # type: ignore[misc]
    for at, value in ((2, 0), (3, 0)):
        lowered = bytearray(attempt.payload)
        lowered[at] = value
        assert refused(lambda s=bytes(lowered): ends.server.open(s, NOW_US)) is DropReason.SESSION_FORGED  # type: ignore[misc]


# -- lost state ---------------------------------------------------------------------------------------------------


def test_a_responder_that_has_lost_the_session_says_so(ends: Ends) -> None:
    attempt = ends.attempt()
    assert refused(lambda: Sessions().open(attempt.payload, NOW_US)) is DropReason.SESSION_UNKNOWN
    hint = unknown(attempt.payload)
    assert is_unknown(hint)
    assert len(hint) < SYN_SIZE
    assert attempt.unknown(hint)
    assert not ends.attempt().unknown(hint), "of use to nobody else"
    ends.client.forget(attempt.session)
    assert ends.client.choose(CLIENT, WHERE, NOW_US) is None
    assert ends.client.counts == (0, 0)


def test_an_initiator_that_has_lost_the_session_makes_another(ends: Ends) -> None:
    client = Sessions()
    assert client.choose(CLIENT, WHERE, NOW_US) is None
    keys = handshake_keys()
    client.learn(Held(CLIENT, identity(SERVER), keys, 120, NOW_US), WHERE, Grant(120))
    ends.server.issue(Issued(SERVER, identity(CLIENT), keys, 120, NOW_US))
    ends.client = client
    ends.connect()
    assert ends.server.counts == (0, 2)


# -- time ---------------------------------------------------------------------------------------------------------


def test_a_session_expires_first_at_the_initiator(ends: Ends) -> None:
    late = NOW_US + LIFETIME_S * SECOND
    attempt = ends.attempt()
    assert ends.client.choose(CLIENT, WHERE, late - EARLY_S * SECOND) is None
    ends.server.open(attempt.payload, late - 1)
    assert refused(lambda: ends.server.open(attempt.payload, late)) is DropReason.SESSION_UNKNOWN
    assert ends.server.counts == (0, 0)


def test_no_session_outlives_a_credential() -> None:
    assert lifetime_s(NOW_US, NOW_US + 10 * SECOND, NOW_US + 3600 * SECOND) == 10
    assert lifetime_s(NOW_US, NOW_US + 3600 * SECOND) == LIFETIME_S
    assert lifetime_s(NOW_US, NOW_US - SECOND) == 0
    short = identity(CLIENT, NOW_US + 5 * SECOND)
    issued = Issued(SERVER, short, handshake_keys(), 120, NOW_US)
    assert issued.alive(NOW_US + 5 * SECOND - 1)
    assert not issued.alive(NOW_US + 5 * SECOND)


def test_an_answer_after_the_end_is_refused(ends: Ends) -> None:
    attempt = ends.attempt()
    payload, _ = ends.server.open(attempt.payload, NOW_US).answer(Decision.PLAIN)
    late = NOW_US + LIFETIME_S * SECOND
    assert refused(lambda: attempt.read(payload, late)) is DropReason.SESSION_UNKNOWN


def test_a_clock_set_back_ends_sessions(ends: Ends) -> None:
    assert ends.client.choose(CLIENT, WHERE, NOW_US - CLOCK_SLACK_US) is not None
    syn = ends.attempt().payload
    assert ends.client.choose(CLIENT, WHERE, NOW_US - CLOCK_SLACK_US - 1) is None
    assert refused(lambda: ends.server.open(syn, NOW_US - CLOCK_SLACK_US - 1)) is DropReason.SESSION_UNKNOWN


def test_one_connection_rotates_while_the_others_go_on(ends: Ends) -> None:
    life = (LIFETIME_S - EARLY_S) * SECOND
    soon = NOW_US + life * 3 // 4
    assert ends.client.choose(CLIENT, WHERE, soon - 1) is ends.held
    assert ends.client.choose(CLIENT, WHERE, soon) is None, "this one makes a full handshake"
    assert ends.client.choose(CLIENT, WHERE, soon + 1) is ends.held
    ends.connect(soon + 2)
    assert ends.client.choose(CLIENT, WHERE, soon + ROTATION_PATIENCE_US) is None, "that one came to nothing"
    keys = handshake_keys()
    after = Held(CLIENT, identity(SERVER), keys, LIFETIME_S, soon)
    ends.client.learn(after, WHERE, Grant(LIFETIME_S))
    assert ends.client.choose(CLIENT, WHERE, soon + life // 2) is after
    assert ends.client.counts == (1, 0)


def test_tick_forgets_what_has_expired(ends: Ends) -> None:
    ends.client.tick(NOW_US)
    ends.server.tick(NOW_US)
    assert (ends.client.counts, ends.server.counts) == ((1, 0), (0, 1))
    late = NOW_US + LIFETIME_S * SECOND + SWEEP_US
    ends.client.tick(late)
    ends.server.tick(late)
    assert (ends.client.counts, ends.server.counts) == ((0, 0), (0, 0))


# -- whom a session belongs to ----------------------------------------------------------------------------------------


def test_a_renewed_credential_has_no_session_yet(ends: Ends) -> None:
    assert ends.client.choose(CLIENT + 1, WHERE, NOW_US) is None
    assert ends.client.choose(CLIENT, (b"\x0a\0\0\2", 5433), NOW_US) is None
    ends.connect()


def test_revocation_ends_sessions_and_what_is_half_made(ends: Ends) -> None:
    attempt = ends.attempt()
    resume = ends.server.open(attempt.payload, NOW_US)
    payload, _ = resume.answer(Decision.PLAIN)
    assert ends.server.revoke(lambda s: s.peer.fingerprint == bytes(32)) == 0
    assert ends.server.revoke(lambda s: s.peer.id == CLIENT) == 1
    assert resume.session.ended
    assert refused(lambda: ends.server.open(attempt.payload, NOW_US)) is DropReason.SESSION_UNKNOWN
    assert ends.client.clear() == 1
    assert refused(lambda: attempt.read(payload, NOW_US)) is DropReason.SESSION_UNKNOWN
    assert ends.client.choose(CLIENT, WHERE, NOW_US) is None


# -- several workers of the responder ---------------------------------------------------------------------------------


def test_a_session_is_used_only_where_its_worker_is_met() -> None:
    client = Sessions()
    sessions = [Held(CLIENT, identity(SERVER), handshake_keys(), 120, NOW_US) for _ in range(2)]
    for i, session in enumerate(sessions):
        assert client.learn(session, WHERE, Grant(120, i, 3), lambda n, i=i: i)  # type: ignore[misc]
    for i, expected in enumerate((sessions[0], sessions[1], None)):
        assert client.choose(CLIENT, WHERE, NOW_US, lambda n, i=i: i) is expected  # type: ignore[misc]
    translated = Held(CLIENT, identity(SERVER), handshake_keys(), 120, NOW_US)
    assert not client.learn(translated, WHERE, Grant(120, 2, 3), lambda n: 0)
    fewer = Held(CLIENT, identity(SERVER), handshake_keys(), 120, NOW_US)
    assert client.learn(fewer, WHERE, Grant(120, 0, 1))
    assert client.counts == (1, 0)
    assert client.choose(CLIENT, WHERE, NOW_US) is fewer


@settings(deadline=None)
@given(data=st.binary(min_size=4, max_size=4))
def test_a_grant_is_sound_or_none(data: bytes) -> None:
    grant = Grant.unpack(data)
    assert grant == Grant(0) or (grant.pack() == data and grant.worker < grant.workers)


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_tables_are_bounded() -> None:
    client, server = Sessions(held_limit=3), Sessions(issued_limit=6, per_peer=2)
    for i in range(10):
        client.learn(Held(CLIENT, identity(SERVER), handshake_keys(), 120, NOW_US), i, Grant(120))
        server.issue(Issued(SERVER, identity(i // 5), handshake_keys(), 120, NOW_US))
    assert client.counts == (3, 0)
    assert client.choose(CLIENT, 0, NOW_US) is None
    assert client.choose(CLIENT, 9, NOW_US) is not None
    assert server.counts == (0, 4), "one peer does not push out another's"
    for i in range(10):
        server.issue(Issued(SERVER, identity(100 + i), handshake_keys(), 120, NOW_US))
    assert server.counts == (0, 6)


# -- what the protocol document says ----------------------------------------------------------------------------


def test_bytes_are_as_documented(ends: Ends) -> None:
    """docs/protocol.md, "Sessions", written out a second time."""
    keys = handshake_keys()
    held = Held(CLIENT, identity(SERVER), keys, LIFETIME_S, NOW_US)
    issued = Issued(SERVER, identity(CLIENT), keys, LIFETIME_S, NOW_US)
    prk = hmac.digest(keys.handshake_hash, keys.session, "sha512")
    first = hmac.digest(prk, b"sectool session 1\x01", "sha512")
    second = hmac.digest(prk, first + b"sectool session 1\x02", "sha512")
    session_id, tag_key, flow_key = first[:16], first[32:], second
    assert issued.id == session_id
    syn = held.attempt(0b10).payload
    head = b"\x01\x04\x01\x02" + session_id + (1).to_bytes(8, "big") + syn[28:36]
    tag = hashlib.blake2s(b"\x06" + head, key=tag_key, digest_size=16, person=b"st tag").digest()
    assert syn == head + tag
    ends.server.issue(issued)
    answer, made = ends.server.open(syn, NOW_US).answer(
        Decision.ENCRYPT, suite=2, reason=DropReason.NONE, revision=7, rule=-9
    )
    nonce = answer[2:18]
    flow = hashlib.blake2b(syn + nonce, key=flow_key, person=b"st flow keys").digest()
    more = hashlib.blake2b(syn + nonce, key=flow_key, person=b"st answer, proof").digest()
    body = bytes((1, 2, 0, 0)) + (7).to_bytes(4, "big") + (-9).to_bytes(8, "big", signed=True)
    sealed = bytes(a ^ b for a, b in zip(body, more[:16], strict=True))
    answered = hashlib.blake2s(
        answer[:18] + sealed, key=more[16:32], digest_size=16, person=b"st answr"
    ).digest()
    assert answer == b"\x01\x05" + nonce + sealed + answered
    assert (made.initiator_to_responder, made.responder_to_initiator) == (flow[:32], flow[32:])
    option = proof_option(made, 2)
    assert option[:12] == b"\xfd\x1c\x5e\xc7\0\0\0\0\0\x02\0\0"
    assert (
        option[12:]
        == hashlib.blake2s(option[:12], key=more[32:], digest_size=16, person=b"st proof").digest()
    )
    assert check_proof(made, option) == 2


@pytest.mark.parametrize("where", range(28))
def test_every_changed_byte_of_a_proof_is_refused(ends: Ends, where: int) -> None:
    _, keys = ends.server.open(ends.attempt(1).payload, NOW_US).answer(Decision.ENCRYPT, suite=1)
    for bit in range(8):
        option = bytearray(proof_option(keys, 1))
        option[where] ^= 1 << bit
        # Kind, length and ExID are what makes it an option of ours at all: they are checked as well.
        assert check_proof(keys, bytes(option)) is None


def test_a_number_too_far_behind_is_refused(ends: Ends) -> None:
    first = ends.attempt().payload
    for _ in range(WINDOW):
        last = ends.attempt().payload
    ends.server.open(last, NOW_US).take()
    assert refused(lambda: ends.server.open(first, NOW_US)) is DropReason.SYN_REPLAYED


def test_identities_differ_in_the_credential_not_in_the_name(ends: Ends) -> None:
    renewed = replace(ends.held.peer, id=99, fingerprint=bytes(32))
    assert renewed.spiffe_id == ends.held.peer.spiffe_id
    assert ends.server.revoke(lambda s: s.peer.id == renewed.id) == 0


def test_no_key_is_shown() -> None:
    """What a connection or a session is made of may end up in a message or a log."""
    keys = handshake_keys()
    client = Held(CLIENT, identity(SERVER), keys, 120, NOW_US)
    attempt = client.attempt(1)
    flow, _ = client.keys(attempt.payload, bytes(16))
    shown = f"{keys!r}{flow!r}{client._secrets!r}".encode()
    for secret in (*keys, *flow, *client._secrets):
        assert not secret or repr(secret).encode() not in shown
    state = memoryview(bytearray(STATE_SIZE))
    Records(AES_256_GCM, *keys[:2], initiator=True, isn_out=1, isn_in=2, state=state)
    saved = read(words_of(state))
    assert repr(saved) == "Saved(suite=aes-256-gcm, sent=0, accepted=0)"
