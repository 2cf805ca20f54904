"""The credential blob: `unpack`, and all that `Verifier.verify` does with it.

Any bytes raise CredentialError or are taken apart into no more than MAX_INFLATED bytes; only what the CA's chain and
the leaf's key have signed is an identity.
"""

from __future__ import annotations

from nfq.handshake import MAX_BLOB as ROOM
from sectool.errors import CredentialError
from sectool.events import DropReason
from sectool.identity.blob import MAX_BLOB, MAX_INFLATED, Delegation, compress, pack, unpack
from sectool.identity.verify import Verifier
from tests.fuzz.script import FLIP, Script, change
from tests.fuzz.world import NOW_US, hosts

_HEAD = 105


def one(data: bytes) -> None:
    """A first byte: the rest is the blob (1), changes a genuine one (0), or its certificates before deflating (2)."""
    script = Script(data)
    genuine = hosts().web.blob
    match script.below(256) % 3:
        case 0:
            blob = script.changed(genuine)
        case 1:
            blob = script.rest()
        case _:
            apart = unpack(genuine)
            leaf, host = script.changed(apart.leaf_der), script.changed(apart.host_der)
            if len(leaf) > 0xFFFF:
                return
            blob = pack(apart.delegation, compress(leaf, host))
    try:
        found = unpack(blob)
        assert len(blob) <= MAX_BLOB
        assert 2 + len(found.leaf_der) + len(found.host_der) <= MAX_INFLATED
        assert found.leaf_der
        assert found.host_der
        assert pack(found.delegation, found.stream) == blob
    except CredentialError as e:
        assert blob != genuine
        assert DropReason(e.reason) is not DropReason.NONE
    verifier = hosts().verifier
    try:
        peer = verifier.verify(blob, NOW_US)
    except CredentialError as e:
        assert blob != genuine
        assert DropReason(e.reason) is not DropReason.NONE
    else:
        assert blob == genuine, "a credential was believed that nobody issued"
        assert peer.x25519 == blob[1:33]
    _bounded(verifier)


def _bounded(verifier: Verifier) -> None:
    good, refused = verifier.cached
    assert good <= 16
    assert refused <= 4096


def seeds() -> dict[str, bytes]:
    """A genuine blob, whole and changed, and one that inflates without end."""
    genuine = hosts().web.blob
    assert len(genuine) <= ROOM
    apart = unpack(genuine)
    bomb = pack(Delegation(bytes(32), 1 << 40, bytes(64)), compress(bytes(60_000), bytes(60_000)))
    out = {"raw": b"\1" + genuine, "genuine": b"\0\0", "bomb": b"\1" + bomb, "short": b"\1" + genuine[:_HEAD]}
    for at in (0, 1, 33, 41, 104, 105, 200, 300):
        out[f"flip-{at}"] = b"\0\1" + change(FLIP, at, 0, size=len(genuine))
    for at in range(0, 400, 40):
        out[f"leaf-{at}"] = b"\2\1" + change(FLIP, at, 0, size=len(apart.leaf_der)) + b"\0"
    for at in range(0, 400, 40):
        out[f"host-{at}"] = b"\2\0\1" + change(FLIP, at, 0, size=len(apart.host_der))
    return out
