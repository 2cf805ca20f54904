"""Which cloud this host runs in, and where: asked of the metadata service at 169.254.169.254, and of nobody else.

    AWS     PUT /latest/api/token, then GET /latest/dynamic/instance-identity/document with it (IMDSv2; never without)
    GCP     GET /computeMetadata/v1/instance/?recursive=true, Metadata-Flavor: Google both ways
    Azure   GET /metadata/instance?api-version=2021-02-01, Metadata: true

Sources: AWS EC2 user guide, "Use IMDSv2"; Google Cloud, "About VM metadata"; Microsoft Learn, "Azure Instance Metadata
Service". The address is link-local: no router passes it on, so who answers is the hypervisor, or somebody on our own
link. Plain HTTP it is everywhere; what is learnt here makes labels of the weakest origin.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sectool.errors import SectoolError
from sectool.httpget import Response, fetch
from sectool.identity.workload import label_value

BASE: Final = "http://169.254.169.254"
TIMEOUT_S: Final = 0.5  # of one question; there are four at most
MAX_BODY: Final = 256 * 1024
_TOKEN: Final = re.compile(r"[A-Za-z0-9+/=_-]{1,512}")

Get = Callable[[str, str, Mapping[str, str]], Response]  # method, path, headers


@dataclass(frozen=True, slots=True)
class Place:
    """Where an instance stands; texts are '' where nobody said."""

    cloud: str  # aws, gcp or azure
    region: str = ""
    zone: str = ""
    instance: str = ""
    kind: str = ""  # machine type

    def labels(self) -> dict[str, str]:
        """As labels; what has no value is left out."""
        found = {
            "cloud": self.cloud,
            "region": self.region,
            "zone": self.zone,
            "instance": self.instance,
        }
        return {key: value for key, text in found.items() if (value := label_value(text))}


class _SilentError(SectoolError):
    """Nobody is there: no need to ask in another way."""


def ask(get: Get | None = None) -> Place | None:
    """Where this host stands; None when no metadata service says so. Blocks for two seconds at most."""
    get = get or _get
    for probe in (_aws, _gcp, _azure):
        try:
            place = probe(get)
        except _SilentError:
            return None
        except SectoolError:
            continue  # something answers, but not this cloud's way
        if place is not None:
            return place
    return None


def _get(method: str, path: str, headers: Mapping[str, str]) -> Response:
    return fetch(BASE + path, timeout_s=TIMEOUT_S, limit=MAX_BODY, method=method, headers=headers)


def _aws(get: Get) -> Place | None:
    try:
        answer = get("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    except SectoolError as error:
        raise _SilentError(error.message) from None
    token = answer.body.decode("ascii", "replace").strip()
    if answer.status != 200 or not _TOKEN.fullmatch(token):
        return None
    answer = get("GET", "/latest/dynamic/instance-identity/document", {"X-aws-ec2-metadata-token": token})
    found = _json(answer)
    if found is None or "availabilityZone" not in found:
        return None
    zone, region, name, kind = (
        _text(found, key) for key in ("availabilityZone", "region", "instanceId", "instanceType")
    )
    return Place("aws", region, zone, name, kind)


def _gcp(get: Get) -> Place | None:
    answer = get("GET", "/computeMetadata/v1/instance/?recursive=true", {"Metadata-Flavor": "Google"})
    found = _json(answer)
    if found is None or answer.headers.get("metadata-flavor") != "Google":
        return None
    zone = _text(found, "zone").rpartition("/")[2]
    region = zone.rpartition("-")[0]
    return Place("gcp", region, zone, _text(found, "id"), _text(found, "machineType").rpartition("/")[2])


def _azure(get: Get) -> Place | None:
    found = _json(get("GET", "/metadata/instance?api-version=2021-02-01", {"Metadata": "true"}))
    compute = found.get("compute") if found is not None else None
    if not isinstance(compute, dict) or not _text(compute, "location"):
        return None
    region, number = _text(compute, "location"), _text(compute, "zone")
    zone = f"{region}-{number}" if number else ""
    return Place("azure", region, zone, _text(compute, "vmId"), _text(compute, "vmSize"))


def _json(answer: Response) -> dict[str, Any] | None:
    if answer.status != 200:
        return None
    try:
        found = json.loads(answer.body.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _text(found: Mapping[str, Any], key: str) -> str:
    """A string, or a number as one; whatever else is there counts as nothing."""
    value = found.get(key)
    if isinstance(value, str):
        return value[:128]
    return str(value)[:128] if isinstance(value, int) and abs(value) < 1 << 64 else ""
