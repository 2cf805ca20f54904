"""Questions to a packet that iptables cannot ask by itself, as classic BPF for xt_bpf (`-m bpf --bytecode`).

xt_bpf runs a program on the packet from its IP header on; it matches unless the program returns 0.
Source: include/uapi/linux/filter.h, bpf_common.h; Documentation/networking/filter.rst.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from nfq.udpcontrol import MAGIC, Kind

# Instructions used: load, ALU, jump, misc, return (class | size or operation | mode or source)
_LD_W_ABS, _LD_H_ABS, _LD_B_ABS = 0x20, 0x28, 0x30
_LD_W_IND, _LD_H_IND, _LD_B_IND = 0x40, 0x48, 0x50
_LD_W_LEN, _LD_IMM, _LD_MEM, _ST = 0x80, 0x00, 0x60, 0x02
_LDX_IMM, _LDX_MSH, _LDX_MEM = 0x01, 0xB1, 0x61
_ADD_K, _ADD_X, _MUL_K, _AND_K, _LSH_K, _RSH_K, _MOD_K = 0x04, 0x0C, 0x24, 0x54, 0x64, 0x74, 0x94
_JEQ_K, _JGE_K, _JSET_K, _JEQ_X, _JA = 0x15, 0x35, 0x45, 0x1D, 0x05
_RET_K, _TAX, _TXA = 0x06, 0x07, 0x87

GOLDEN: Final = 0x9E3779B1  # 2^32 divided by the golden ratio: spreads neighbouring numbers (Knuth 6.4)
_TCP, _UDP, _ICMP, _ICMP6, _HOP_BY_HOP, _DESTINATION = 6, 17, 1, 58, 0, 60
_FROM, _TO, _SPORT, _DPORT, _NEXT = range(5)  # places in scratch memory


class _Op(NamedTuple):
    """One instruction; jumps name a label, or a distance as digits ('' is the next instruction)."""

    code: int
    k: int = 0
    yes: str = ""
    no: str = ""
    label: str = ""


def assemble(program: list[_Op]) -> str:
    """The text that `--bytecode` takes."""
    at = {op.label: i for i, op in enumerate(program) if op.label}

    def distance(i: int, label: str) -> int:
        far = int(label) if label.isdigit() else at[label] - i - 1 if label else 0
        assert 0 <= far < 256
        return far

    lines = []
    for i, op in enumerate(program):
        if op.code == _JA:
            lines.append(f"{op.code} 0 0 {distance(i, op.yes)}")
        else:
            lines.append(f"{op.code} {distance(i, op.yes)} {distance(i, op.no)} {op.k}")
    return f"{len(lines)}," + ",".join(lines)


def carries(v6: bool) -> str:
    """Matches TCP segments with payload, FIN or URG, and whatever cannot be told (IPv6 extension headers)."""
    head = [_Op(_LDX_MSH, 0)]
    if v6:
        head = [_Op(_LD_B_ABS, 6), _Op(_JEQ_K, _TCP, "", "yes"), _Op(_LDX_IMM, 40)]
    return assemble(
        [
            *head,
            _Op(_LD_B_IND, 13),
            _Op(_JSET_K, 0x21, "yes", ""),
            _Op(_LD_B_IND, 12),
            _Op(_AND_K, 0xF0),
            _Op(_RSH_K, 2),
            _Op(_ADD_X),
            _Op(_TAX),
            _Op(_LD_W_LEN),  # not the header's: that is 0 for packets over 64 KiB
            _Op(_JEQ_X, 0, "no", "yes"),
            _Op(_RET_K, 1, label="yes"),
            _Op(_RET_K, 0, label="no"),
        ]
    )


def ordinary(v6: bool) -> str:
    """Matches UDP datagrams that cannot be control datagrams of ours (nfq.udpcontrol.MAGIC)."""
    return assemble([*_candidate(v6, 16, "yes"), _Op(_RET_K, 0, label="no"), _Op(_RET_K, 1, label="yes")])


def greets(v6: bool) -> str:
    """Matches UDP datagrams that look like a Hello: the costly kind."""
    return assemble(
        [
            *_candidate(v6, 18, "no"),
            _Op(_LD_B_IND, 17),
            _Op(_JEQ_K, Kind.HELLO, "yes", "no"),
            _Op(_RET_K, 1, label="yes"),
            _Op(_RET_K, 0, label="no"),
        ]
    )


def _candidate(v6: bool, size: int, otherwise: str) -> list[_Op]:
    """Goes on if a UDP packet has `size` bytes and begins as control datagrams do, else to the label `otherwise`.

    Behind IPv6 extension headers nothing is looked for: to the label 'no'.
    """
    head = [_Op(_LDX_MSH, 0)]
    if v6:
        head = [_Op(_LD_B_ABS, 6), _Op(_JEQ_K, _UDP, "", "no"), _Op(_LDX_IMM, 40)]
    return [
        *head,
        _Op(_LD_W_LEN),
        _Op(0x1C),  # A -= X
        _Op(_JGE_K, size, "", otherwise),  # a load beyond the end would end the program
        _Op(_LD_W_IND, 8),
        _Op(_JEQ_K, int.from_bytes(MAGIC[:4], "big"), "", otherwise),
        _Op(_LD_W_IND, 12),
        _Op(_JEQ_K, int.from_bytes(MAGIC[4:], "big"), "", otherwise),
    ]


def steered_to(worker: int, workers: int, v6: bool) -> str:
    """Matches the packets of `worker` (from 0) among `workers`: nfq.steering.worker_of, in the kernel.

    An ICMP error goes where the packet it quotes belongs. Behind more than two IPv6 extension headers, or a routing
    header, ports are not found: such packets go by their addresses alone.
    """
    return assemble((_ipv6() if v6 else _ipv4()) + _choice(worker, workers))


def _ipv4() -> list[_Op]:
    quoting = (3, 4, 5, 11, 12)  # unreachable, source quench, redirect, time exceeded, parameter problem
    return [
        _Op(_LDX_MSH, 0),
        _Op(_LD_B_ABS, 9),
        _Op(_JEQ_K, _ICMP, "", "own"),
        _Op(_LD_B_IND, 0),
        *(_Op(_JEQ_K, kind, "quoted", "own" if kind == quoting[-1] else "") for kind in quoting),
        _Op(_TXA, label="quoted"),
        _Op(_ADD_K, 8),
        _Op(_TAX),
        _Op(_JA, yes="look"),
        _Op(_LDX_IMM, 0, label="own"),
        # X: where the packet to look at begins
        _Op(_LD_W_IND, 12, label="look"),
        _Op(_ST, _FROM),
        _Op(_LD_W_IND, 16),
        _Op(_ST, _TO),
        *_no_ports(),
        _Op(_LD_B_IND, 9),
        _Op(_JEQ_K, _TCP, "length"),
        _Op(_JEQ_K, _UDP, "length", "choose"),
        _Op(_LD_B_IND, 0, label="length"),  # its header's: 4 * (first byte & 15)
        _Op(_AND_K, 0x0F),
        _Op(_LSH_K, 2),
        _Op(_ADD_X),
        _Op(_TAX),
        *_ports(),
    ]


def _ipv6() -> list[_Op]:
    return [
        _Op(_LD_B_ABS, 6),
        _Op(_JEQ_K, _ICMP6, "", "own"),
        _Op(_LD_B_ABS, 40),
        _Op(_JGE_K, 128, "own", ""),  # no error
        _Op(_LDX_IMM, 48),
        _Op(_JA, yes="look"),
        _Op(_LDX_IMM, 0, label="own"),
        _Op(_LD_W_IND, 20, label="look"),
        _Op(_ST, _FROM),
        _Op(_LD_W_IND, 36),
        _Op(_ST, _TO),
        *_no_ports(),
        _Op(_LD_B_IND, 6),
        _Op(_ST, _NEXT),
        _Op(_TXA),
        _Op(_ADD_K, 40),
        _Op(_TAX),
        _Op(_LD_MEM, _NEXT),
        *_past_options(),
        *_past_options(),
        _Op(_JEQ_K, _TCP, "ports"),
        _Op(_JEQ_K, _UDP, "ports", "choose"),
        *_ports(),
    ]


def _past_options() -> list[_Op]:
    """A: the next header, which begins at X. If it is hop-by-hop or destination options, go to what follows them."""
    return [
        _Op(_JEQ_K, _HOP_BY_HOP, "3"),
        _Op(_JEQ_K, _DESTINATION, "2"),
        _Op(_JEQ_K, _TCP, "ports"),
        _Op(_JEQ_K, _UDP, "ports", "choose"),
        _Op(_LD_B_IND, 0),
        _Op(_ST, _NEXT),
        _Op(_LD_B_IND, 1),
        _Op(_LSH_K, 3),
        _Op(_ADD_K, 8),
        _Op(_ADD_X),
        _Op(_TAX),
        _Op(_LD_MEM, _NEXT),
    ]


def _no_ports() -> list[_Op]:
    return [_Op(_LD_IMM, 0), _Op(_ST, _SPORT), _Op(_ST, _DPORT)]


def _ports() -> list[_Op]:
    """Those at X."""
    return [_Op(_LD_H_IND, 0, label="ports"), _Op(_ST, _SPORT), _Op(_LD_H_IND, 2), _Op(_ST, _DPORT)]


def _choice(worker: int, workers: int) -> list[_Op]:
    return [
        _Op(_LD_MEM, _FROM, label="choose"),
        *(op for place in (_TO, _SPORT, _DPORT) for op in (_Op(_LDX_MEM, place), _Op(_ADD_X))),
        _Op(_MUL_K, GOLDEN),
        _Op(_RSH_K, 16),
        _Op(_MOD_K, workers),
        _Op(_JEQ_K, worker, "", "no"),
        _Op(_RET_K, 1),
        _Op(_RET_K, 0, label="no"),
    ]
