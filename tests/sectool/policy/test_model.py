"""Workload matching, and canonical documents."""

from __future__ import annotations

import pytest

from sectool.policy import parse

FACTS = {
    "systemd.unit": "nginx.service",
    "user": "www-data",
    "executable": "/usr/sbin/nginx",
    "sha256": "ab" * 32,
    "cgroup": "/system.slice/nginx.service",
}


@pytest.mark.parametrize(
    ("match", "matches"),
    [
        ("systemd.unit: nginx.service", True),
        ("systemd.unit: apache.service", False),
        ("user: www-data", True),
        ("user: www", False),
        ("executable: /usr/sbin/nginx", True),
        ("executable: /usr/sbin/*", True),
        ("executable: /usr/sbin", False),
        ("executable: /usr/bin/*", False),
        (f"sha256: {'AB' * 32}", True),
        (f"sha256: {'ab' * 31}ac", False),
        ("cgroup: /system.slice/*", True),
        ("cgroup: /user.slice/*", False),
        ("user: www-data, executable: /usr/sbin/nginx", True),
        ("user: www-data, executable: /usr/sbin/apache", False),
    ],
)
def test_workload_match(match: str, matches: bool) -> None:
    (workload,) = parse(f"kind: Workload\nname: w\nmatch: {{{match}}}\nlabels: {{app: web}}").workloads
    assert workload.matches(FACTS) == matches
    assert not workload.matches({})
