"""What is asked of the engine: two parties and a service."""

from __future__ import annotations

from dataclasses import dataclass

from sectool.labels import LabelSet
from sectool.policy.network import IPAddress

NO_NAMES: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Party:
    """One end of a flow, as far as it is known.

    `labels` are those a verified credential vouches for (trust domain as label `domain`); None means that
    there is no proven identity. `identity` is the SPIFFE ID, for people to read: policy never looks at it.
    `names` are host names by which `address` is known, lower case, without final dot.
    """

    labels: LabelSet | None = None
    identity: str | None = None
    address: IPAddress | None = None
    names: frozenset[str] = NO_NAMES

    def __str__(self) -> str:
        parts = [] if self.labels is None else [str(self.labels) or "(no labels)"]
        if self.address is not None:
            parts.append(f"ip:{self.address}")
        parts.extend(f"fqdn:{name}" for name in sorted(self.names))
        return ",".join(parts) or "unidentified"


@dataclass(frozen=True, slots=True)
class Request:
    """May `source` call `destination`?

    `protocol` is the IP protocol number; `port` the destination port, or the type of an ICMP message, whose
    code is `icmp_code`. `can_encrypt` says that both ends have an enforcer and a cipher suite in common.
    """

    source: Party
    destination: Party
    protocol: int
    port: int
    icmp_code: int = 0
    can_encrypt: bool = False
