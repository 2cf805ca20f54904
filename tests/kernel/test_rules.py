"""The rules on a real kernel: what they let pass, what they queue, and that nothing is left of them."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from nfq import preflight, rules
from nfq.conntrack import ConntrackControl
from nfq.packet import SYN, SYN_ACK, Segment, parse, rebuild
from nfq.queue import LOCAL_IN, LOCAL_OUT, QueuedPacket, release
from sectool.errors import SectoolError
from tests.kernel.conftest import Decide, Enforcer, Namespace, Pair, allow, deny, pass_once, wait_until

pytestmark = pytest.mark.kernel

SO_MARK = 36
TCP_REPAIR = 19
Enforce = Callable[[Namespace, Decide], Enforcer]
FAMILIES = ("v4", "v6")
VARIANTS = ("nft", "legacy")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of iptables, whichever is the system's default."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("iptables", "ip6tables"):
        for suffix in ("", "-save", "-restore"):
            real = shutil.which(f"{tool}-{request.param}{suffix}", path="/usr/sbin:/sbin:/usr/bin")
            assert real, f"{tool}-{request.param}{suffix} is not installed"
            (folder / f"{tool}{suffix}").symlink_to(real)
    monkeypatch.setenv("PATH", f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin")
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder."""
    made = tmp_path / "run"
    made.mkdir()
    return made


def address(space: Namespace, family: str) -> str:
    """The namespace's address."""
    return space.v4 if family == "v4" else space.v6


def marks(space: Namespace) -> list[int]:
    """Marks of all tracked TCP connections."""
    with space.enter():
        control = ConntrackControl()
        try:
            return [entry.mark for entry in control.dump()]
        finally:
            control.close()


def talk(client: socket.socket, server: socket.socket) -> None:
    """Bytes both ways."""
    peer, _ = server.accept()
    with peer:
        peer.settimeout(10)
        client.sendall(b"ping")
        assert peer.recv(10) == b"ping"
        peer.sendall(b"pong")
        assert client.recv(10) == b"pong"


def refused(space: Namespace, where: str, port: int, mark: int = 0) -> bool:
    """Whether a connection attempt gets no answer at all within a moment."""
    sock = space.new_socket(socket.AF_INET6 if ":" in where else socket.AF_INET)
    if mark:
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
    sock.settimeout(0.3)
    try:
        sock.connect((where, port))
    except TimeoutError:
        return True
    finally:
        sock.close()
    return False


# -- coming and going -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("variant")
def test_removal_leaves_no_trace(namespace: Namespace, folder: Path) -> None:
    with namespace.enter():
        before = rules.snapshot()
        acct = Path("/proc/sys/net/netfilter/nf_conntrack_acct").read_text()
        rules.install(rules.RulesConfig(), folder)
        assert rules.installed()
        assert Path("/proc/sys/net/netfilter/nf_conntrack_acct").read_text() == "1\n"
        rules.remove(folder)
        assert not rules.installed()
        assert "SECTOOL" not in rules.snapshot()
        left = [line for line in rules.snapshot().splitlines() if line.startswith("-A")]
        assert left == [line for line in before.splitlines() if line.startswith("-A")]
        assert Path("/proc/sys/net/netfilter/nf_conntrack_acct").read_text() == acct
        rules.remove(folder)  # again: nothing to do
    assert list(folder.iterdir()) == []


def test_tables_that_came_with_the_rules_go_with_them(namespace: Namespace, folder: Path) -> None:
    with namespace.enter():
        before = rules.snapshot()
        rules.install(rules.RulesConfig(), folder)
        rules.remove(folder)
        assert rules.snapshot() == before
    assert namespace.run("nft", "list", "tables") == ""


@pytest.mark.usefixtures("variant")
def test_what_others_own_stays(namespace: Namespace, folder: Path) -> None:
    with namespace.enter():
        for tool in ("iptables", "ip6tables"):
            subprocess.run([tool, "-t", "mangle", "-N", "THEIRS"], check=True)
            subprocess.run([tool, "-t", "mangle", "-A", "OUTPUT", "-j", "THEIRS"], check=True)
            subprocess.run([tool, "-t", "raw", "-A", "OUTPUT", "-p", "udp", "-j", "NOTRACK"], check=True)
            subprocess.run([tool, "-P", "FORWARD", "DROP"], check=True)
        before = rules.snapshot()
        rules.install(rules.RulesConfig(), folder)
        with_ours = rules.snapshot()
        for line in before.splitlines():
            assert line in with_ours
        subprocess.run(["iptables", "-t", "mangle", "-A", "THEIRS", "-j", "RETURN"], check=True)
        rules.remove(folder)
        assert rules.snapshot() == before.replace(
            "-A OUTPUT -j THEIRS\n", "-A OUTPUT -j THEIRS\n-A THEIRS -j RETURN\n", 1
        )


@pytest.mark.usefixtures("variant")
def test_installing_again_replaces_what_is_there(namespace: Namespace, folder: Path) -> None:
    with namespace.enter():
        rules.install(rules.RulesConfig(), folder)
        once = rules.snapshot()
        rules.install(rules.RulesConfig(), folder)
        assert rules.snapshot() == once
        # A stale install: jumps doubled and in the wrong place, a chain with rubbish in it.
        subprocess.run(["iptables", "-t", "mangle", "-A", "OUTPUT", "-j", rules.OUT], check=True)
        subprocess.run(["iptables", "-t", "mangle", "-A", "OUTPUT", "-p", "tcp", "-j", rules.OUT], check=True)
        subprocess.run(["iptables", "-t", "mangle", "-I", rules.OUT, "1", "-j", "ACCEPT"], check=True)
        rules.install(rules.RulesConfig(), folder)
        assert rules.snapshot() == once
        rules.install(rules.RulesConfig(queue=77, workers=3), folder)
        assert [f"--queue-num {77 + n}" in rules.snapshot() for n in range(6)] == [True] * 6
        assert "5300" not in rules.snapshot()
        remembered = json.loads((folder / "rules-before.json").read_text())
        assert remembered["sysctls"]["net/netfilter/nf_conntrack_acct"] == "0", (
            "the first install's memory stays"
        )


def test_a_missing_jump_is_not_installed(namespace: Namespace, folder: Path) -> None:
    with namespace.enter():
        rules.install(rules.RulesConfig(), folder)
        subprocess.run(["ip6tables", "-t", "mangle", "-D", "INPUT", "-j", rules.IN], check=True)
        assert not rules.installed()
        rules.install(rules.RulesConfig(), folder)
        assert rules.installed()


def test_no_packet_slips_through_while_rules_are_replaced(pair: Pair, folder: Path) -> None:
    server = pair.b.listen()
    port = server.getsockname()[1]
    with pair.a.enter():
        rules.install(rules.RulesConfig(), folder)
    done = threading.Event()
    slipped: list[int] = []

    def attempts() -> None:
        while not done.is_set():
            sock = pair.a.new_socket()
            sock.setblocking(False)
            if sock.connect_ex((pair.b.v4, port)) == 0:
                slipped.append(1)
            sock.close()
            pair.a.opened.remove(sock)

    thread = threading.Thread(target=attempts)
    thread.start()
    try:
        with pair.a.enter():
            for n in range(20):
                rules.install(rules.RulesConfig(queue=100 + n), folder)
    finally:
        done.set()
        thread.join()
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()
    assert not slipped


def test_errors_say_what_to_do(namespace: Namespace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with namespace.enter():
        with pytest.raises(SectoolError, match="cannot write"):
            rules.install(rules.RulesConfig(), folder / "missing")
        monkeypatch.setattr(rules, "IPV4", rules.Family("ip", "no-such-iptables"))
        with pytest.raises(SectoolError) as caught:
            rules.install(rules.RulesConfig(), folder)
    assert "install the package iptables" in caught.value.hint


def test_preflight_finds_everything_here_and_changes_nothing(namespace: Namespace) -> None:
    with namespace.enter():
        before = rules.snapshot()
        found = preflight.preflight()
        assert rules.snapshot() == before
    assert [f.what for f in found if not f.ok] == []
    assert len(found) >= 8


def test_preflight_names_rules_that_write_our_mark_bits(namespace: Namespace) -> None:
    config = rules.RulesConfig()
    with namespace.enter():
        subprocess.run(
            ["iptables", "-t", "mangle", "-A", "PREROUTING", "-j", "MARK", "--set-xmark", "0x7/0xff"],
            check=True,
        )
        assert preflight.conflicts(config) == []
        subprocess.run(
            ["iptables", "-t", "mangle", "-A", "PREROUTING", "-j", "CONNMARK", "--restore-mark"], check=True
        )
        assert len(preflight.conflicts(config)) == 1
        finding = next(f for f in preflight.preflight(config) if f.what == "packet marks")
    assert not finding.ok
    assert "mask" in finding.hint


def test_preflight_without_root_is_one_finding() -> None:
    code = (
        "import os; os.setgid(65534); os.setuid(65534)\n"
        "from nfq.preflight import preflight\n"
        "print([(f.what, f.ok) for f in preflight()])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[('root', False)]\n"


# -- what passes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_listener_nothing_passes(pair: Pair, folder: Path, family: str) -> None:
    outward, inward = pair.b.listen(v6=family == "v6"), pair.a.listen(v6=family == "v6")
    with pair.a.enter():
        rules.install(rules.RulesConfig(), folder)
    assert refused(pair.a, address(pair.b, family), outward.getsockname()[1])
    assert refused(pair.b, address(pair.a, family), inward.getsockname()[1])
    assert refused(pair.a, address(pair.a, family), inward.getsockname()[1])


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_released_connection_is_never_queued_again(pair: Pair, enforce: Enforce, family: str) -> None:
    enforcer = enforce(pair.a, allow)
    server = pair.b.listen(v6=family == "v6")
    client = pair.a.connect(address(pair.b, family), server.getsockname()[1])
    talk(client, server)
    client.close()
    assert enforcer.flags(LOCAL_OUT) == [SYN]
    assert enforcer.flags(LOCAL_IN) == [SYN_ACK], "a SYN-ACK is judged even in a connection that is allowed"
    assert [m & enforcer.config.mask for m in marks(pair.a)] == [enforcer.config.marks.allowed]


@pytest.mark.parametrize("family", FAMILIES)
def test_passing_once_saves_nothing(pair: Pair, enforce: Enforce, family: str) -> None:
    enforcer = enforce(pair.a, pass_once)
    server = pair.b.listen(v6=family == "v6")
    client = pair.a.connect(address(pair.b, family), server.getsockname()[1])
    talk(client, server)
    assert len(enforcer.flags(LOCAL_OUT)) >= 3
    assert len(enforcer.flags(LOCAL_IN)) >= 2
    assert [m & enforcer.config.mask for m in marks(pair.a)] == [0]


@pytest.mark.parametrize("family", FAMILIES)
def test_inbound_connections_are_judged(pair: Pair, enforce: Enforce, family: str) -> None:
    enforcer = enforce(pair.a, allow)
    server = pair.a.listen(v6=family == "v6")
    talk(pair.b.connect(address(pair.a, family), server.getsockname()[1]), server)
    assert enforcer.flags(LOCAL_IN) == [SYN]
    assert enforcer.flags(LOCAL_OUT) == [SYN_ACK]
    enforcer.decide = deny
    assert refused(pair.b, address(pair.a, family), server.getsockname()[1])


@pytest.mark.parametrize("where", ["127.0.0.1", "::1", "own"])
def test_loopback_is_judged_once_where_it_leaves(pair: Pair, enforce: Enforce, where: str) -> None:
    where = pair.a.v4 if where == "own" else where
    enforcer = enforce(pair.a, allow)
    server = pair.a.listen(v6=":" in where)
    talk(pair.a.connect(where, server.getsockname()[1]), server)
    assert enforcer.flags() == [SYN, SYN_ACK]
    assert {hook for hook, _, _ in enforcer.seen} == {LOCAL_OUT}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", ["allowed", "passing", "encrypted", "small", "requeue", "mask"])
def test_a_mark_of_an_application_counts_for_nothing(
    pair: Pair, enforce: Enforce, family: str, bits: str
) -> None:
    enforcer = enforce(pair.a, deny)
    server = pair.b.listen(v6=family == "v6")
    mine = pair.a.listen(v6=family == "v6")
    spoofed = int(getattr(enforcer.config.marks, bits)) | 0x7
    assert refused(pair.a, address(pair.b, family), server.getsockname()[1], mark=spoofed)
    assert refused(pair.a, address(pair.a, family), mine.getsockname()[1], mark=spoofed)
    assert {mark for _, _, mark in enforcer.seen} == {0x7}, "our bits are gone, those of others are not"
    assert marks(pair.a) == []


def test_data_of_an_unknown_connection_is_queued_whatever_its_mark(pair: Pair, enforce: Enforce) -> None:
    """A connection that is not allowed cannot slip its later packets through by a mark either."""
    enforcer = enforce(pair.a, pass_once)
    server = pair.b.listen()
    client = pair.a.new_socket()
    client.setsockopt(socket.SOL_SOCKET, SO_MARK, enforcer.config.marks.allowed)
    client.connect((pair.b.v4, server.getsockname()[1]))
    peer, _ = server.accept()
    peer.settimeout(0.3)
    enforcer.decide = deny
    client.sendall(b"secret")
    with peer, pytest.raises(TimeoutError):
        peer.recv(10)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_does_not_inherit_the_mark_of_one_that_vanished(
    pair: Pair, enforce: Enforce, family: str
) -> None:
    """Both ends forget a released connection; connection tracking does not, and takes the next for the same."""
    enforcer = enforce(pair.a, allow)
    server = pair.a.listen(v6=family == "v6")
    client = pair.b.connect(address(pair.a, family), server.getsockname()[1])
    peer, _ = server.accept()
    own = client.getsockname()
    _forget(client, peer)
    assert [m & enforcer.config.mask for m in marks(pair.a)] == [enforcer.config.marks.allowed]
    enforcer.decide = pass_once
    enforcer.seen.clear()
    again = pair.b.new_socket(socket.AF_INET6 if family == "v6" else socket.AF_INET)
    again.bind(own[:2])
    again.connect((address(pair.a, family), server.getsockname()[1]))
    talk(again, server)
    assert len(marks(pair.a)) == 1, "it is the same entry"
    assert enforcer.flags(LOCAL_IN).count(SYN) == 1
    payloads = [segment.payload for hook, segment, _ in enforcer.seen if hook == LOCAL_IN]
    assert b"ping" in payloads, "what follows the SYN has to be judged"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_opened_here_does_not_inherit_the_mark_either(
    pair: Pair, enforce: Enforce, family: str
) -> None:
    enforcer = enforce(pair.a, allow)
    server = pair.b.listen(v6=family == "v6")
    where = (address(pair.b, family), server.getsockname()[1])
    client = pair.a.connect(*where)
    peer, _ = server.accept()
    own = client.getsockname()
    _forget(client, peer)
    assert [m & enforcer.config.mask for m in marks(pair.a)] == [enforcer.config.marks.allowed]
    enforcer.decide = pass_once
    enforcer.seen.clear()
    again = pair.a.new_socket(socket.AF_INET6 if family == "v6" else socket.AF_INET)
    again.bind(own[:2])
    again.connect(where)
    talk(again, server)
    assert len(marks(pair.a)) == 1, "it is the same entry"
    payloads = [segment.payload for hook, segment, _ in enforcer.seen if hook == LOCAL_OUT]
    assert b"ping" in payloads, "what follows the SYN has to be judged"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_aborted_connection_leaves_its_mark_to_nobody(pair: Pair, enforce: Enforce, family: str) -> None:
    """The server resets: the entry stays, in state CLOSE, and a SYN of the other side does not replace it."""
    enforcer = enforce(pair.a, allow)
    server = pair.a.listen(v6=family == "v6")
    where = (address(pair.a, family), server.getsockname()[1])
    client = pair.b.connect(*where)
    own = client.getsockname()
    peer, _ = server.accept()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    client.close()
    assert [m & enforcer.config.mask for m in marks(pair.a)] == [enforcer.config.marks.allowed]
    enforcer.decide = pass_once
    enforcer.seen.clear()
    again = pair.b.new_socket(socket.AF_INET6 if family == "v6" else socket.AF_INET)
    again.bind(own[:2])
    again.connect(where)
    talk(again, server)
    payloads = [segment.payload for hook, segment, _ in enforcer.seen if hook == LOCAL_IN]
    assert b"ping" in payloads, "what follows the SYN has to be judged"


def _forget(*ends: socket.socket) -> None:
    """Close without a word to the other side."""
    for end in ends:
        end.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        end.close()


@pytest.mark.parametrize("flags", ["S", "SA"])
@pytest.mark.parametrize("inbound", [True, False], ids=["opened by the peer", "opened here"])
@pytest.mark.parametrize("adopted", [False, True], ids=["released", "adopted"])
def test_forged_syns_do_not_disturb_a_live_connection(
    pair: Pair, flags: str, inbound: bool, adopted: bool
) -> None:
    """Somebody sends SYNs under the peer's address into a bulk transfer: each is judged, and nothing else is."""
    server = (pair.a if inbound else pair.b).listen()
    if adopted:
        ends = _connected(pair, server, inbound)
        enforcer = Enforcer(pair.a, allow, adopt=True)
    else:
        enforcer = Enforcer(pair.a, allow)
        ends = _connected(pair, server, inbound)
    try:
        _bulk_under_forged_syns(pair, enforcer, *ends, flags=flags)
    finally:
        enforcer.close()


def _connected(pair: Pair, server: socket.socket, inbound: bool) -> tuple[socket.socket, socket.socket]:
    """The end in namespace a, and the one in b."""
    port = server.getsockname()[1]
    client = pair.b.connect(pair.a.v4, port) if inbound else pair.a.connect(pair.b.v4, port)
    peer, _ = server.accept()
    peer.settimeout(10)
    (pair.a if inbound else pair.b).opened.append(peer)
    return (peer, client) if inbound else (client, peer)


def _bulk_under_forged_syns(
    pair: Pair, enforcer: Enforcer, here: socket.socket, there: socket.socket, *, flags: str
) -> None:
    from scapy.compat import raw
    from scapy.layers.inet import IP, TCP

    for sender, receiver in ((there, here), (here, there)):
        sender.sendall(b"tracked from now on")  # see nfq.adoption
        receiver.recv(100)
    enforcer.decide = deny
    enforcer.seen.clear()
    forged = [
        raw(
            IP(src=pair.b.v4, dst=pair.a.v4)
            / TCP(sport=there.getsockname()[1], dport=here.getsockname()[1], flags=flags, seq=n * 77_777_777)
        )
        for n in range(20)
    ]
    with pair.b.enter():
        forger = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    block = bytes(50_000)
    with forger:
        for n, packet in enumerate(forged, 1):
            forger.sendto(packet, (pair.a.v4, 0))
            wait_until(partial(_seen, enforcer, n), "the forged SYN to be judged")
            for sender, receiver in ((there, here), (here, there)):
                sender.sendall(block)
                got = 0
                while got < len(block):
                    got += len(receiver.recv(1 << 20))
    assert len(enforcer.seen) == len(forged), "only the forged SYNs were queued"
    assert [m & enforcer.config.mask for m in marks(pair.a)] == [enforcer.config.marks.allowed]


def test_a_syn_ack_repeated_after_the_release_does_not_starve_the_connection(
    pair: Pair, enforce: Enforce
) -> None:
    """It clears the mark of the live connection; the next packet is judged, and with its release all is as before."""
    released: list[int] = []

    def decide(enforcer: Enforcer, packet: QueuedPacket, segment: Segment) -> None:
        if segment.flags & SYN:
            pass_once(enforcer, packet, segment)
        else:
            released.append(packet.hook)
            allow(enforcer, packet, segment)

    enforcer = enforce(pair.a, decide)
    server = pair.a.listen()
    client = pair.b.connect(pair.a.v4, server.getsockname()[1])
    peer, _ = server.accept()
    wait_until(lambda: released, "the release")
    before = len(released)
    with pair.a.enter():
        again = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    answer = next(s for _, s, _ in enforcer.seen if s.flags & SYN_ACK == SYN_ACK)
    with again, peer:
        seen = len(enforcer.seen)
        again.sendto(rebuild(answer, answer.options, b""), (pair.b.v4, 0))
        wait_until(lambda: len(enforcer.seen) > seen, "the repeated SYN-ACK")
        peer.settimeout(10)
        for _ in range(5):
            client.sendall(b"ping")
            assert peer.recv(10) == b"ping"
            peer.sendall(b"pong")
            assert client.recv(10) == b"pong"
    assert 1 <= len(released) - before <= 2, "judged once more (twice, if both sides sent at once)"
    assert [m & enforcer.config.mask for m in marks(pair.a)] == [enforcer.config.marks.allowed]


def test_a_mark_from_an_earlier_rule_counts_for_nothing(pair: Pair, enforce: Enforce) -> None:
    enforcer = enforce(pair.a, deny)
    server = pair.a.listen()
    mark = f"{enforcer.config.marks.allowed:#x}"
    pair.a.run("iptables", "-t", "raw", "-I", "PREROUTING", "1", "-j", "MARK", "--set-mark", mark)
    assert refused(pair.b, pair.a.v4, server.getsockname()[1])
    assert enforcer.flags(LOCAL_IN)


def test_marks_of_others_survive_the_verdict(pair: Pair, enforce: Enforce) -> None:
    """And mangle rules of others behind ours still see a packet that was queued."""
    enforce(pair.a, allow)
    server = pair.b.listen()
    for condition in ("0x40/0x40", "0x0/0x30000000"):
        pair.a.run(
            "iptables",
            "-t",
            "mangle",
            "-A",
            "OUTPUT",
            "-p",
            "tcp",
            "--syn",
            "-m",
            "mark",
            "--mark",
            condition,
        )
    client = pair.a.new_socket()
    client.setsockopt(socket.SOL_SOCKET, SO_MARK, 0x40)
    client.connect((pair.b.v4, server.getsockname()[1]))
    saved = pair.a.run("iptables-save", "-c", "-t", "mangle")
    theirs = [line for line in saved.splitlines() if "-A OUTPUT -p tcp" in line]
    assert len(theirs) == 2
    assert all(line.startswith("[1:60]") for line in theirs), theirs


def test_a_rewritten_packet_is_what_goes_on(pair: Pair, enforce: Enforce) -> None:
    def rewrite(enforcer: Enforcer, packet: QueuedPacket, segment: object) -> None:
        data = packet.get_payload()
        if b"ping" in data:
            packet.set_payload(_swap(data, b"ping", b"gnip"))
        release(packet, enforcer.config.marks.passing, enforcer.config.mask)

    enforce(pair.a, rewrite)
    server = pair.b.listen()
    client = pair.a.connect(pair.b.v4, server.getsockname()[1])
    peer, _ = server.accept()
    peer.settimeout(10)
    client.sendall(b"ping")
    with peer:
        assert peer.recv(10) == b"gnip"


def _swap(data: bytes, old: bytes, new: bytes) -> bytes:
    """The packet with another payload, checksums made right."""
    segment = parse(data, True)
    return rebuild(segment, segment.options, segment.payload.replace(old, new))


def test_fragments_are_put_together_before_they_are_judged(pair: Pair, enforce: Enforce) -> None:
    """A SYN in two fragments must not slip past the flag match: connection tracking defragments first."""
    from scapy.compat import raw
    from scapy.layers.inet import IP, TCP, fragment
    from scapy.packet import Raw

    enforcer = enforce(pair.a, deny)
    syn = IP(src=pair.b.v4, dst=pair.a.v4, id=7) / TCP(sport=4000, dport=5000, flags="S") / Raw(b"x" * 64)
    with pair.b.enter():
        sender = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with sender:
        for piece in fragment(syn, fragsize=24):  # type: ignore[no-untyped-call]
            sender.sendto(raw(piece), (pair.a.v4, 0))
    wait_until(lambda: enforcer.seen, "the SYN")
    assert [len(segment.payload) for _, segment, _ in enforcer.seen] == [64]


def _seen(enforcer: Enforcer, count: int) -> bool:
    return len(enforcer.seen) >= count
