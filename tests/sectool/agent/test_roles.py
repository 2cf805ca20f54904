"""Roles: which change takes which, who holds one by the kernel's word, and refusals that name the group."""

from __future__ import annotations

import grp
import pwd
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sectool.agent import roles
from sectool.agent.roles import held, needs, permit
from sectool.agent.settings import parse_settings
from sectool.api.server import Peer
from sectool.errors import DocumentError, PrivilegeError
from sectool.policy import parse
from tests.preloaded import Done

from .conftest import POLICY, Host, until

POLICIES = """kind: Policy
name: shop
owner: team-shop
rules: [allow app=web to call net:shop]
---
kind: Policy
name: pay
owner: team-pay
rules: [allow app=pay to call app=db]
---
kind: Network
name: shop
owner: team-shop
cidrs: [10.0.0.0/8]
---
"""
GUARDRAIL = "kind: Guardrail\nname: box\nowner: security\nrules: [deny env=dev to call net:shop]\n---\n"
WORKLOAD = "kind: Workload\nname: w\nowner: team-shop\nmatch: {user: shop}\nlabels: {app: web}\n---\n"
TEST = "kind: Test\nname: t\nallow: ['app=web -> app=db tcp/1']\n---\n"
PODS = """apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: open, namespace: shop}
spec: {podSelector: {}, ingress: [{}]}
---
"""
LAN = "kind: Network\nname: lan\ncidrs: [192.168.0.0/16]\n---\n"


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        (POLICIES, POLICIES, set()),
        (POLICIES, POLICIES.replace("app=web", "app=api"), {"team-shop"}),
        ("", POLICIES, {"team-shop", "team-pay"}),
        (POLICIES, "", {"team-shop", "team-pay"}),
        (POLICIES, POLICIES.replace("owner: team-pay", "owner: team-shop"), {"team-shop", "team-pay"}),
        (POLICIES, POLICIES.replace("10.0.0.0/8", "10.1.0.0/16"), {"team-shop"}),
        # A network that a guardrail speaks of moves the guardrail; taking the guardrail away with it does not help.
        (POLICIES + GUARDRAIL, POLICIES.replace("10.0.0.0/8", "10.1.0.0/16") + GUARDRAIL, {"security"}),
        (POLICIES + GUARDRAIL, POLICIES.replace("10.0.0.0/8", "10.1.0.0/16"), {"security"}),
        (POLICIES, POLICIES + GUARDRAIL, {"security"}),
        (POLICIES, POLICIES + WORKLOAD, {"security"}),
        (POLICIES, POLICIES + LAN, {"security"}),
        (POLICIES, POLICIES + PODS, {"security"}),
        (POLICIES, POLICIES + TEST, set()),
        (
            POLICIES,
            POLICIES.replace("kind: Policy\nname: pay", "kind: Policy\nname: pay\nmode: off"),
            {"team-pay"},
        ),
    ],
)
def test_what_a_change_takes(before: str, after: str, wanted: set[str]) -> None:
    assert {need.role for need in needs(parse(before), parse(after))} == wanted


def peer(*groups: str) -> Peer:
    numbers = [grp.getgrnam(name).gr_gid for name in groups]
    return Peer(1, 4_000_000, numbers[0] if numbers else 4_000_000, tuple(numbers[1:]))


ROLES = {"security": ("daemon", "no-such-group"), "team-shop": ("bin", "sys"), "team-pay": ("adm",)}


def test_roles_are_held_through_groups() -> None:
    assert held(peer("bin"), ROLES) == ("team-shop",)
    assert held(peer("mail", "sys", "daemon"), ROLES) == ("security", "team-shop")
    assert held(peer(), ROLES) == ()
    assert held(Peer(1, 0, 4_000_000), ROLES) == (roles.ROOT,)


def test_a_change_of_one_s_own_is_permitted_and_the_role_recorded() -> None:
    before, after = parse(POLICIES), parse(POLICIES.replace("app=web", "app=api"))
    assert permit(peer("bin", "daemon"), ROLES, before, after) == ("team-shop",)
    assert permit(Peer(1, 0, 0), {}, before, after) == ("root",)
    # what any role may do is recorded with all of one's roles
    assert permit(peer("bin"), ROLES, before, parse(POLICIES + TEST)) == ("team-shop",)


@pytest.mark.parametrize(
    ("groups", "after", "says", "hint"),
    [
        ((), POLICIES + GUARDRAIL, "holds no role", "daemon, no-such-group, bin, sys, adm"),
        (
            ("bin",),
            POLICIES + GUARDRAIL,
            "(team-shop) may not change Guardrail box (owner security)",
            "role security needs group daemon or no-such-group",
        ),
        (
            ("adm",),
            POLICIES.replace("app=web", "app=api"),
            "may not change Policy shop",
            "needs group bin or sys",
        ),
        (
            ("bin",),
            POLICIES + POLICIES.replace("name: ", "name: x").replace("team-pay", "team-x"),
            "may not change Policy xpay (owner team-x)",
            "role team-x is held by no group",
        ),
    ],
)
def test_refusals_name_the_document_and_the_group(
    groups: tuple[str, ...], after: str, says: str, hint: str
) -> None:
    with pytest.raises(PrivilegeError) as caught:
        permit(peer(*groups), ROLES, parse(POLICIES), parse(after))
    assert says in caught.value.message
    assert hint in caught.value.hint


def test_without_any_role_only_root_may() -> None:
    with pytest.raises(PrivilegeError) as caught:
        permit(peer("bin"), {}, parse(""), parse(POLICIES))
    assert "setting `roles`" in caught.value.hint


def test_the_setting() -> None:
    assert parse_settings("roles: {security: [secops], shop: [a, b]}").roles == {
        "security": ("secops",),
        "shop": ("a", "b"),
    }
    for text in ("roles: [a]", "roles: {a: b}", "roles: {a: []}", "roles: {a: [1]}", "roles: {root: [a]}"):
        with pytest.raises(DocumentError) as caught:
            parse_settings(text)
        assert caught.value.where == "sectool.yaml:1:8"


@pytest.fixture
def reachable(tmp_path: Path) -> Iterator[Host]:
    """A running host whose folders an unprivileged user can reach."""
    from .conftest import make, remove

    folder = Path(f"/var/tmp/st-{secrets.token_hex(4)}")
    folder.mkdir()
    made = make(folder)
    (made.state / "sectool.yaml").write_text("socket_group: nogroup\nroles: {team-shop: [nogroup]}\n")
    made.ok("up", "--background")
    yield made
    remove(made)
    shutil.rmtree(folder)


@pytest.mark.kernel
def test_a_member_of_a_team_applies_its_own_documents_and_no_others(reachable: Host) -> None:
    nobody = pwd.getpwnam("nobody")

    def apply(text: str, *args: str) -> Done:
        path = reachable.folder / "mine.yaml"
        path.write_text(text)
        python = "import os,sys; from sectool.cli.main import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", python, "policy", "apply", str(path), *args],
            capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[3],
            env=reachable.environment, user=nobody.pw_uid, group=grp.getgrnam("nogroup").gr_gid, extra_groups=[],
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    done = apply(POLICY, "--reason", "ours")
    assert done.code == 0, done
    (first, *_) = reachable.json("policy", "history")["items"]
    assert (first["author"], first["roles"], first["reason"]) == ("nobody", ["team-shop"], "ours")
    done = apply(POLICY + "---\n" + GUARDRAIL.replace("net:shop", "env=prod"))
    assert done.code == 2
    assert "may not change Guardrail box (owner security)" in done.err
    assert "role security is held by no group" in done.err
    done = apply(POLICY + "---\n" + GUARDRAIL.replace("net:shop", "env=prod"), "--dry-run")
    assert done.code == 0
    assert "you may not do this" in done.err
    assert len(reachable.json("policy", "history")["items"]) == 1
    events = until(
        lambda: reachable.json("events", "--type", "policy.applied")["items"], "the change is on record"
    )
    assert events[0]["data"]["roles"] == ["team-shop"]
