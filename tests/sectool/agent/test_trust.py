"""Other trust domains and the Workload API of a running daemon, by the command line and the real `spiffe` client."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from sectool.identity.enrolment import enroll_host, init_ca
from sectool.spiffe.grpc import call
from sectool.spiffe.messages import FETCH_BUNDLES, X509BundlesResponse
from sectool.spiffe.workloadapi import REQUIRED

from .conftest import Host, until

pytestmark = pytest.mark.kernel

CLIENT = Path(__file__).parents[1] / "spiffe" / "client.py"


@pytest.fixture(scope="module")
def partner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle document of partner.example."""
    from sectool.agent.federation import export

    state = tmp_path_factory.mktemp("partner")
    init_ca(state, "partner.example")
    path = state / "partner.json"
    path.write_text(export(state, enroll_host(state, "gate", state / "ca")))
    return path


def now() -> str:
    """As `--at` takes it."""
    return f"{time.time():.6f}"


def domains(host: Host, *args: object) -> dict[str, Any]:
    return {row["trust_domain"]: row for row in host.json("trust", "list", *args)["items"]}


def test_a_domain_is_added_changed_and_removed_and_all_of_it_is_on_record(
    shared: Host, partner: Path
) -> None:
    before = now()
    shared.ok("trust", "add", "partner.example", "--bundle", partner, "--accept", "app", "-r", "the deal")
    shared.ok("trust", "add", "partner.example", "--accept", "tier=web")
    row = domains(shared)["partner.example"]
    assert (row["accept"], row["profile"], row["own"]) == ({"tier": ["web"]}, "file", False)
    assert shared.status()["trusted_domains"] == ["shop.example", "partner.example"]
    assert json.loads(shared.ok("trust", "export").out)["keys"][0]["use"] == "x509-svid"
    given = json.loads(partner.read_text())
    assert json.loads(shared.ok("trust", "export", "partner.example").out) == given
    assert shared.sectool("trust", "refresh", "partner.example").code == 2
    moment = now()
    shared.ok("trust", "remove", "partner.example", "-r", "over")
    assert list(domains(shared)) == ["shop.example"]
    past = domains(shared, "--at", moment)
    assert set(past) == {"shop.example", "partner.example"}
    assert past["partner.example"]["accept"] == {"tier": ["web"]}
    assert "partner.example" not in domains(shared, "--at", before)
    told = until(
        lambda: [
            e["data"]["reason"]
            for e in shared.json("events", "--type", "trust.changed")["items"]
            if e["data"]["reason"] in ("the deal", "over")
        ],
        "the events",
    )
    assert told == ["the deal", "over"]
    assert shared.sectool("trust", "add", "shop.example", "--bundle", partner).code != 0


def test_programs_get_the_svid_of_their_workload(shared: Host) -> None:
    """The label of `sectool run` decides, the socket is found by the environment, and policy is told of the SVID."""
    script = f"exec {sys.executable} {CLIENT} ${{SPIFFE_ENDPOINT_SOCKET#unix://}} svid"
    done = shared.ok("run", "--name", "shop", "--label", "app=web", "--", "sh", "-c", script)
    answer = json.loads(done.out)
    assert answer["id"] == "spiffe://shop.example/host/web-1/run/shop"
    assert answer["key_fits"] is True
    events = until(
        lambda: [
            e
            for e in shared.json("events", "--type", "identity.*")["items"]
            if e["data"].get("held_by") == "workload"
        ],
        "the event of its issue",
    )
    assert events[-1]["data"]["spiffe_id"] == answer["id"]


def test_a_new_bundle_reaches_the_programs_that_wait_for_it(shared: Host, partner: Path) -> None:
    socket = str(shared.run / "workload.sock")
    process = shared.popen(
        sys.executable, CLIENT, socket, "watch", stdout=subprocess.PIPE
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["domains"] == ["shop.example"]
        shared.ok("trust", "add", "partner.example", "--bundle", partner)
        assert json.loads(process.stdout.readline())["domains"] == ["partner.example", "shop.example"]
        process.kill()
    shared.ok("trust", "remove", "partner.example")


def test_a_list_of_what_is_revoked_reaches_the_programs_that_wait_for_it(shared: Host) -> None:
    async def two() -> list[list[bytes]]:
        found: list[list[bytes]] = []
        async for message in call(shared.run / "workload.sock", FETCH_BUNDLES, b"", dict([REQUIRED])):
            found.append(list(X509BundlesResponse.FromString(message).crl))
            if len(found) == 2:
                break
            revoke = ("identity", "revoke", "spiffe://shop.example/host/web-1/wl/stolen")
            await asyncio.to_thread(shared.ok, *revoke)
        return found

    before, after = asyncio.run(two())
    assert len(after) == len(before) + 1
    issued = [x509.load_der_x509_crl(der) for der in after]
    host = x509.load_pem_x509_certificate((shared.state / "host" / "host.crt").read_bytes())
    key = host.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert any(each.is_signature_valid(key) for each in issued)
