"""Services of observed flows: single ports, and ranges where a server was called on many ports close to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from sectool.labels import LabelSet
from sectool.policy.service import ICMP, ICMP6, Service

if TYPE_CHECKING:
    from sectool.policy.suggest import Observation

MANY_PORTS: Final = 16  # distinct ports of one server that make a range


def by_service(observations: Sequence[Observation]) -> list[tuple[Service, list[Observation]]]:
    """Observations by service, ranges found first."""
    called: dict[tuple[int, str], dict[int, int]] = {}
    for one in observations:
        if one.protocol in (ICMP, ICMP6):
            continue
        ports = called.setdefault((one.protocol, _server(one)), {})
        ports[one.port] = ports.get(one.port, 0) + one.flows
    spans: dict[int, list[tuple[int, int]]] = {}
    for (protocol, _), ports in sorted(called.items()):
        spans.setdefault(protocol, []).extend(_spans(ports))
    for protocol, found in spans.items():
        spans[protocol] = _joined(found)
    out: dict[Service, list[Observation]] = {}
    for one in observations:
        port = one.port
        low, high = next(((a, b) for a, b in spans.get(one.protocol, ()) if a <= port <= b), (port, port))
        if (low, high) != (port, port) and port not in _ranged(called[one.protocol, _server(one)], low, high):
            low = high = port
        out.setdefault(Service(one.protocol, low, high), []).append(one)
    return sorted(out.items(), key=lambda entry: (entry[0].protocol, entry[0].low, entry[0].high))


def _server(one: Observation) -> str:
    """Who is called, without what tells its instances apart."""
    if not isinstance(one.destination, LabelSet):
        return "net"
    return str(one.destination.get("app") or one.destination.get("k8s.label.app") or one.destination)


def _ranged(ports: Mapping[int, int], low: int, high: int) -> frozenset[int]:
    """The ports of a server that count as of the range: all, if several are; one alone is itself."""
    inside = frozenset(p for p in ports if low <= p <= high)
    return inside if len(inside) >= 3 else frozenset()


def _spans(ports: Mapping[int, int]) -> list[tuple[int, int]]:
    """Ranges of ports, many of which were called and none of which stands out."""
    numbers = sorted(ports)
    if len(numbers) < MANY_PORTS:
        return []
    gap = max(8, 8 * sorted(b - a for a, b in pairwise(numbers))[len(numbers) // 2 - 1])
    groups: list[list[int]] = [[numbers[0]]]
    for before, port in pairwise(numbers):
        if port - before > gap:
            groups.append([])
        groups[-1].append(port)
    out = []
    for group in groups:
        width = group[-1] - group[0] + 1
        flows = [ports[p] for p in group]
        if len(group) < MANY_PORTS or 2 * max(flows) > sum(flows):
            continue
        if 20 * len(group) >= width:
            out.append((group[0], group[-1]))
        elif group[0] >= 32768:  # chosen by the server's kernel
            out.append((32768, 60999 if group[-1] <= 60999 else 65535))
    return out


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if out and low <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], high))
        else:
            out.append((low, high))
    return out
