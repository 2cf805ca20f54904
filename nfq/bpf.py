"""Questions to a packet that iptables cannot ask by itself, as classic BPF for xt_bpf (`-m bpf --bytecode`).

xt_bpf runs a program on the packet from its IP header on; it matches unless the program returns 0.
Source: include/uapi/linux/filter.h, bpf_common.h; Documentation/networking/filter.rst.
"""

from __future__ import annotations

from typing import Final, NamedTuple

# Instructions used: load, ALU, jump, misc, return (class | size or operation | mode or source)
_LD_W_ABS, _LD_H_ABS, _LD_B_ABS = 0x20, 0x28, 0x30
_LD_W_IND, _LD_H_IND, _LD_B_IND = 0x40, 0x48, 0x50
_LD_W_LEN, _LD_IMM, _LD_MEM = 0x80, 0x00, 0x60
_LDX_IMM, _LDX_MSH, _LDX_MEM = 0x01, 0xB1, 0x61
_ST, _STX = 0x02, 0x03
_ADD_K, _ADD_X, _MUL_K, _AND_K, _RSH_K, _MOD_K = 0x04, 0x0C, 0x24, 0x54, 0x74, 0x94
_JEQ_K, _JGE_K, _JSET_K, _JEQ_X, _JA = 0x15, 0x35, 0x45, 0x1D, 0x05
_RET_K, _TAX = 0x06, 0x07

GOLDEN: Final = 0x9E3779B1  # 2^32 divided by the golden ratio: spreads neighbouring numbers (Knuth 6.4)
_TCP, _UDP, _ICMP, _ICMP6 = 6, 17, 1, 58
_ADDRESSES, _SUM = 0, 1  # places in scratch memory


class _Op(NamedTuple):
    """One instruction; jumps name a label instead of a distance ('' is the next instruction)."""

    code: int
    k: int = 0
    yes: str = ""
    no: str = ""
    label: str = ""


def assemble(program: list[_Op]) -> str:
    """The text that `--bytecode` takes."""
    at = {op.label: i for i, op in enumerate(program) if op.label}

    def distance(i: int, label: str) -> int:
        far = at[label] - i - 1 if label else 0
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
    """Matches TCP segments with payload or FIN, and whatever cannot be told (IPv6 extension headers)."""
    head = [_Op(_LDX_MSH, 0)]
    if v6:
        head = [_Op(_LD_B_ABS, 6), _Op(_JEQ_K, _TCP, "", "yes"), _Op(_LDX_IMM, 40)]
    return assemble(
        [
            *head,
            _Op(_LD_B_IND, 13),
            _Op(_JSET_K, 1, "yes", ""),
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


def steered_to(worker: int, workers: int, v6: bool) -> str:
    """Matches the packets of `worker` (from 0) among `workers`: nfq.steering.worker_of, in the kernel.

    An ICMP error goes where the packet it quotes belongs.
    """
    return assemble((_ipv6() if v6 else _ipv4()) + _choice(worker, workers))


def _ipv4() -> list[_Op]:
    return [
        _Op(_LDX_MSH, 0),
        _Op(_LD_B_ABS, 9),
        _Op(_JEQ_K, _ICMP, "", "own"),
        _Op(_LD_B_IND, 0),
        _Op(_JEQ_K, 3, "quoted"),
        _Op(_JEQ_K, 4, "quoted"),
        _Op(_JEQ_K, 5, "quoted"),
        _Op(_JEQ_K, 11, "quoted"),
        _Op(_JEQ_K, 12, "quoted", "own"),
        # X: where the packet to look at begins
        _Op(0x87, label="quoted"),  # A = X
        _Op(_ADD_K, 8),
        _Op(_TAX),
        _Op(_JA, yes="look"),
        _Op(_LDX_IMM, 0, label="own"),
        _Op(_LD_W_IND, 12, label="look"),
        _Op(_ST, _SUM),
        _Op(_LD_W_IND, 16),
        *_add(),
        _Op(_LD_B_IND, 9),
        _Op(_JEQ_K, _TCP, "ports"),
        _Op(_JEQ_K, _UDP, "ports", "choose"),
        _Op(_LD_B_IND, 0, label="ports"),  # its header's length: 4 * (first byte & 15), added to X
        _Op(_AND_K, 0x0F),
        _Op(0x64, 2),  # A <<= 2
        _Op(_ADD_X),
        _Op(_TAX),
        *_add_ports(),
    ]


def _ipv6() -> list[_Op]:
    return [
        _Op(_LD_B_ABS, 6),
        _Op(_JEQ_K, _ICMP6, "", "own"),
        _Op(_LD_B_ABS, 40),
        _Op(_JGE_K, 128, "own", ""),
        _Op(_LDX_IMM, 48),
        _Op(_JA, yes="look"),
        _Op(_LDX_IMM, 0, label="own"),
        _Op(_LD_W_IND, 20, label="look"),
        _Op(_ST, _SUM),
        _Op(_LD_W_IND, 36),
        *_add(),
        _Op(_LD_B_IND, 6),
        _Op(_JEQ_K, _TCP, "ports"),
        _Op(_JEQ_K, _UDP, "ports", "choose"),
        _Op(0x87, label="ports"),  # A = X
        _Op(_ADD_K, 40),
        _Op(_TAX),
        *_add_ports(),
    ]


def _add() -> list[_Op]:
    """M[_SUM] += A, keeping X."""
    return [_Op(_STX, 2), _Op(_LDX_MEM, _SUM), _Op(_ADD_X), _Op(_ST, _SUM), _Op(_LDX_MEM, 2)]


def _add_ports() -> list[_Op]:
    return [_Op(_LD_H_IND, 0), *_add(), _Op(_LD_H_IND, 2), *_add()]


def _choice(worker: int, workers: int) -> list[_Op]:
    return [
        _Op(_LD_MEM, _SUM, label="choose"),
        _Op(_MUL_K, GOLDEN),
        _Op(_RSH_K, 16),
        _Op(_MOD_K, workers),
        _Op(_JEQ_K, worker, "yes", "no"),
        _Op(_RET_K, 1, label="yes"),
        _Op(_RET_K, 0, label="no"),
    ]
