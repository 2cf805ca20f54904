"""Which worker a flow belongs to: the same answer for both directions, its handshake and the ICMP errors about it.

The sum of both addresses (of IPv6 ones the last four bytes) and both ports, multiplied and shifted, modulo the number
of workers. The kernel computes the same with a BPF program (nfq.bpf.steered_to), which has 64 instructions at most.
"""

from __future__ import annotations

import struct

from nfq.bpf import GOLDEN


def worker_of(key: bytes, workers: int) -> int:
    """The worker (from 0) of a flow key: local, remote address, local, remote port. Addresses alone will do, too."""
    if workers == 1:
        return 0
    size = 16 if len(key) >= 32 else 4
    local, remote, ports = key[size - 4 : size], key[2 * size - 4 : 2 * size], key[2 * size :]
    total = int.from_bytes(local, "big") + int.from_bytes(remote, "big")
    total += sum(struct.unpack(f">{len(ports) // 2}H", ports))
    hashed: int = ((total * GOLDEN & 0xFFFFFFFF) >> 16) % workers
    return hashed
