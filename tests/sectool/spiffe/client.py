"""The unmodified `spiffe` client of PyPI in a process of its own: what it gets, as JSON lines on stdout.

usage: client.py SOCKET svid|bundles|jwt|watch [USER-ID]
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from spiffe import WorkloadApiClient
from spiffe.errors import PySpiffeError
from spiffe.workloadapi.x509_context import X509Context


def tell(**fields: Any) -> None:
    """One line."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def context(found: X509Context) -> dict[str, Any]:
    """The SVID, and whose bundles came with it."""
    svid = found.default_svid
    return {
        "id": str(svid.spiffe_id),
        "chain": len(svid.cert_chain),
        "serial": f"{svid.leaf.serial_number:x}",
        "domains": sorted(bundle.trust_domain.name for bundle in found.x509_bundle_set.bundles),
    }


def main(socket: str, what: str, uid: str = "") -> None:
    """Ask once, or (watch) until killed, as that user."""
    if uid:
        os.setgroups([])
        os.setgid(int(uid))
        os.setuid(int(uid))
    with WorkloadApiClient(f"unix://{socket}") as client:
        try:
            if what == "svid":
                svid = client.fetch_x509_svid()
                same = svid.private_key.public_key() == svid.leaf.public_key()
                tell(id=str(svid.spiffe_id), chain=len(svid.cert_chain), key_fits=same)
            elif what == "bundles":
                bundles = client.fetch_x509_bundles().bundles
                tell(bundles={b.trust_domain.name: len(b.x509_authorities) for b in bundles})
            elif what == "jwt":
                client.fetch_jwt_svid({"audience"})
            else:
                client.stream_x509_contexts(lambda found: tell(**context(found)), _failed)
                threading.Event().wait()
        except PySpiffeError as error:
            tell(error=str(error))


def _failed(error: Exception) -> None:
    tell(error=str(error), thread=threading.current_thread().name)


if __name__ == "__main__":
    main(*sys.argv[1:])
