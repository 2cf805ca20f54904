"""Attacks on real hosts from the wire: each is refused for its own reason, and no program sees anything of it.

The attacker reads, loses and forges every frame, knows all credentials that were ever shown, and speaks TCP by hand
from an address that no kernel answers for. The same hands with the true keys do get in
(`test_the_attackers_hands_with_true_keys_get_in`), so it is not for clumsiness that the others fail.
"""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from scapy.layers.inet import IP, TCP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, fragment6
from scapy.packet import Packet, Raw

from nfq.handshake import CLOCK_WINDOW_S, HandshakeError, Hello, proof_option
from nfq.noise import KeyPair, TransportKeys
from sectool.clock import DAY, SECOND
from sectool.events import Action, AuthResult, DropReason, now_us
from sectool.identity.authority import HostAuthority, RootAuthority
from sectool.identity.blob import Delegation, compress, pack
from sectool.identity.credential import Credential
from sectool.identity.extensions import LabelConstraints
from sectool.identity.trust import TrustBundle
from sectool.identity.verify import Verifier
from sectool.labels import LabelSet
from tests.kernel.conftest import wait_until
from tests.kernel.hosts import (
    DOMAIN,
    Lan,
    accept,
    echo,
    finish,
    nothing_arrives,
    port_of,
    read_exactly,
)
from tests.kernel.wire import OUTSIDE, STRANGER, again, body, flags, our_options

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
HOUR = 3600 * SECOND
EXID = b"\x5e\xc7"
PLAIN = [("MSS", 1400), ("SAckOK", b""), ("NOP", None), ("WScale", 7)]
HANDSHAKE = [*PLAIN, (253, EXID)]

_ports = itertools.count(20_001)


class Hand:
    """One connection attempt at host b, segment by segment."""

    def __init__(self, lan: Lan, port: int, *, v6: bool = False, sport: int = 0) -> None:
        self.lan, self.port, self.v6 = lan, port, v6
        self.sport = sport or next(_ports)
        self.isn, self.peer_isn = 1_000_000, 0
        self.tap = lan.wire.tap("b", port)

    def packet(self, letters: str, payload: bytes = b"", options: Any = (), **tcp: int) -> Packet:
        """A segment of ours at the present place of the connection."""
        ip = (IPv6 if self.v6 else IP)(src=STRANGER[self.v6], dst=self.lan.b.address(self.v6))
        segment = ip / TCP(sport=self.sport, dport=self.port, flags=letters, window=60_000)
        segment[TCP].options = list(options)
        segment[TCP].seq = tcp.get("seq", self.isn + 1)
        segment[TCP].ack = tcp.get("ack", self.peer_isn + 1 if "A" in letters else 0)
        return segment / Raw(payload) if payload else segment

    def send(self, letters: str, payload: bytes = b"", options: Any = (), **tcp: int) -> None:
        """Put it on b's leg."""
        self.lan.wire.send("b", self.packet(letters, payload, options, **tcp))

    def syn(self, payload: bytes, options: Any = HANDSHAKE, letters: str = "S") -> None:
        """Begin."""
        self.send(letters, payload, options, seq=self.isn)

    def synack(self) -> bytes:
        """b's answer; its payload."""
        answer = self.tap.next("a SYN-ACK", lambda p: flags(p) == "SA" and p[TCP].dport == self.sport)
        self.peer_isn = answer[TCP].seq
        return body(answer)

    def prove(self, option: bytes, letters: str = "A", payload: bytes = b"", **tcp: int) -> None:
        """A segment with a record option of these 28 bytes."""
        self.send(letters, payload, [(253, option[2:])], **tcp)

    def answers(self) -> list[str]:
        """Flags of what b has sent to us."""
        return [flags(p) for p in self.tap.all() if p[TCP].dport == self.sport]


def keys_of(credential: Credential) -> KeyPair:
    """The Noise key behind a credential."""
    return KeyPair(credential.x25519_private, credential.x25519_public)


def hello_of(credential: Credential, suites: int = 0) -> Hello:
    """A fresh handshake for a credential, as its owner would make it."""
    return Hello(keys_of(credential), credential.blob, now_us(), suites)


def verifier(lan: Lan) -> Verifier:
    """What the attacker reads b's answer with, knowing the public root."""
    pem = lan.a.root.certificate.public_bytes(Encoding.PEM).decode()
    return Verifier(TrustBundle().with_root(DOMAIN, pem))


def shake(lan: Lan, port: int, *, v6: bool = False, suites: int = 0) -> tuple[Hand, TransportKeys]:
    """Half a handshake with the true keys of app=web: SYN and SYN-ACK have gone, the proof is missing."""
    hand, hello = Hand(lan, port, v6=v6), hello_of(lan.a.identity(), suites)
    hand.syn(hello.payload)
    return hand, hello.read(hand.synack(), verifier(lan), now_us()).keys


@FAMILIES
def test_the_attackers_hands_with_true_keys_get_in(lan: Lan, v6: bool) -> None:
    listener = lan.b.listen(v6=v6)
    hand, keys = shake(lan, port_of(listener), v6=v6)
    nothing_arrives(listener)
    hand.prove(proof_option(keys), "PA", b"hello")
    assert read_exactly(accept(listener), 5) == b"hello"
    lan.b.event(port_of(listener), action=Action.ALLOW, auth_result=AuthResult.PROVEN)


# -- credentials --------------------------------------------------------------------------------------------------


def authority(root: RootAuthority, at_us: int, name: str = "h", allow: str = "*") -> HostAuthority:
    """A host CA of the attacker's choice, as if the root had signed it."""
    key = ec.generate_private_key(ec.SECP256R1())
    constraints = LabelConstraints({"app": (allow,)}, f"/host/{name}/")
    return HostAuthority(root.issue_host(key.public_key(), name, constraints, at_us), key)


def issued(by: HostAuthority, at_us: int) -> Credential:
    """A credential for app=web."""
    return by.issue("/host/h/wl/web", LabelSet({"app": "web"}), at_us)


def expired(root: RootAuthority, _: Path) -> Hello:
    return hello_of(issued(authority(root, now_us() - DAY // 2), now_us() - 2 * HOUR))


def not_yet_valid(root: RootAuthority, _: Path) -> Hello:
    return hello_of(issued(authority(root, now_us()), now_us() + HOUR))


def foreign_domain(_: RootAuthority, folder: Path) -> Hello:
    evil = RootAuthority.create(folder / "evil", "evil.example", now_us())
    return hello_of(issued(authority(evil, now_us()), now_us()))


def impostor_root(_: RootAuthority, folder: Path) -> Hello:
    evil = RootAuthority.create(folder / "evil", DOMAIN, now_us())
    return hello_of(issued(authority(evil, now_us()), now_us()))


def _re_chained(root: RootAuthority, host: LabelConstraints, **delegation: int) -> Hello:
    """A leaf under another certificate of the same host key: what a compromised host could put together."""
    key = ec.generate_private_key(ec.SECP256R1())
    wide = LabelConstraints({"app": ("*",)}, "/host/")
    good = HostAuthority(root.issue_host(key.public_key(), "h", wide, now_us()), key)
    credential = issued(good, now_us())
    narrow = root.issue_host(key.public_key(), "h", host, now_us()).public_bytes(Encoding.DER)
    stream = compress(credential.leaf_der, narrow)
    assert credential.leaf_key is not None
    until = delegation.get("until_s", credential.not_after_us // SECOND)
    signed = Delegation.sign(credential.leaf_key, credential.x25519_public, until, stream)
    return Hello(keys_of(credential), pack(signed, stream), now_us())


def label_beyond_constraints(root: RootAuthority, _: Path) -> Hello:
    return _re_chained(root, LabelConstraints({"app": ("mail",)}, "/host/h/"))


def path_beyond_constraints(root: RootAuthority, _: Path) -> Hello:
    return _re_chained(root, LabelConstraints({"app": ("*",)}, "/host/g/"))


def delegation_over(root: RootAuthority, _: Path) -> Hello:
    wide = LabelConstraints({"app": ("*",)}, "/host/h/")
    return _re_chained(root, wide, until_s=now_us() // SECOND - 5)


def delegation_outlives(root: RootAuthority, _: Path) -> Hello:
    wide = LabelConstraints({"app": ("*",)}, "/host/h/")
    return _re_chained(root, wide, until_s=now_us() // SECOND + 86_400)


def delegation_by_another(root: RootAuthority, _: Path) -> Hello:
    """A thief delegates the stolen leaf to a key of his own."""
    credential, mine = issued(authority(root, now_us()), now_us()), KeyPair.generate()
    stream = compress(credential.leaf_der, credential.host_der)
    until = credential.not_after_us // SECOND
    signed = Delegation.sign(ec.generate_private_key(ec.SECP256R1()), mine.public, until, stream)
    return Hello(mine, pack(signed, stream), now_us())


def stolen_with_own_key(root: RootAuthority, _: Path) -> Hello:
    return Hello(KeyPair.generate(), issued(authority(root, now_us()), now_us()).blob, now_us())


def svid_that_a_program_held(root: RootAuthority, _: Path) -> Hello:
    """Taken from it with its key; it was handed out by the Workload API."""
    held, mine = authority(root, now_us()).issue_portable("/host/h/wl/web", now_us()), KeyPair.generate()
    stream = compress(held.leaf_der, held.host_der)
    signed = Delegation.sign(held.key, mine.public, held.not_after_us // SECOND, stream)
    return Hello(mine, pack(signed, stream), now_us())


def oversized(_: RootAuthority, __: Path) -> Hello:
    return Hello(KeyPair.generate(), bytes(1100), now_us())


def oversized_blob(_: RootAuthority, __: Path) -> Hello:
    return Hello(KeyPair.generate(), bytes(1050), now_us())


def no_credential(_: RootAuthority, __: Path) -> Hello:
    return Hello(KeyPair.generate(), b"", now_us())


def garbage_credential(_: RootAuthority, __: Path) -> Hello:
    return Hello(KeyPair.generate(), bytes(range(256)) * 2, now_us())


def bomb(_: RootAuthority, __: Path) -> Hello:
    """A credential that decompresses to more than anybody should unpack."""
    key = KeyPair.generate()
    stream = compress(bytes(60_000), bytes(60_000))
    assert len(stream) < 900
    signed = Delegation.sign(ec.generate_private_key(ec.SECP256R1()), key.public, 1 << 40, stream)
    return Hello(key, pack(signed, stream), now_us())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (expired, DropReason.CREDENTIAL_EXPIRED),
        (not_yet_valid, DropReason.CREDENTIAL_NOT_YET_VALID),
        (foreign_domain, DropReason.UNTRUSTED_DOMAIN),
        (impostor_root, DropReason.UNTRUSTED_CHAIN),
        (label_beyond_constraints, DropReason.LABEL_NOT_PERMITTED),
        (path_beyond_constraints, DropReason.SPIFFE_ID_INVALID),
        (delegation_over, DropReason.DELEGATION_EXPIRED),
        (delegation_outlives, DropReason.DELEGATION_INVALID),
        (delegation_by_another, DropReason.DELEGATION_INVALID),
        (stolen_with_own_key, DropReason.DELEGATION_INVALID),
        (svid_that_a_program_held, DropReason.KEY_USAGE_INVALID),
        (oversized, DropReason.CREDENTIAL_OVERSIZED),
        (oversized_blob, DropReason.CREDENTIAL_OVERSIZED),
        (no_credential, DropReason.CREDENTIAL_MALFORMED),
        (garbage_credential, DropReason.CREDENTIAL_MALFORMED),
        (bomb, DropReason.CREDENTIAL_OVERSIZED),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_credentials_that_do_not_hold(
    lan: Lan, tmp_path: Path, make: Callable[[RootAuthority, Path], Hello], reason: DropReason
) -> None:
    listener = lan.b.listen()
    hand = Hand(lan, port_of(listener))
    hand.syn(make(lan.a.root, tmp_path).payload)
    _refused(lan, hand, reason)
    nothing_arrives(listener)


def _refused(lan: Lan, hand: Hand, reason: DropReason) -> None:
    record = lan.b.denial(hand.port, reason, source_port=hand.sport)
    assert record["action"] == Action.DENY
    assert record["source_identity"] == 0, "nobody may be named who was not proven"
    assert hand.answers() == [], "strangers get no answer"


def test_a_genuine_credential_without_its_key_does_not_get_past_the_proof(lan: Lan) -> None:
    """The thief has seen a SYN of a's: he can show its credential and make fresh ephemerals, and that is all."""
    listener = lan.b.listen()
    victim = lan.a.identity()
    thief = KeyPair(KeyPair.generate().private, victim.x25519_public)
    hand, hello = Hand(lan, port_of(listener)), Hello(thief, victim.blob, now_us())
    hand.syn(hello.payload)
    with pytest.raises(HandshakeError, match="authenticate"):
        hello.read(hand.synack(), verifier(lan), now_us())
    for forged in (
        bytes(28),
        b"\xfd\x1c" + EXID + bytes(24),
        b"\xfd\x1c" + EXID + bytes(8) + bytes(range(16)),
    ):
        hand.prove(forged, "PA", b"DROP TABLE")
    lan.b.denial(hand.port, DropReason.PROOF_INVALID, auth_result=AuthResult.FAILED)
    nothing_arrives(listener)


# -- bytes changed on their way ----------------------------------------------------------------------------------

FIELDS = {  # offset into the SYN's payload, bits to flip, what b says of it (None: nothing, but a will)
    "version": (0, 3, DropReason.VERSION_UNSUPPORTED),
    "type": (1, 3, DropReason.HANDSHAKE_MALFORMED),
    "wish-unknown": (2, 2, DropReason.HANDSHAKE_MALFORMED),
    "wish": (2, 1, None),
    "suites": (3, 1, None),
    "time-far": (4, 1, DropReason.HANDSHAKE_STALE),
    "time-near": (7, 1, None),
    "length": (9, 1, DropReason.HANDSHAKE_MALFORMED),
    "reserved": (10, 1, DropReason.HANDSHAKE_MALFORMED),
    "e": (12, 1, None),
    "e-last": (43, 1, None),
    "s": (44, 1, DropReason.DELEGATION_INVALID),
    "s-last": (75, 1, DropReason.DELEGATION_INVALID),
    "credential-version": (76, 1, DropReason.CREDENTIAL_MALFORMED),
    "delegated-key": (77, 1, DropReason.DELEGATION_INVALID),
    "delegation-end": (116, 1, DropReason.DELEGATION_INVALID),
    "delegation-signature": (130, 1, DropReason.DELEGATION_INVALID),
    "certificates": (181, 255, DropReason.CREDENTIAL_MALFORMED),
}


def flipped(payload: bytes, at: int, bits: int) -> bytes:
    """The same bytes with some bits of one changed."""
    return payload[:at] + bytes([payload[at] ^ bits]) + payload[at + 1 :]


@pytest.mark.parametrize("field", FIELDS)
def test_a_syn_changed_on_its_way(lan: Lan, field: str) -> None:
    at, bits, reason = FIELDS[field]
    listener = lan.b.listen()
    port = port_of(listener)
    tap = lan.wire.tap("a", port)
    with lan.wire.losing(f"tcp dport {port} tcp flags syn"):
        client = lan.a.dial(lan.b.address(), port)
        syn = tap.flags("S")
        lan.wire.send("b", again(syn, flipped(body(syn), at, bits)))
        if reason is not None:
            lan.b.denial(port, reason)
        else:
            # What is not signed is bound to the answer instead: the true initiator cannot read it.
            lan.a.denial(port, DropReason.HANDSHAKE_FORGED, action=Action.ERROR)
        nothing_arrives(listener)
        with pytest.raises(TimeoutError):
            finish(client, 0.02)
    if reason in (DropReason.HANDSHAKE_MALFORMED, DropReason.HANDSHAKE_STALE, DropReason.VERSION_UNSUPPORTED):
        lan.wire.send("b", again(syn))  # anybody could have done that to it: the true one still counts
        echo(finish(client), accept(listener))


@pytest.mark.parametrize("at", [0, 1, 2, 33, 34, 81, 82, 100, -17, -1], ids=lambda at: f"byte{at}")
def test_an_answer_changed_on_its_way(lan: Lan, at: int) -> None:
    listener = lan.b.listen()
    port = port_of(listener)
    tap = lan.wire.tap("b", port)
    with lan.wire.losing(f"tcp sport {port} tcp flags & (syn | ack) == (syn | ack)"):
        client = lan.a.dial(lan.b.address(), port)
        true = tap.flags("SA")
        changed = flipped(body(true), at % len(body(true)), 1)
        lan.wire.send("a", again(true, changed))
        wanted = {0: DropReason.VERSION_UNSUPPORTED, 1: DropReason.HANDSHAKE_MALFORMED}
        if at == 0:
            changed_version = flipped(body(true), 0, 2)
            lan.wire.send("a", again(true, changed_version))
        lan.a.denial(port, wanted.get(at, DropReason.HANDSHAKE_FORGED), action=Action.ERROR)
        nothing_arrives(listener)
        lan.wire.send("a", again(true))  # the true one still counts
    echo(finish(client), accept(listener))
    lan.a.event(port, action=Action.ALLOW, auth_result=AuthResult.PROVEN)


# -- replays -----------------------------------------------------------------------------------------------------


@FAMILIES
def test_a_syn_replayed_from_another_port(lan: Lan, v6: bool) -> None:
    listener = lan.b.listen(v6=v6)
    port = port_of(listener)
    tap = lan.wire.tap("a", port)
    client = lan.a.connect(lan.b.address(v6), port)
    server = accept(listener)
    echo(client, server)
    for sport in (40_001, 40_002):
        lan.wire.send("b", again(tap.all()[0], sport=sport))
        lan.b.denial(port, DropReason.SYN_REPLAYED, source_port=sport)
    nothing_arrives(listener)
    echo(client, server, b"undisturbed")


def test_a_syn_replayed_on_its_own_connection(lan: Lan) -> None:
    """While the connection lives, with other sequence numbers, and when it is over."""
    listener = lan.b.listen()
    port = port_of(listener)
    tap = lan.wire.tap("a", port)
    client = lan.a.connect(lan.b.address(), port)
    server = accept(listener)
    echo(client, server)
    syn = tap.all()[0]
    own = port_of(client)
    lan.wire.send("b", syn)
    lan.b.denial(port, DropReason.SYN_REPLAYED, source_port=own)
    lan.wire.send("b", again(syn, seq=(syn[TCP].seq + 5_000_000) & 0xFFFFFFFF))
    wait_until(lambda: len([t for t in lan.b.told(port) if "SYN_REPLAYED" in t]) == 2, "the second refusal")
    echo(client, server, b"undisturbed")
    for sock in (client, server):
        sock.close()
    before = lan.b.count(DropReason.DENIED_BEFORE)
    lan.wire.send("b", syn)
    wait_until(lambda: lan.b.count(DropReason.DENIED_BEFORE) == before + 1, "the third refusal")
    nothing_arrives(listener)


@FAMILIES
def test_a_stolen_credential_on_the_5_tuple_of_a_live_connection(lan: Lan, v6: bool) -> None:
    """The SYN is new and its credential genuine; without a proof the connection that is there goes on."""
    client, server = lan.establish(v6=v6)
    port = port_of(server)
    tap = lan.wire.tap("b", port)
    echo(client, server, b"before")
    last = tap.next("a segment of a's", lambda p: p[TCP].dport == port)
    victim = lan.a.identity()
    thief = KeyPair(KeyPair.generate().private, victim.x25519_public)
    for ahead in (-1, 0, 70_000_000):
        seq = (last[TCP].seq + ahead) & 0xFFFFFFFF
        payload = Hello(thief, victim.blob, now_us()).payload
        lan.wire.send("b", again(last, payload, flags="S", seq=seq, ack=0, options=HANDSHAKE))
        lan.wire.send("b", again(last, b"forged", flags="PA", seq=seq + 1))
        lan.b.status()
        echo(client, server, b"undisturbed")
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.recv(1)


def test_a_syn_replayed_while_half_open_is_a_retransmission_and_nothing_more(lan: Lan) -> None:
    listener = lan.b.listen()
    hand, hello = Hand(lan, port_of(listener)), hello_of(lan.a.identity())
    hand.syn(hello.payload)
    first = hand.synack()
    hand.syn(hello.payload)
    assert hand.synack() == first, "the same bytes: nothing new to learn"
    assert lan.b.told(hand.port) == []
    nothing_arrives(listener)


@pytest.mark.parametrize("shift_s", [-CLOCK_WINDOW_S - 2, CLOCK_WINDOW_S + 2, -86_400])
def test_a_syn_from_another_time(lan: Lan, shift_s: int) -> None:
    listener = lan.b.listen()
    credential = lan.a.identity()
    hand = Hand(lan, port_of(listener))
    hand.syn(Hello(keys_of(credential), credential.blob, now_us() + shift_s * SECOND).payload)
    _refused(lan, hand, DropReason.HANDSHAKE_STALE)
    nothing_arrives(listener)


# -- proofs ------------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize(
    ("letters", "payload"),
    [
        ("A", b""),
        ("PA", b"DROP TABLE"),
        ("FA", b""),
        ("FPA", b"bye"),
        ("PAU", b"urgent"),
        ("", b"null"),
        ("P", b"x"),
    ],
)
def test_segments_without_a_proof(lan: Lan, v6: bool, letters: str, payload: bytes) -> None:
    listener = lan.b.listen(v6=v6)
    hand, keys = shake(lan, port_of(listener), v6=v6)
    before = lan.b.count(DropReason.PROOF_MISSING)
    hand.send(letters, payload)
    wait_until(lambda: lan.b.count(DropReason.PROOF_MISSING) == before + 1, "the drop")
    nothing_arrives(listener)
    hand.prove(proof_option(keys))
    accept(listener)


def _tag_flipped(proof: bytes, _: bytes) -> bytes:
    return flipped(proof, 27, 1)


def _counter_set(proof: bytes, _: bytes) -> bytes:
    return flipped(proof, 7, 1)


def _length_set(proof: bytes, _: bytes) -> bytes:
    return flipped(proof, 11, 1)


def _other(_: bytes, other: bytes) -> bytes:
    return other


@pytest.mark.parametrize("forge", [_tag_flipped, _counter_set, _length_set, _other], ids=lambda f: f.__name__)
def test_proofs_that_are_not_this_connections(lan: Lan, forge: Callable[[bytes, bytes], bytes]) -> None:
    """Changed, or valid on another connection of the same workload."""
    listener = lan.b.listen()
    _, other = shake(lan, port_of(listener))
    hand, keys = shake(lan, port_of(listener))
    hand.prove(forge(proof_option(keys), proof_option(other)), "PA", b"DROP TABLE")
    lan.b.denial(hand.port, DropReason.PROOF_INVALID, source_port=hand.sport, action=Action.ERROR)
    nothing_arrives(listener)
    hand.prove(proof_option(keys), "PA", b"hello")
    assert read_exactly(accept(listener), 5) == b"hello", "the true proof still counts"


def test_a_proof_of_a_finished_connection_opens_nothing(lan: Lan) -> None:
    """The same 5-tuple again, with a proof that was good there once."""
    listener = lan.b.listen()
    hand, keys = shake(lan, port_of(listener))
    hand.prove(proof_option(keys))
    accept(listener).close()
    hand.send("R")
    later = Hand(lan, hand.port, sport=hand.sport)
    later.isn += 100_000_000
    later.syn(hello_of(lan.a.identity()).payload)
    later.synack()
    later.prove(proof_option(keys))
    lan.b.denial(hand.port, DropReason.PROOF_INVALID, source_port=hand.sport)
    nothing_arrives(listener)


def test_two_proofs_do_not_fit_and_a_short_one_is_none(lan: Lan) -> None:
    listener = lan.b.listen()
    hand, keys = shake(lan, port_of(listener))
    before = lan.b.count(DropReason.PROOF_MISSING)
    for raw in (proof_option(keys)[:24], b"\xfd\x0c" + EXID + bytes(8), b"\x63\x20\0\0" + proof_option(keys)):
        lan.wire.send("b", with_raw_options(hand.packet("A"), raw))
    malformed = lan.b.count(DropReason.PACKET_MALFORMED)  # the first claims 28 bytes and has 24
    wait_until(lambda: lan.b.count(DropReason.PROOF_MISSING) == before + 2, "the drops")
    assert malformed >= 1
    nothing_arrives(listener)
    hand.prove(proof_option(keys))
    accept(listener)


# -- resets ------------------------------------------------------------------------------------------------------


def test_forged_refusals_do_not_end_a_connection_attempt(lan: Lan) -> None:
    """RSTs that say they come from the other enforcer, in each direction."""
    listener = lan.b.listen()
    port = port_of(listener)
    tap = lan.wire.tap("b", port)
    forged = lan.a.count(DropReason.HANDSHAKE_FORGED)
    malformed = lan.a.count(DropReason.HANDSHAKE_MALFORMED)
    with lan.wire.losing(f"tcp sport {port} tcp flags & (syn | ack) == (syn | ack)"):
        client = lan.a.dial(lan.b.address(), port)
        true = tap.flags("SA")
        noise = b"\x01\x02" + bytes(range(200))
        for payload in (noise, b"", body(true)):
            lan.wire.send("a", again(true, payload, flags="RA", seq=0, options=[(253, EXID)]))
        wait_until(lambda: lan.a.count(DropReason.HANDSHAKE_FORGED) == forged + 1, "the drop of noise")
        wait_until(lambda: lan.a.count(DropReason.HANDSHAKE_MALFORMED) == malformed + 2, "the other two")
        off_path = again(true, b"", flags="RA", seq=0, ack=77, options=[])
        lan.wire.send("a", off_path)
        wait_until(lambda: lan.a.count(DropReason.HANDSHAKE_FORGED) == forged + 2, "a RST without the number")
        lan.wire.send("a", again(true))
    echo(finish(client), accept(listener))


def test_forged_refusals_do_not_end_a_half_open_connection(lan: Lan) -> None:
    listener = lan.b.listen()
    hand, keys = shake(lan, port_of(listener))
    forged = lan.b.count(DropReason.HANDSHAKE_FORGED)
    hand.send("R", b"\x01\x03" + bytes(30), [(253, EXID)])
    wait_until(lambda: lan.b.count(DropReason.HANDSHAKE_FORGED) == forged + 1, "the drop")
    hand.send("R", seq=hand.isn + 900_000)  # outside the window: for the stack to judge
    hand.prove(proof_option(keys))
    accept(listener)


# -- answers that are not the peer's ------------------------------------------------------------------------------


@FAMILIES
def test_a_forged_answer_before_the_true_one(lan: Lan, v6: bool) -> None:
    listener = lan.b.listen(v6=v6)
    port = port_of(listener)
    tap = lan.wire.tap("b", port)
    with lan.wire.losing(f"tcp sport {port} tcp flags & (syn | ack) == (syn | ack)"):
        client = lan.a.dial(lan.b.address(v6), port)
        true = tap.flags("SA")
        evil = KeyPair.generate()
        other = Hello(evil, b"x", now_us()).payload  # the right shape, but nothing of this connection
        lan.wire.send("a", again(true, b"\x01\x02" + other.ljust(400, b"\0"), seq=5))
        lan.a.denial(port, DropReason.HANDSHAKE_FORGED, action=Action.ERROR, auth_result=AuthResult.FAILED)
        lan.wire.send("a", again(true, ack=12345))
        lan.wire.send("a", again(true))
    echo(finish(client), accept(listener))
    lan.a.event(port, action=Action.ALLOW)


def test_an_answer_of_another_connection(lan: Lan) -> None:
    """A true answer of the same peer to the same workload, recorded a moment ago: no answer to a session's SYN."""
    listener = lan.b.listen()
    port = port_of(listener)
    tap = lan.wire.tap("b", port)
    echo(lan.a.connect(lan.b.address(), port), accept(listener))
    recorded = body(tap.flags("SA"))
    with lan.wire.losing(f"tcp sport {port} tcp flags & (syn | ack) == (syn | ack)"):
        client = lan.a.dial(lan.b.address(), port)
        true = tap.flags("SA")
        lan.wire.send("a", again(true, recorded))
        lan.a.denial(port, DropReason.HANDSHAKE_MALFORMED, source_port=port_of(client))
        with pytest.raises(TimeoutError):
            finish(client, 0.02)


def test_data_before_the_answer_and_a_simultaneous_open(lan: Lan) -> None:
    listener = lan.b.listen()
    port = port_of(listener)
    tap = lan.wire.tap("b", port)
    with lan.wire.losing(f"tcp sport {port} tcp flags & (syn | ack) == (syn | ack)"):
        client = lan.a.dial(lan.b.address(), port)
        true = tap.flags("SA")
        missing, unknown = (lan.a.count(r) for r in (DropReason.PROOF_MISSING, DropReason.UNKNOWN_FLOW))
        lan.wire.send("a", again(true, b"data", flags="PA"))
        wait_until(lambda: lan.a.count(DropReason.PROOF_MISSING) == missing + 1, "the drop of the data")
        lan.wire.send("a", again(true, b"", flags="S", ack=0))
        wait_until(lambda: lan.a.count(DropReason.UNKNOWN_FLOW) == unknown + 1, "the drop of the SYN")
        lan.wire.send("a", again(true))
    echo(finish(client), accept(listener))


def test_segments_out_of_nowhere(lan: Lan) -> None:
    listener = lan.b.listen()
    hand = Hand(lan, port_of(listener))
    before = lan.b.count(DropReason.UNKNOWN_FLOW)
    for letters in ("A", "PA", "FA", "R", "RA", "SA", "FPU", ""):
        hand.send(letters, b"x" if "P" in letters else b"")
    wait_until(lambda: lan.b.count(DropReason.UNKNOWN_FLOW) == before + 8, "eight drops")
    assert hand.answers() == []
    nothing_arrives(listener)


# -- odd packets -------------------------------------------------------------------------------------------------


def with_raw_options(packet: Packet, options: bytes, payload: bytes = b"") -> Packet:
    """The segment with these bytes as TCP options, whatever they say."""
    options += bytes(-len(options) % 4)
    raw = packet.copy()
    raw[TCP].remove_payload()
    raw[TCP].options = []
    raw[TCP].dataofs = 5 + len(options) // 4
    return raw / Raw(options + payload)


OPTION = b"\xfd\x04" + EXID
GARBAGE = {  # options of a SYN with a good Hello, and what becomes of it
    "zero-length": (b"\x02\x00" + OPTION, None),
    "beyond-the-end": (OPTION + b"\x05\x28", None),
    "cut-short": (OPTION + b"\x01\x01\x01\x05", None),
    "inside-another": (b"\x63\x08\0\0" + OPTION, DropReason.NO_IDENTITY),
    "behind-the-end": (b"\x00" + b"\0\0\0" + OPTION, DropReason.NO_IDENTITY),
    "other-exid": (b"\xfd\x04\x5e\xc8", DropReason.NO_IDENTITY),
    "longer-option": (b"\xfd\x06" + EXID + b"\0\0", DropReason.NO_IDENTITY),
    "none": (b"", DropReason.NO_IDENTITY),
}


@FAMILIES
@pytest.mark.parametrize("options", GARBAGE)
def test_garbage_options(lan: Lan, v6: bool, options: str) -> None:
    raw, reason = GARBAGE[options]
    listener = lan.b.listen(v6=v6)
    hand = Hand(lan, port_of(listener), v6=v6)
    before = lan.b.count(DropReason.PACKET_MALFORMED)
    hello = hello_of(lan.a.identity()).payload
    lan.wire.send("b", with_raw_options(hand.packet("S", seq=hand.isn), raw, hello))
    if reason is None:
        wait_until(lambda: lan.b.count(DropReason.PACKET_MALFORMED) == before + 1, "the drop")
        assert lan.b.told(hand.port) == []
    else:
        lan.b.denial(hand.port, reason)
    assert hand.answers() == []
    nothing_arrives(listener)


@FAMILIES
def test_a_checksum_that_does_not_hold_is_not_made_right(lan: Lan, v6: bool) -> None:
    """A worker rewrites packets and their checksums; what was damaged, or aimed at checkers only, must stay so."""
    listener = lan.b.listen(v6=v6)
    hand, hello = Hand(lan, port_of(listener), v6=v6), hello_of(lan.a.identity())
    before = lan.b.count(DropReason.PACKET_MALFORMED)
    wrong = hand.packet("S", hello.payload, HANDSHAKE, seq=hand.isn)
    wrong[TCP].chksum = 0x1234
    lan.wire.send("b", wrong)
    wait_until(lambda: lan.b.count(DropReason.PACKET_MALFORMED) == before + 1, "the drop of the SYN")
    hand.syn(hello.payload)
    keys = hello.read(hand.synack(), verifier(lan), now_us()).keys
    wrong = hand.packet("PA", b"damaged", [(253, proof_option(keys)[2:])])
    wrong[TCP].chksum = 0x1234
    lan.wire.send("b", wrong)
    wait_until(lambda: lan.b.count(DropReason.PACKET_MALFORMED) == before + 2, "the drop of the data")
    nothing_arrives(listener)
    hand.prove(proof_option(keys), "PA", b"hello")
    assert read_exactly(accept(listener), 5) == b"hello"


@pytest.mark.parametrize(
    ("letters", "reason"), [("SF", DropReason.NO_IDENTITY), ("SR", None), ("SPU", DropReason.NO_IDENTITY)]
)
def test_syns_with_other_flags(lan: Lan, letters: str, reason: DropReason | None) -> None:
    listener = lan.b.listen()
    hand = Hand(lan, port_of(listener))
    before = lan.b.count(DropReason.PACKET_MALFORMED)
    hand.syn(b"", PLAIN, letters)
    if reason is None:
        wait_until(lambda: lan.b.count(DropReason.PACKET_MALFORMED) == before + 1, "the drop")
    else:
        lan.b.denial(hand.port, reason)
    nothing_arrives(listener)


@pytest.fixture
def fast_open(lan: Lan) -> Iterator[None]:
    """Host b as careless as can be: TCP Fast Open for every listener, without cookies."""
    name = "net.ipv4.tcp_fastopen"
    before = lan.b.space.run("sysctl", "-n", name).strip()
    lan.b.space.run("sysctl", "-qw", f"{name}={0x2 | 0x200 | 0x400:#x}")
    yield
    lan.b.space.run("sysctl", "-qw", f"{name}={before}")


@pytest.mark.usefixtures("fast_open")
@pytest.mark.parametrize(
    "option", [(34, b""), (34, b"12345678"), (253, b"\xf9\x89"), (253, b"\xf9\x8912345678")]
)
def test_fast_open_data_never_reaches_a_program_before_the_proof(lan: Lan, option: tuple[int, bytes]) -> None:
    listener = lan.b.listen()
    bare = Hand(lan, port_of(listener))
    bare.syn(b"GET /", [("MSS", 1400), option])
    lan.b.denial(bare.port, DropReason.NO_IDENTITY, source_port=bare.sport)
    hello = hello_of(lan.a.identity())
    behind = Hand(lan, bare.port)
    behind.syn(hello.payload + b"GET /", [("MSS", 1400), (253, EXID), option])
    lan.b.denial(bare.port, DropReason.HANDSHAKE_MALFORMED, source_port=behind.sport)
    good = Hand(lan, bare.port)
    good.syn(hello.payload, [("MSS", 1400), (253, EXID), option])
    keys = hello.read(good.synack(), verifier(lan), now_us()).keys
    synack = good.tap.packets[-1]
    assert our_options(synack) == [EXID]
    assert 34 not in dict(synack[TCP].options), "the stack was not asked for fast open"
    nothing_arrives(listener)
    good.prove(proof_option(keys), "PA", b"hello")
    assert read_exactly(accept(listener), 5) == b"hello"


def _fragments(packet: Packet, size: int) -> list[Packet]:
    if IP in packet:
        return list(fragment(packet, size))  # type: ignore[no-untyped-call]
    whole = IPv6(src=packet.src, dst=packet.dst) / IPv6ExtHdrFragment(id=next(_ports)) / packet[TCP]
    return list(fragment6(whole, size + 48))  # type: ignore[no-untyped-call]


@FAMILIES
@pytest.mark.parametrize("size", [24, 256])
def test_fragments_are_judged_as_the_whole(lan: Lan, v6: bool, size: int) -> None:
    listener = lan.b.listen(v6=v6)
    bare = Hand(lan, port_of(listener), v6=v6)
    for piece in _fragments(bare.packet("S", b"x" * 300, PLAIN, seq=bare.isn), size):
        lan.wire.send("b", piece)
    lan.b.denial(bare.port, DropReason.NO_IDENTITY, source_port=bare.sport)
    hand, hello = Hand(lan, bare.port, v6=v6), hello_of(lan.a.identity())
    for piece in _fragments(hand.packet("S", hello.payload, HANDSHAKE, seq=hand.isn), size):
        lan.wire.send("b", piece)
    keys = hello.read(hand.synack(), verifier(lan), now_us()).keys
    before = lan.b.count(DropReason.PROOF_MISSING)
    for piece in _fragments(hand.packet("PA", b"y" * 300), size):
        lan.wire.send("b", piece)
    wait_until(lambda: lan.b.count(DropReason.PROOF_MISSING) == before + 1, "the drop")
    nothing_arrives(listener)
    for piece in _fragments(hand.packet("PA", b"z" * 300, [(253, proof_option(keys)[2:])]), size):
        lan.wire.send("b", piece)
    assert read_exactly(accept(listener), 300) == b"z" * 300


# -- from inside ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [*(bits << 28 for bits in range(1, 8)), 0xFFFFFFFF])
def test_a_program_cannot_mark_its_packets_allowed(lan: Lan, mark: int) -> None:
    """SO_MARK needs CAP_NET_ADMIN, which some programs have."""
    other = lan.a.user(app="other")
    plain = lan.wire.new_socket()
    plain.listen()
    local = lan.a.listen("127.0.0.1", uid=lan.a.user(app="cache"))
    remote = lan.b.listen()
    places = [
        (plain, OUTSIDE[False], DropReason.DEFAULT_DENY),
        (local, "127.0.0.1", DropReason.DEFAULT_DENY),
        (remote, lan.b.address(), DropReason.PEER_DENIED),
    ]
    for listener, address, reason in places:
        sock = lan.a.new_socket(uid=other)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.unpack("i", struct.pack("I", mark))[0])
        sock.setblocking(False)
        sock.connect_ex((address, port_of(listener)))
        lan.a.denial(port_of(listener), reason)
        nothing_arrives(listener)


@FAMILIES
def test_a_program_with_raw_sockets_cannot_speak_past_its_enforcer(lan: Lan, v6: bool) -> None:
    """Crafted SYNs and data from a host's own raw socket are judged like any other packet of that host."""
    listener = lan.b.listen(v6=v6)
    port = port_of(listener)
    family = socket.AF_INET6 if v6 else socket.AF_INET
    with lan.a.space.enter():
        raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
    lan.a.space.opened.append(raw)
    if v6:
        raw.setsockopt(socket.IPPROTO_IPV6, 36, 1)  # IPV6_HDRINCL
    ip = (IPv6 if v6 else IP)(src=lan.a.address(v6), dst=lan.b.address(v6))
    tap = lan.wire.tap("a", port)
    unknown = lan.a.count(DropReason.UNKNOWN_FLOW)
    hello = hello_of(lan.a.identity()).payload
    for letters, payload, options in (
        ("S", hello, HANDSHAKE),
        ("S", b"", PLAIN),
        ("A", b"", []),
        ("PA", b"x", []),
    ):
        crafted = (
            ip
            / TCP(sport=next(_ports), dport=port, flags=letters, seq=9, options=list(options))
            / Raw(payload)
        )
        raw.sendto(bytes(crafted), (lan.b.address(v6), 0))
    wait_until(lambda: lan.a.count(DropReason.UNKNOWN_FLOW) == unknown + 2, "the drop of both segments")
    wait_until(
        lambda: len([t for t in lan.a.told(port) if "NO_LOCAL_IDENTITY" in t]) == 2, "both SYNs refused"
    )
    assert tap.all() == []
    nothing_arrives(listener)
