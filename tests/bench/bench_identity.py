"""Costs of identity: sizes of blobs, issuing, verifying. Run: python tests/bench/bench_identity.py

Prints one line a number; each time is the best of several rounds, on one core, in microseconds.
"""

from __future__ import annotations

import tempfile
import timeit
import zlib
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.events import now_us
from sectool.identity.authority import HostAuthority, RootAuthority
from sectool.identity.blob import MAX_BLOB, compress, unpack
from sectool.identity.credential import Credential
from sectool.identity.extensions import LabelConstraints
from sectool.identity.profile import read_profile
from sectool.identity.trust import TrustBundle
from sectool.identity.verify import Verifier
from sectool.labels import LabelSet

KNOWN = LabelSet.parse(
    "app=web,env=prod,exe=nginx,region=eu-west-1,team=shop,tier=frontend,unit=nginx.service,user=www-data,"
    "version=2.14.3,vuln=none,zone=eu-west-1a"
)
UNKNOWN = LabelSet.parse(
    "app=checkout-api,cost=cc-4711,env=prod,exe=gunicorn,region=fsn1,team=payments,tier=edge,"
    "unit=checkout-api.service,user=svc-checkout,version=4.17.2-rc3,zone=fsn1-dc14"
)
ROUNDS = 7


def micros(work: Callable[[], object], number: int = 200) -> float:
    """Best time of one call, in microseconds."""
    return min(timeit.repeat(work, number=number, repeat=ROUNDS)) / number * 1e6


def main() -> None:
    now = now_us()
    with tempfile.TemporaryDirectory() as folder:
        root = RootAuthority.create(Path(folder) / "ca", "example.org", now)
    key = ec.generate_private_key(ec.SECP256R1())
    constraints = LabelConstraints({"*": ["*"], "env": ["prod"]}, "/host/web1/")
    host = HostAuthority(root.issue_host(key.public_key(), "web1", constraints, now), key, root.certificate)
    bundle = TrustBundle().with_root("example.org", root.certificate.public_bytes(Encoding.PEM).decode())

    def issue(labels: LabelSet = KNOWN, name: str = "shop") -> Credential:
        return host.issue(f"/host/web1/wl/{name}", labels, now)

    def sizes(labels: LabelSet) -> tuple[int, Credential]:
        some = [issue(labels) for _ in range(50)]
        return max(len(c.blob) for c in some), some[0]

    for text, labels in (
        ("no labels", LabelSet()),
        ("11 common labels", KNOWN),
        ("11 other labels", UNKNOWN),
    ):
        size, some = sizes(labels)
        plain = some.leaf_der + some.host_der
        print(
            f"blob, {text:17} {size:5d} bytes (limit {MAX_BLOB}; raw {len(plain) + 105},"
            f" zlib without dictionary {len(zlib.compress(plain, 9)) + 105})"
        )
    credential = issue()
    blob = credential.blob
    verifier = Verifier(bundle)

    def cold() -> None:
        verifier.forget()
        verifier.verify(blob, now)

    fresh = iter([issue().blob for _ in range(ROUNDS * 200)])
    warm = Verifier(bundle)
    garbage = blob[:-1] + bytes((blob[-1] ^ 0x55,))

    def refuse() -> None:
        try:
            verifier.verify(garbage, now)
        except Exception as error:
            assert error is not None

    print(f"issue an SVID          {micros(issue, 100):9.1f} us")
    print(f"verify, new host CA    {micros(cold):9.1f} us")
    print(f"verify, known host CA  {micros(lambda: warm.verify(next(fresh), now)):9.1f} us")
    verifier.verify(blob, now)
    print(f"verify, cached         {micros(lambda: verifier.verify(blob, now), 20_000):9.2f} us")
    print(f"refuse, cached         {micros(refuse, 20_000):9.2f} us")
    parts = unpack(blob)
    leaf, issuer = read_profile(parts.leaf_der, "leaf"), read_profile(parts.host_der, "host CA")
    print(f"  decompress           {micros(lambda: unpack(blob), 2000):9.1f} us")
    print(f"  read a certificate   {micros(lambda: read_profile(parts.leaf_der, 'leaf')):9.1f} us")
    print(f"  verify a certificate {micros(lambda: leaf.issued_by(issuer)):9.1f} us")
    print(
        f"  verify a delegation  {micros(lambda: parts.delegation.verify(leaf.public_key, parts.stream)):9.1f} us"
    )
    print(f"  compress             {micros(lambda: compress(parts.leaf_der, parts.host_der)):9.1f} us")


if __name__ == "__main__":
    main()
