"""`sectool policy export --network-policy`: what it writes is taken by `policy check` and tells what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Cli = Callable[..., Any]


def test_what_can_be_said_and_what_not(inside: Cli, tmp_path: Path) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text(
        "kind: Policy\nname: shop\nowner: me\nrules:\n"
        "- allow k8s.ns=shop,k8s.label.app=web to call k8s.ns=shop,k8s.label.app=db on tcp/5432\n"
        "- deny k8s.ns=dev to call k8s.ns=shop\n"
    )
    done = inside("policy", "export", "--network-policy", file)
    assert done.code == 1
    assert (
        "shop.yaml:6:3: left out: deny k8s.ns=dev to call k8s.ns=shop: NetworkPolicies only allow" in done.err
    )
    written = tmp_path / "netpol.yaml"
    written.write_text(done.out)
    assert inside("policy", "test", written).code == 0
    flow = "k8s.ns=shop,k8s.label.app=web -> k8s.ns=shop,k8s.label.app=db tcp/{}"
    allowed = inside("explain", flow.format(5432), "-f", written)
    assert (allowed.code, "NetworkPolicy shop/shop-1, rule 1" in allowed.out) == (0, True)
    assert inside("explain", flow.format(22), "-f", written).code == 1
    assert inside("policy", "export", file).code == 2
