"""A peer's certificate and our two extensions in it: `read_profile`, `decode_labels`, `decode_constraints`.

Any bytes raise CredentialError or are read; an extension that is read is written with the same bytes.
"""

from __future__ import annotations

from contextlib import suppress

from sectool.errors import CredentialError, SectoolError
from sectool.identity.blob import unpack
from sectool.identity.extensions import (
    LabelConstraints,
    decode_constraints,
    decode_labels,
    encode_constraints,
    encode_labels,
)
from sectool.identity.profile import read_profile
from sectool.labels import LabelSet
from tests.fuzz.script import FLIP, Script, change
from tests.fuzz.world import hosts


def one(data: bytes) -> None:
    """A first byte: what the rest is (1, 2, 3: certificate, labels, constraints), or which certificate it changes."""
    script = Script(data)
    kind = script.below(256) % 5
    match kind:
        case 0 | 4:
            apart = unpack(hosts().web.blob)
            _certificate(script.changed(apart.host_der if kind else apart.leaf_der))
        case 1:
            _certificate(script.rest())
        case 2:
            value = script.rest()
            with suppress(CredentialError):
                labels = decode_labels(value)
                with suppress(SectoolError, ValueError):  # the alphabet is for LabelSet to check
                    assert encode_labels(LabelSet(labels)) == value
        case _:
            value = script.rest()
            with suppress(CredentialError):
                assert encode_constraints(decode_constraints(value)) == value


def _certificate(der: bytes) -> None:
    with suppress(CredentialError):
        profile = read_profile(der, "leaf")
        with suppress(CredentialError):
            assert profile.spiffe_id().trust_domain
        with suppress(CredentialError):
            profile.check_leaf()
        with suppress(CredentialError):
            profile.check_ca()
        with suppress(CredentialError):
            assert all(len(each) == 32 for each in profile.fingerprints())
        with suppress(CredentialError):
            assert profile.host_name()
        with suppress(CredentialError):
            profile.issued_by(profile)
        if profile.labels is not None:
            with suppress(CredentialError):
                decode_labels(profile.labels)
        if profile.constraints is not None:
            with suppress(CredentialError):
                decode_constraints(profile.constraints)


def seeds() -> dict[str, bytes]:
    """Genuine certificates, whole and changed, and extensions."""
    apart = unpack(hosts().web.blob)
    constraints = LabelConstraints({"*": ("*",), "env": ("dev", "test"), "zone": ("eu*",)}, "/host/web1/")
    out = {
        "leaf": b"\1" + apart.leaf_der,
        "host": b"\1" + apart.host_der,
        "labels": b"\2" + encode_labels(LabelSet({"app": "web", "env": "prod"})),
        "no-labels": b"\2\x0c\0",
        "constraints": b"\3" + encode_constraints(constraints),
        "long": b"\3" + encode_constraints(LabelConstraints({"app": [f"v{n}" for n in range(60)]}, "/a/")),
    }
    for kind, der in ((0, apart.leaf_der), (4, apart.host_der)):
        for at in range(0, 450, 30):
            out[f"flip-{kind}-{at}"] = bytes((kind, 1)) + change(FLIP, at, 0, size=len(der))
    return out
