"""Whose sockets are these: from datagrams to workloads' facts (nfq.attribution), through nfq.udpdiag.

A sender that could be one of several workloads is all of them here, and so nobody in particular: another program of
the same port can put any source address on a datagram, so the address tells nothing.

What cannot be attested: once a flow is live, a second program that has got the same port number (on another address, or
with SO_REUSEADDR on both) can send under its addresses. The flow was judged for whoever had the port alone.
"""

from __future__ import annotations

from nfq.attestation import Attributed
from nfq.attribution import Attributor
from nfq.datagram import Datagram
from nfq.sockdiag import Socket, UnavailableError
from nfq.udpdiag import DatagramDiag, members, sender_first


class DatagramOwners:
    """Owners of UDP sockets of this network namespace. For one thread."""

    def __init__(self, attributor: Attributor, diag: DatagramDiag) -> None:
        self._attributor = attributor
        self._diag = diag

    def senders(self, d: Datagram) -> list[tuple[Attributed, int]]:
        """Owners, with the cookie of their socket, of whatever can have sent a datagram. Raises UnavailableError."""
        found = self._diag.on_port(d.v6, d.source_port)
        return self._distinct(sender_first(found, d.source, d.destination, d.destination_port))

    def receivers(self, d: Datagram) -> list[tuple[Attributed, int]]:
        """The owner of the socket that gets it; for a group, of all that do. Raises UnavailableError."""
        unanswered = self._diag.unavailable
        found = self._diag.receiver(d.destination, d.destination_port, d.source, d.source_port, d.device)
        if found is not None:
            return self._distinct([found])
        if self._diag.unavailable != unanswered:
            raise UnavailableError("the kernel did not say whose socket it is")
        return []

    def members(self, d: Datagram) -> list[tuple[Attributed, int]]:
        """Owners of all sockets that get what arrives for a group. Raises UnavailableError."""
        found = self._diag.on_port(d.v6, d.destination_port)
        return self._distinct(members(found, d.destination, d.device))

    def _distinct(self, sockets: list[Socket]) -> list[tuple[Attributed, int]]:
        """One of each workload, in order."""
        out: dict[object, tuple[Attributed, int]] = {}
        for sock in sockets:
            owner = self._attributor.of(sock)
            out.setdefault(owner.key, (owner, sock.cookie))
        return list(out.values())
