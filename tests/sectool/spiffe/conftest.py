"""A trust domain with one host, made by the product itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.events import now_us
from sectool.identity.bundle import SpiffeBundle, of_roots
from sectool.identity.enrolment import HostIdentity, enroll_host, init_ca
from sectool.identity.profile import Profile


@dataclass(frozen=True)
class Domain:
    """One trust domain as its only host sees it."""

    state: Path
    host: HostIdentity

    @property
    def roots(self) -> tuple[Profile, ...]:
        return self.host.bundle.roots[self.host.trust_domain]

    @property
    def bundle(self) -> SpiffeBundle:
        return of_roots(self.host.trust_domain, self.roots, 7)

    @property
    def root_pem(self) -> bytes:
        return self.roots[0].certificate.public_bytes(Encoding.PEM)


@pytest.fixture(scope="session")
def make_domain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Domain]:
    made: dict[str, Domain] = {}

    def make(name: str) -> Domain:
        if name not in made:
            state = tmp_path_factory.mktemp("domain")
            init_ca(state, name, now_us=now_us())
            made[name] = Domain(state, enroll_host(state, "gate-1", state / "ca"))
        return made[name]

    return make


@pytest.fixture(scope="session")
def domain(make_domain: Callable[[str], Domain]) -> Domain:
    return make_domain("partner.example")
