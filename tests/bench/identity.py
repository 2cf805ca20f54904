"""Costs of identity: size of credentials, issuing, verifying, and the time from a workload's start to its identity.

`./dev bench identity`. One host CA with constraints, one thread. The common labels are in the compression dictionary,
the others are not.
"""

from __future__ import annotations

import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.errors import CredentialError
from sectool.identity.authority import HostAuthority, RootAuthority
from sectool.identity.credential import Credential
from sectool.identity.extensions import LabelConstraints
from sectool.identity.trust import TrustBundle
from sectool.identity.verify import Verifier
from sectool.labels import LabelSet
from tests.bench.rows import Row, row
from tests.bench.starting import alone, together

NOW = 1_780_000_000_000_000
CREDENTIALS = 200
CACHED = 20_000
AT_ONCE = 500
ALONE = 100
LABELS = {
    "no labels": LabelSet(),
    "11 common labels": LabelSet.parse(
        "app=web,env=prod,exe=nginx,region=eu-west-1,team=shop,tier=frontend,unit=nginx.service,user=www-data,"
        "version=2.14.3,vuln=none,zone=eu-west-1a"
    ),
    "11 other labels": LabelSet.parse(
        "app=checkout-api,cost=cc-4711,env=prod,exe=gunicorn,region=fsn1,team=payments,tier=edge,"
        "unit=checkout-api.service,user=svc-checkout,version=4.17.2-rc3,zone=fsn1-dc14"
    ),
}


def _micros(work: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - begin) / calls * 1e6


def _pki() -> tuple[HostAuthority, TrustBundle]:
    with tempfile.TemporaryDirectory() as folder:
        root = RootAuthority.create(Path(folder) / "ca", "example.org", NOW)
    key = ec.generate_private_key(ec.SECP256R1())
    constraints = LabelConstraints({"*": ["*"], "env": ["prod"]}, "/host/web1/")
    host = HostAuthority(root.issue_host(key.public_key(), "web1", constraints, NOW), key, root.certificate)
    pem = root.certificate.public_bytes(Encoding.PEM).decode("ascii")
    return host, TrustBundle().with_root("example.org", pem)


def _issue(host: HostAuthority, labels: LabelSet) -> list[Credential]:
    return [host.issue("/host/web1/wl/shop", labels, NOW) for _ in range(CREDENTIALS)]


def measure() -> dict[tuple[str, str, str], float]:
    """One round: (case, metric, unit) -> value."""
    host, bundle = _pki()
    out: dict[tuple[str, str, str], float] = {}
    issued: list[Credential] = []
    for case, labels in LABELS.items():
        begin, cpu = time.perf_counter(), time.process_time()
        issued = _issue(host, labels)
        out[case, "issue", "µs"] = (time.perf_counter() - begin) / CREDENTIALS * 1e6
        out[case, "issue, processor time", "µs"] = (time.process_time() - cpu) / CREDENTIALS * 1e6
        plain = issued[0].leaf_der + issued[0].host_der
        around = len(issued[0].blob) - len(issued[0].blob[105:])  # version and delegation
        out[case, "blob", "bytes"] = max(len(credential.blob) for credential in issued)
        out[case, "blob without dictionary", "bytes"] = around + len(zlib.compress(plain, 9))
        out[case, "blob not compressed", "bytes"] = around + len(plain)
    case = "11 other labels"
    out[case, "issue, sustained", "SVIDs/s"] = 1e6 / out[case, "issue", "µs"]
    verifier = Verifier(bundle)
    blobs = iter([credential.blob for credential in issued])
    out[case, "verify, known host CA", "µs"] = _micros(lambda: verifier.verify(next(blobs), NOW), CREDENTIALS)
    blob = issued[0].blob

    def anew() -> None:
        verifier.forget()
        verifier.verify(blob, NOW)

    out[case, "verify, new host CA", "µs"] = _micros(anew, CREDENTIALS)
    out[case, "verify, cached", "µs"] = _micros(lambda: verifier.verify(blob, NOW), CACHED)
    garbage = blob[:-1] + bytes((blob[-1] ^ 0x55,))

    def refuse() -> None:
        try:
            verifier.verify(garbage, NOW)
        except CredentialError:
            return
        raise AssertionError("a damaged credential was accepted")

    out[case, "refuse, cached", "µs"] = _micros(refuse, CACHED)
    spawned, known, cpu = together(host, AT_ONCE)
    case = f"{AT_ONCE} workloads at once"
    out[case, "all started", "ms"] = spawned * 1e3
    out[case, "all have their identity", "ms"] = known * 1e3
    out[case, "processor time of all identities", "ms"] = cpu * 1e3
    times = alone(host, ALONE)
    case = f"{ALONE} workloads one by one"
    out[case, "start to identity, median", "ms"] = times[len(times) // 2] * 1e3
    out[case, "start to identity, 99th percentile", "ms"] = times[int(len(times) * 0.99)] * 1e3
    return out


def rows(rounds: int) -> list[Row]:
    """Sizes and times of credentials."""
    measured = [measure() for _ in range(rounds)]
    return [row("identity", *key, [one[key] for one in measured]) for key in measured[0]]
