"""The whole packet path of two hosts, `nfq.datapath.handle` and `bulk`, with a network that does as it likes.

Any bytes in either direction, packets of a real connection, changed ones, repeated ones, at any time: nothing raises,
every packet gets a verdict, what a verdict carries is a packet, tables stay within their limits, and no payload reaches
a program that the other one did not send.
"""

from __future__ import annotations

from typing import Any

from nfq import datapath
from nfq.core import Config, Core, Result, Verdict
from nfq.datagram import parse as parse_datagram
from nfq.icmpmessage import message
from nfq.ip import TCP, UDP, header
from nfq.packet import RST, PacketError, parse, rebuild
from nfq.recorder import Recorder
from nfq.suites import ALL
from sectool.policy import Engine
from sectool.policy import parse as parse_policy
from tests.fuzz.packets import datagrams, segments, tcp
from tests.fuzz.script import FLIP, Script, change
from tests.fuzz.world import NOW_US, hosts, root
from tests.nfq.memory import POLICY, Host, MemoryPorts, Sink

LIMIT = 8
STEPS = 48
_PLAIN = (
    POLICY
    + "---\nkind: Policy\nname: more\nowner: team\nrules:\n  - allow app=web to call app=db on udp/5432\n"
)
_SEALED = _PLAIN.replace("tcp/5432\n", "tcp/5432 encrypted\n").replace("udp/5432\n", "udp/5432 encrypted\n")
_NONE = ""
_engines: dict[str, Engine] = {}


class _End:
    """One host, made anew for each input: what it keeps must not come from another one."""

    def __init__(self, model: Host, encrypts: bool) -> None:
        config = Config(
            half_open_limit=LIMIT,
            live_limit=LIMIT,
            syn_rate=1e6,
            syn_burst=1e6,
            suites=ALL if encrypts else (),
        )
        self.ports = MemoryPorts(model.ports.connecting, dict(model.ports.listening))
        self.core = Core(config, _engine(_PLAIN), model.core.verifier, Recorder(Sink()), self.ports)
        self.core.credentials = model.core.credentials
        self.core.revision = 1

    def judge(self, packet: bytes, outbound: bool, how: int, now: int) -> bytes | None:
        """What goes on in its place; None: nothing."""
        if how & 4:
            result = datapath.bulk(self.core, packet, outbound, bool(how & 8), now)
        else:
            result = datapath.handle(self.core, packet, outbound, bool(how & 2), now, 1 if how & 2 else 2)
        assert isinstance(result, Result)
        assert result.verdict in Verdict
        self._bounded()
        if result.verdict in (Verdict.DROP, Verdict.HOLD, Verdict.WAIT):
            return None
        after = packet if result.packet is None else bytes(result.packet)
        _readable(after)
        return after

    def policy(self, text: str, now: int) -> None:
        """Another revision."""
        datapath.activate(self.core, _engine(text), self.core.revision + 1, 0, now)

    def tick(self, now: int) -> None:
        """A second has passed."""
        datapath.tick(self.core, now)
        self._bounded()

    def _bounded(self) -> None:
        core = self.core
        for table in (core.connecting, core.accepting, core.udp.connecting, core.udp.accepting):
            assert len(table) <= LIMIT
        assert len(core.live) <= LIMIT
        assert len(core.udp.live) <= LIMIT
        for injected in (*self.ports.injected, *self.ports.large):
            _readable(injected)


def _engine(text: str) -> Engine:
    if text not in _engines:
        _engines[text] = Engine(parse_policy(text))
    return _engines[text]


def _readable(packet: bytes) -> None:
    head = header(packet)
    if head.protocol == TCP:
        seg = parse(packet, True)
        assert len(seg.options) <= 40
    elif head.protocol == UDP:
        parse_datagram(packet, True)
    else:
        message(packet, head)


def _sent() -> list[bytes]:
    """What the programs' stacks send, in the order of a connection's life; a byte chooses."""
    out = [
        tcp(v6, flags, payload, options, reverse=reverse, seq=seq, ack=ack)
        for v6 in (False, True)
        for flags, payload, options, reverse, seq, ack in _LIFE
    ]
    return out + list(datagrams().values())


_STACK = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)]
_STAMPS = [("NOP", None), ("NOP", None), ("Timestamp", (3, 2))]
WORDS, BACK = b"select * from secrets", b"forty-two"
_LIFE: tuple[tuple[str, bytes, Any, bool, int, int], ...] = (
    ("S", b"", _STACK, False, 1000, 0),
    ("SA", b"", _STACK, True, 9000, 1001),
    ("A", b"", _STAMPS, False, 1001, 9001),
    ("PA", WORDS, _STAMPS, False, 1001, 9001),
    ("PA", BACK, _STAMPS, True, 9001, 1001 + len(WORDS)),
    ("FA", b"", _STAMPS, False, 1001 + len(WORDS), 9001 + len(BACK)),
    ("FA", b"", _STAMPS, True, 9001 + len(BACK), 1002 + len(WORDS)),
    ("R", b"", [], False, 1001, 9001),
)
_programs: list[bytes] = []


def one(data: bytes) -> None:
    """Which settings in the first byte; then steps, each of a byte that says what and what that needs."""
    if not _programs:
        _programs.extend(_sent())
    script = Script(data)
    flags = script.below(256)
    world = hosts()
    ends = _End(world.a, bool(flags & 1)), _End(world.b, bool(flags & 2))
    if flags & 4:
        for end in ends:
            end.policy(_SEALED, NOW_US)
    now, wire = NOW_US, [segments()["hello-4"]]
    for _ in range(STEPS):
        if not script:
            break
        step = script.below(256)
        kind, end = step & 7, ends[step >> 3 & 1]
        how = step >> 4
        match kind:
            case 0 | 1:  # a program's packet, on its way through both hosts
                wire += _travels(ends, _programs[script.below(256) % len(_programs)], now)
            case 2:  # the same, but the network changes it
                packet = _programs[script.below(256) % len(_programs)]
                source = _sender(ends, packet)
                left = source.judge(packet, True, 0, now)
                if left is not None:
                    wire.append(left)
                    other = ends[source is ends[0]]
                    other.judge(_resealed(script.changed(left), how), False, how & 4, now)
            case 3:  # something seen before, changed or not
                packet = script.changed(wire[script.below(256) % len(wire)])
                end.judge(_resealed(packet, how), bool(how & 1), how & 12, now)
            case 4:  # whatever
                end.judge(script.piece(), bool(how & 1), how, now)
            case 5:
                now += script.below(1 << 16) * 4000
                end.tick(now)
            case 6:
                end.policy((_PLAIN, _SEALED, _NONE)[how % 3], now)
            case _:  # what an enforcer sent of itself arrives
                for packet in end.ports.injected[-2:]:
                    wire.append(packet)
                    ends[end is ends[0]].judge(packet, False, 0, now)
        if len(wire) > 64:
            del wire[:32]


def _sender(ends: tuple[_End, _End], packet: bytes) -> _End:
    head = header(packet)
    return ends[head.source[-1] != 1]


def _travels(ends: tuple[_End, _End], packet: bytes, now: int) -> list[bytes]:
    source = _sender(ends, packet)
    left = source.judge(packet, True, 0, now)
    if left is None:
        return []
    arrived = ends[source is ends[0]].judge(left, False, 0, now)
    if arrived is not None and header(arrived).protocol == TCP:
        seg, sent = parse(arrived, False), parse(packet, True)
        assert seg.payload == sent.payload or seg.flags & RST  # cut
    return [left]


def _resealed(packet: bytes, how: int) -> bytes:
    """With checksums made right, if so asked and possible: what an attacker would do."""
    if not how & 2:
        return packet
    try:
        seg = parse(packet, True)
    except PacketError:
        return packet
    return rebuild(seg, seg.options, seg.payload)


def seeds() -> dict[str, bytes]:
    """Connections from beginning to end, plain and encrypted, over both IP versions; attacks on them."""
    root()
    life = len(_LIFE)
    out: dict[str, bytes] = {}
    for flags in (0, 3, 7):
        for six in (0, 1):
            steps = b"".join(bytes((0, six * life + n)) for n in range(life - 1))
            out[f"life-{flags}-{six}"] = bytes((flags,)) + steps
        udp = b"".join(bytes((0, 2 * life + n)) + b"\x07\x0f\x07\x0f" for n in (0, 2, 0, 2) for _ in range(2))
        out[f"datagrams-{flags}"] = bytes((flags,)) + udp
    out["messages"] = b"\0" + b"".join(bytes((0, 2 * life + n)) for n in range(len(datagrams())))
    out["policy"] = b"\3" + b"".join(bytes((0, n)) for n in range(4)) + b"\x26\x2e\0\3\0\4"
    out["time"] = b"\3\0\0\0\1" + b"\x05\xff\xff\x0d\xff\xff" + b"\0\2\0\3"
    out["replay"] = b"\3\0\0\x0b\1\0\x0b\1\0\x0b\0\0"
    for name, packet in {**segments(), **datagrams()}.items():
        out[f"raw-{name}"] = b"\3\x0c" + len(packet).to_bytes(2, "big") + packet
    for at in (10, 40, 80, 120):
        out[f"flip-{at}"] = b"\3\x22\0\1" + change(FLIP, at, 0, size=1200) + b"\0\1\0\2"
    return out
