"""SVIDs of another issuer: from a Workload API (our own server plays the SPIRE agent) to a credential that verifies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.clock import HOUR
from sectool.errors import CredentialError, SectoolError
from sectool.events import DropReason, now_us
from sectool.identity.credential import Credential
from sectool.identity.verify import Verifier, path_labels, path_rules
from sectool.identity.workload import Facts
from sectool.spiffe.messages import X509SVIDResponse, svid_response
from sectool.spiffe.spire import Spire, Taken, credential_of, read_answer
from sectool.spiffe.workloadapi import Caller, Source, Svid, WorkloadApi
from tests.sectool.identity.conftest import DOMAIN, NOW, Forge, uris

ID = f"spiffe://{DOMAIN}/ns/shop/web"
RULES = path_rules([(f"spiffe://{DOMAIN}/ns/shop/*", [("ns", "shop")]), (ID, [("app", "web")])])


def der(certificate: Any) -> bytes:
    return bytes(certificate.public_bytes(Encoding.DER))


def key_of(key: Any) -> bytes:
    return bytes(key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))


class Issuer(Forge):
    """Certificates as a SPIRE server below an upstream CA makes them: nothing of ours in them."""

    def __init__(self) -> None:
        super().__init__()
        self.host = self.sign_host(constraints=None, subject="SPIRE")
        self.leaf = self.sign_leaf(labels=None, issuer="SPIRE", san=uris(ID))

    def taken(self, **over: Any) -> Taken:
        chain = over.pop("chain", (self.leaf, self.host))
        values = {
            "spiffe_id": ID, "hint": "", "key": self.leaf_key, "roots": (der(self.root),), **over
        }  # fmt: skip
        return Taken(chain=tuple(map(der, chain)), **values)


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


def test_a_credential_of_a_foreign_svid_verifies_with_the_labels_of_its_path(issuer: Issuer) -> None:
    made = credential_of(issuer.taken(), path_labels(RULES)(_id()), NOW)
    peer = Verifier(issuer.bundle(), path_labels=path_labels(RULES)).verify(made.blob, NOW)
    assert peer == made.peer
    assert dict(peer.labels) == {"domain": DOMAIN, "ns": "shop", "app": "web"}
    assert made.not_after_us == NOW + HOUR
    assert NOW < made.renew_at_us < made.not_after_us
    assert Credential.from_wire(made.to_wire()).peer == peer


def _id() -> Any:
    from sectool.identity.spiffe import SpiffeId

    return SpiffeId.parse(ID)


def refused(taken: Taken, reason: DropReason, now: int = NOW) -> str:
    with pytest.raises(CredentialError) as caught:
        credential_of(taken, {}, now)
    assert caught.value.reason == reason
    return caught.value.message


def test_shapes_that_no_verifier_would_take_are_refused_with_their_reason(issuer: Issuer) -> None:
    direct = issuer.sign_leaf(labels=None, issuer="root", signer=issuer.root_key, san=uris(ID))
    assert "1 certificates" in refused(issuer.taken(chain=(direct,)), DropReason.UNTRUSTED_CHAIN)
    wide = issuer.sign_host(constraints=None, subject="SPIRE", path_length=None)
    refused(issuer.taken(chain=(issuer.leaf, wide)), DropReason.KEY_USAGE_INVALID)
    other = ec.generate_private_key(ec.SECP256R1())
    refused(issuer.taken(key=other), DropReason.DELEGATION_INVALID)
    refused(issuer.taken(spiffe_id=f"spiffe://{DOMAIN}/other"), DropReason.SPIFFE_ID_INVALID)
    refused(issuer.taken(roots=(der(Forge().root),)), DropReason.UNTRUSTED_CHAIN)
    refused(issuer.taken(), DropReason.CREDENTIAL_EXPIRED, NOW + 2 * HOUR)
    forged = issuer.sign_leaf(labels=None, issuer="SPIRE", signer=other, san=uris(ID))
    refused(issuer.taken(chain=(forged, issuer.host)), DropReason.UNTRUSTED_CHAIN)


def test_a_workload_is_named_by_hint_or_by_path(issuer: Issuer) -> None:
    assert issuer.taken().name == "web"
    assert issuer.taken(hint="shop-web").name == "shop-web"


def test_an_answer_is_read(issuer: Issuer) -> None:
    message = svid_response(
        ID, der(issuer.leaf) + der(issuer.host), key_of(issuer.leaf_key), der(issuer.root), {}
    )
    (taken,) = read_answer(message)
    assert taken.chain == (der(issuer.leaf), der(issuer.host))
    assert taken.roots == (der(issuer.root),)
    assert "PRIVATE" not in repr(taken)


@given(data=st.binary(max_size=300), field=st.sampled_from(["x509_svid", "x509_svid_key", "bundle", ""]))
@settings(max_examples=int(os.environ.get("SECTOOL_EXAMPLES", "80")), deadline=None)
def test_any_answer_is_read_or_refused(data: bytes, field: str) -> None:
    if field:
        answer = X509SVIDResponse()
        answer.svids.add(spiffe_id=ID, **{field: data})
        data = answer.SerializeToString()
    with contextlib.suppress(SectoolError):
        assert all(taken.spiffe_id is not None for taken in read_answer(data))


class Agent:
    """A Workload API that gives whoever asks one SVID of the issuer."""

    def __init__(self, issuer: Issuer, path: Path) -> None:
        self.leaf = issuer.leaf
        self.api = WorkloadApi(path, Source(self._attest, self._svid, self._bundles, lambda: DOMAIN), now_us)
        self._issuer = issuer

    async def _attest(self, caller: Caller) -> Facts:
        return Facts(caller.uid, "root", "/x", "", "/", "", caller.pid)

    def _svid(self, _: Facts) -> Svid:
        issuer = self._issuer
        return Svid(ID, der(self.leaf) + der(issuer.host), key_of(issuer.leaf_key), now_us() + HOUR)

    def _bundles(self) -> dict[str, bytes]:
        return {DOMAIN: der(self._issuer.root)}


@contextlib.asynccontextmanager
async def following(path: Path, told: list[str]) -> AsyncIterator[Spire]:
    spire = Spire(path, told.append, lambda _: 0.01)
    task = asyncio.create_task(spire.run())
    try:
        yield spire
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_svids_are_followed_across_renewals_and_ends_of_the_agent(issuer: Issuer) -> None:
    async def follow() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path, told = Path(folder) / "agent.sock", list[str]()
            async with following(path, told) as spire:
                await until(lambda: told)
                assert "nobody serves" in told[0]
                agent = Agent(issuer, path)
                await agent.api.start()
                await asyncio.wait_for(spire.heard.wait(), 30)
                assert spire.names() == ["web"]
                first = spire.of("web")
                agent.leaf = issuer.sign_leaf(labels=None, issuer="SPIRE", san=uris(ID))
                agent.api.changed()
                await until(lambda: spire.of("web") != first)
                await agent.api.close()
                await until(lambda: told[-1] != "")
                assert spire.of("web") is not None  # what has come stays until it expires
                assert spire.of("db") is None

    asyncio.run(follow())
