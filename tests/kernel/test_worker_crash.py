"""Packet workers that die, hang or lose their agent: nothing new gets in, what was let in goes on and is remembered."""

from __future__ import annotations

import hashlib
import signal
import socket
import threading
import time

import pytest
from scapy.layers.inet import TCP

from sectool.events import Action, DropReason, Phase
from tests.kernel.conftest import wait_until
from tests.kernel.hosts import (
    POLICY,
    SHORT_S,
    Host,
    Lan,
    accept,
    echo,
    finish,
    nothing_arrives,
    port_of,
    read_exactly,
)
from tests.kernel.wire import again, flags

pytestmark = pytest.mark.kernel

ENDS = pytest.mark.parametrize("at", ["a", "b"])
DENY_DB = POLICY + "  - deny any to call app=db\n"


def host_of(lan: Lan, at: str) -> Host:
    """The initiator's or the responder's host."""
    return lan.a if at == "a" else lan.b


def nothing_new_passes(lan: Lan) -> None:
    """Neither with an identity, nor without, nor within host a."""
    listener, local = lan.b.listen(), lan.a.listen("127.0.0.1", uid=lan.a.user(app="cache"))
    plain = lan.wire.new_socket()
    plain.listen()
    outsider = lan.wire.new_socket()
    outsider.setblocking(False)
    outsider.connect_ex((lan.b.address(), port_of(listener)))
    dialled = [lan.a.dial(lan.b.address(), port_of(listener))]
    if lan.a.worker.poll() is not None:
        dialled += [lan.a.dial("127.0.0.1", port_of(local)), lan.a.dial("192.0.2.3", port_of(plain))]
    with pytest.raises(TimeoutError):
        finish(dialled[0], SHORT_S)
    for sock in dialled[1:]:
        with pytest.raises(TimeoutError):
            finish(sock, 0)
    if lan.b.worker.poll() is not None:
        with pytest.raises(TimeoutError):
            finish(outsider, 0)
        nothing_arrives(listener)
    nothing_arrives(local)
    nothing_arrives(plain)


@ENDS
def test_killed_nothing_new_passes_and_what_was_let_in_goes_on(lan: Lan, at: str) -> None:
    client, server = lan.establish()
    host = host_of(lan, at)
    host.kill()
    nothing_new_passes(lan)
    echo(client, server, b"still here" * 1000)
    server.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    client.sendall(b"one way")
    assert read_exactly(server, 7) == b"one way"
    host.restart()
    lan.establish()


@ENDS
def test_a_connection_on_which_nobody_spoke_yet_survives_a_restart(lan: Lan, at: str) -> None:
    """As a pool of connections keeps them: the initiator has proven itself, but has not heard from the responder."""
    listener = lan.b.listen()
    client = lan.a.connect(lan.b.address(), port_of(listener))
    server = accept(listener)
    host = host_of(lan, at)
    host.kill()
    host.restart()
    echo(client, server)


def test_killed_in_the_middle_of_a_transfer(lan: Lan) -> None:
    client, server = lan.establish()
    block = hashlib.shake_256(b"crash").digest(1 << 20)
    sender = threading.Thread(target=client.sendall, args=(block * 40,))
    sender.start()
    digest = hashlib.sha256(read_exactly(server, 5 << 20))
    for host in lan.hosts:
        host.kill()
    for _ in range(35):
        digest.update(read_exactly(server, 1 << 20))
    sender.join()
    assert digest.digest() == hashlib.sha256(block * 40).digest()


@ENDS
def test_a_connection_begun_without_a_worker_is_made_when_it_is_back(lan: Lan, at: str) -> None:
    host = host_of(lan, at)
    listener = lan.b.listen()
    host.kill()
    client = lan.a.dial(lan.b.address(), port_of(listener))
    with pytest.raises(TimeoutError):
        finish(client, 0.1)
    host.restart()
    echo(finish(client), accept(listener))


@ENDS
@pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
def test_flows_from_before_are_judged_by_later_policies(lan: Lan, at: str, v6: bool) -> None:
    client, server = lan.establish(v6=v6)
    kept = lan.establish(v6=v6, uid=lan.a.user(app="web", env="kept"))
    host = host_of(lan, at)
    before = host.event(port_of(server), phase=Phase.VERDICT)
    host.kill()
    host.restart()
    echo(client, server, b"restored")
    host.policy(POLICY.replace("allow app=web to call app=db", "allow env=kept to call app=db"))
    for sock in (client, server):
        with pytest.raises((ConnectionResetError, ConnectionAbortedError)):
            sock.recv(1)
    end = host.event(port_of(server), phase=Phase.END)
    assert bytes(end["event_id"]) == bytes(before["event_id"])
    assert end["action"] == Action.DENY
    assert end["drop_reason"] == DropReason.POLICY_CHANGED
    for name in ("source_identity", "destination_identity", "source_port", "uid", "start"):
        assert end[name] == before[name], name
    assert end["source_bytes"] > 0
    echo(*kept, b"kept")


@ENDS
def test_a_restart_under_a_policy_that_denies_cuts_at_once(lan: Lan, at: str) -> None:
    client, server = lan.establish()
    host = host_of(lan, at)
    host.kill()
    echo(client, server)
    host.restart(DENY_DB)
    for sock in (client, server):
        with pytest.raises((ConnectionResetError, ConnectionAbortedError)):
            sock.recv(1)
    host.event(port_of(server), phase=Phase.END, drop_reason=DropReason.POLICY_CHANGED)


@ENDS
@pytest.mark.parametrize("when", ["without a worker", "after the restart"])
def test_flows_from_before_get_their_end(lan: Lan, at: str, when: str) -> None:
    client, server = lan.establish()
    port, host = port_of(server), host_of(lan, at)
    before = host.event(port, phase=Phase.VERDICT)
    host.kill()
    if when == "after the restart":
        host.restart()
        echo(client, server)
    client.close()
    server.close()
    if when == "without a worker":
        host.restart()
    end = host.event(port, phase=Phase.END)
    assert bytes(end["event_id"]) == bytes(before["event_id"])
    assert end["action"] == Action.ALLOW
    assert end["source_bytes"] > 0
    wait_until(lambda: host.status()["live"] == 0, "an empty table")


def test_a_loopback_flow_from_before_is_judged_and_accounted_too(lan: Lan) -> None:
    listener = lan.a.listen("127.0.0.1", uid=lan.a.user(app="cache"))
    client = lan.a.connect("127.0.0.1", port_of(listener))
    server = accept(listener)
    echo(client, server)
    before = lan.a.event(port_of(listener), phase=Phase.VERDICT)
    lan.a.kill()
    echo(client, server)
    lan.a.restart()
    lan.a.policy(POLICY.replace("allow app=web to call app=cache", "deny app=web to call app=cache"))
    with pytest.raises((ConnectionResetError, ConnectionAbortedError)):
        client.recv(1)
    end = lan.a.event(port_of(listener), phase=Phase.END)
    assert bytes(end["event_id"]) == bytes(before["event_id"])
    assert end["destination_identity"] == before["destination_identity"]


def test_a_half_open_connection_does_not_get_in_by_a_restart(lan: Lan) -> None:
    """The responder's worker dies between SYN and proof. What it knew is gone, so the proof proves nothing."""
    listener = lan.b.listen()
    port = port_of(listener)
    with lan.wire.losing(f"tcp dport {port} tcp flags & (syn | rst) == 0"):
        client = lan.a.connect(lan.b.address(), port)
        lan.b.kill()
        lan.b.restart()
    before = lan.b.count(DropReason.UNKNOWN_FLOW)
    client.sendall(b"data with a proof")
    wait_until(lambda: lan.b.count(DropReason.UNKNOWN_FLOW) > before, "the drop")
    nothing_arrives(listener)
    with pytest.raises(ConnectionResetError):
        client.recv(1)  # the program learns of it at once


def test_a_connection_whose_initiator_died_before_the_answer_is_made_by_the_next_syn(lan: Lan) -> None:
    """The successor greets anew under the same sequence number; the responder, which knows that SYN, must answer."""
    listener = lan.b.listen()
    port = port_of(listener)
    with lan.wire.losing(f"tcp sport {port} tcp flags & (syn | ack) == syn | ack"):
        client = lan.a.dial(lan.b.address(), port)
        wait_until(lambda: lan.b.status()["half_open"] == 1, "the SYN to be over there")
        lan.a.kill()
    lan.a.restart()
    began = time.monotonic()
    finish(client, 10.0)
    assert time.monotonic() - began < 8.0, "a few retransmissions of the SYN, not the half-open flow's 35 s"
    echo(client, accept(listener))


def test_a_replay_across_a_restart_still_lacks_its_proof(lan: Lan) -> None:
    """The memory of handshakes seen dies with the worker; what it guards is guarded by the proof as well."""
    listener = lan.b.listen()
    port = port_of(listener)
    tap = lan.wire.tap("a", port)
    client = lan.a.connect(lan.b.address(), port)
    client.sendall(b"question")
    server = accept(listener)
    assert read_exactly(server, 8) == b"question"
    lan.b.kill()
    lan.b.restart()
    syn, *rest = (again(p, sport=40_003) for p in tap.all() if p[TCP].dport == port)
    lan.wire.send("b", syn)
    tap.next("the answer", lambda p: flags(p) == "SA" and p[TCP].dport == 40_003)
    for packet in rest:
        lan.wire.send("b", packet)
    lan.b.denial(port, DropReason.PROOF_INVALID, source_port=40_003)
    nothing_arrives(listener)


@ENDS
def test_a_worker_that_hangs_lets_nothing_pass_until_it_goes_on(lan: Lan, at: str) -> None:
    client, server = lan.establish()
    host = host_of(lan, at)
    listener = lan.b.listen()
    host.worker.send_signal(signal.SIGSTOP)
    try:
        waiting = lan.a.dial(lan.b.address(), port_of(listener))
        with pytest.raises(TimeoutError):
            finish(waiting, SHORT_S)
        nothing_arrives(listener)
        echo(client, server)
    finally:
        host.worker.send_signal(signal.SIGCONT)
    echo(finish(waiting), accept(listener))


@ENDS
def test_without_an_agent_the_worker_ends_and_nothing_new_passes(lan: Lan, at: str) -> None:
    client, server = lan.establish()
    host = host_of(lan, at)
    host.hang_up()
    host.worker.wait(5)
    assert host.worker.returncode == 0
    nothing_new_passes(lan)
    echo(client, server)
    assert (host.run / "output").read_text() == ""
    host.restart()
    lan.establish()


@ENDS
def test_without_a_policy_nothing_is_judged(lan: Lan, at: str) -> None:
    host = host_of(lan, at)
    host.kill()
    host.restart(None)
    listener = lan.b.listen()
    waiting = lan.a.dial(lan.b.address(), port_of(listener))
    with pytest.raises(TimeoutError):
        finish(waiting, SHORT_S)
    nothing_arrives(listener)
    assert host.told(port_of(listener)) == [], "no denial for want of a policy"
    host.policy(POLICY)
    echo(finish(waiting), accept(listener))


def test_an_agent_that_never_answers(lan: Lan) -> None:
    """The packet waits for its workload, others do not wait behind it; after a while it is dropped."""
    from_silent, to_silent = lan.b.listen(), lan.b.listen(uid=lan.b.user(None))
    waiting = [
        lan.a.dial(lan.b.address(), port_of(from_silent), uid=lan.a.user(None)),
        lan.a.dial(lan.b.address(), port_of(to_silent)),
    ]
    for host in lan.hosts:
        wait_until(lambda h=host: h.status()["held"] == 1, "the packet to be held")  # type: ignore[misc]
    lan.establish()
    for sock in waiting:
        sock.close()
    for host in lan.hosts:
        assert len(host.asked) == 1, "one question, however often"
        host.asked.clear()
        wait_until(lambda h=host: h.status()["held"] == 0, "the packet to be dropped")  # type: ignore[misc]
    nothing_arrives(from_silent)
    nothing_arrives(to_silent)


@ENDS
def test_an_agent_that_answers_late(lan: Lan, at: str) -> None:
    host = host_of(lan, at)
    slow = host.user(None)
    listener = lan.b.listen(uid=slow if at == "b" else 0)
    waiting = lan.a.dial(lan.b.address(), port_of(listener), uid=slow if at == "a" else 0)
    wait_until(lambda: host.asked, "the question")
    host.answer(slow, host.credential(app="web" if at == "a" else "db"))
    echo(finish(waiting, 0.9), accept(listener))  # the held packet itself went on, no retransmission


def test_all_events_of_all_workers_are_there(lan: Lan) -> None:
    """The ring goes on where the dead worker stopped."""
    ports = []
    for _ in range(3):
        client, server = lan.establish()
        ports.append(port_of(server))
        for sock in (client, server):
            sock.close()
        lan.b.event(ports[-1], phase=Phase.END)
        lan.b.kill()
        lan.b.restart()
    for port in ports:
        assert [told.split()[1] for told in lan.b.told(port)] == ["VERDICT", "END"]
    assert lan.b.status()["lost"] == 0
