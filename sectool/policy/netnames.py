"""Names for networks that a suggestion speaks of: those there are, new ones after whom they serve, and the Internet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sectool.policy.model import DocumentSet, NetworkDoc
from sectool.policy.network import IPNetwork, NetworkSpec, parse_cidr
from sectool.policy.selector import Cidr, NamedNet, Selector

Listed = tuple[tuple[str, tuple[str, ...] | None], ...]  # clauses with all their values

MANY: Final = 256  # public networks that make the Internet
_PRIVATE: Final = (
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
)
_PRIVATE6: Final = ("fc00::/7", "fe80::/10", "::1/128")


class Names:
    """Network documents: those there are, and those made here, named after whom they serve."""

    def __init__(self, base: DocumentSet) -> None:
        self._specs = {doc.name: doc.spec for doc in base.networks}
        self.made: list[NetworkDoc] = []

    def of(
        self,
        nets: Sequence[IPNetwork],
        others: Listed,
        *,
        outward: bool,
    ) -> tuple[Selector, tuple[str, ...]]:
        """A selector for these networks, and in which respect it is wider than they are."""
        if worldwide(nets):
            name = self._internet()
            return NamedNet(name), (f"net:{name}: addresses from all over were seen",)
        spec = NetworkSpec(tuple(nets))
        known = next((name for name, other in sorted(self._specs.items()) if other == spec), None)
        if known is not None:
            return NamedNet(known), ()
        if len(nets) == 1:
            return Cidr(nets[0]), ()
        label = "-".join(v for _, values in others[:1] for v in (values or ())[:2])
        stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in label).strip("._-") or "all"
        name = self._free(f"{'servers-of' if outward else 'clients-of'}-{stem}"[:50].rstrip("._-"))
        self._add(name, spec)
        return NamedNet(name), ()

    def _internet(self) -> str:
        spec = _spec_of_internet()
        for name, known in sorted(self._specs.items()):
            if name == "internet" or known == spec:
                return name
        self._add("internet", spec)
        return "internet"

    def _free(self, name: str) -> str:
        number, out = 1, name
        while out in self._specs:
            number += 1
            out = f"{name}-{number}"
        return out

    def _add(self, name: str, spec: NetworkSpec) -> None:
        self._specs[name] = spec
        self.made.append(NetworkDoc(name, spec))


def worldwide(nets: Sequence[IPNetwork]) -> bool:
    """Whether these are so many public addresses that only the Internet as a whole describes them."""
    public = [n for n in nets if n.is_global]
    return len(public) == len(nets) and (len(public) > MANY or any(n.prefixlen < 8 for n in public))


def _spec_of_internet() -> NetworkSpec:
    return NetworkSpec(
        (parse_cidr("0.0.0.0/0"), parse_cidr("::/0")), tuple(map(parse_cidr, (*_PRIVATE, *_PRIVATE6)))
    )
