"""Who may change which policy documents: roles, held by unix groups of this host.

    security            Guardrails, Workloads, documents without an owner, Networks that a Guardrail speaks of
    any other role      documents whose `owner` is the role's name

A role is held by the groups that the setting `roles` names for it, and by whoever is in them by the kernel's word
(SO_PEERCRED, SO_PEERGROUPS): a group joined after logging in counts from the next login. Root holds every role. To give
a document to another owner takes the roles of both.
"""

from __future__ import annotations

import grp
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from sectool.api.server import Peer
from sectool.errors import PrivilegeError
from sectool.policy import DocumentSet, NetworkDoc, PolicyDoc, TestDoc, WorkloadDoc
from sectool.policy.model import Document, DocumentKind, canonical_document
from sectool.policy.selector import NamedNet

SECURITY: Final = "security"
ROOT: Final = "root"
MAX_TOLD: Final = 5

Roles = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Need:
    """A change of a document, and the role it takes."""

    document: Document
    role: str

    def __str__(self) -> str:
        owner = f" (owner {self.document.owner})" if self.document.owner else ""
        return f"{self.document.kind} {self.document.name}{owner}"


def needs(before: DocumentSet, after: DocumentSet) -> list[Need]:
    """What a change from one set to another takes, in the order of documents."""
    old = {(d.kind, d.name): d for d in before.documents()}
    new = {(d.kind, d.name): d for d in after.documents()}
    boxed = _networks_of_guardrails(before) | _networks_of_guardrails(after)
    out: list[Need] = []
    for key in dict.fromkeys((*new, *old)):
        was, now = old.get(key), new.get(key)
        if was is not None and now is not None and canonical_document(was) == canonical_document(now):
            continue
        for document in (was, now):
            if document is not None:
                role = _role(document, boxed)
                if role and all(need.role != role or need.document.name != document.name for need in out):
                    out.append(Need(document, role))
    return out


def _networks_of_guardrails(documents: DocumentSet) -> set[str]:
    return {
        side.name
        for doc in documents.guardrails
        for rule in doc.rules
        for side in (rule.sentence.source, rule.sentence.destination)
        if isinstance(side, NamedNet)
    }


def _role(document: Document, boxed: set[str]) -> str:
    """The role it takes to change a document; "": any role will do."""
    if isinstance(document, PolicyDoc) and document.kind is DocumentKind.POLICY:
        return document.owner  # it has to have one
    if isinstance(document, (PolicyDoc, WorkloadDoc)):
        return SECURITY  # who labels processes says who they are
    if isinstance(document, TestDoc):
        return document.owner
    if isinstance(document, NetworkDoc) and document.name in boxed:
        return SECURITY
    return document.owner or SECURITY


def held(peer: Peer, roles: Roles) -> tuple[str, ...]:
    """The roles of whoever asks, in order."""
    if peer.uid == 0:
        return (ROOT,)
    ids = {peer.gid, *peer.groups}
    return tuple(sorted(role for role, groups in roles.items() if ids & _numbers(groups)))


def _numbers(groups: Iterable[str]) -> set[int]:
    out = set()
    for name in groups:
        try:
            out.add(grp.getgrnam(name).gr_gid)
        except KeyError:
            continue  # a group that this host does not have has no members
    return out


def present(peer: Peer, roles: Roles) -> tuple[str, ...]:
    """The roles of whoever asks. Raises PrivilegeError when there are none: then nothing else is looked at."""
    mine = held(peer, roles)
    if not mine:
        raise PrivilegeError(
            f"{peer.name} holds no role, so {peer.name} may not change policy",
            f"run it with sudo, or join one of these groups and log in again: {_all(roles)}"
            if roles
            else "run it with sudo; the setting `roles` in sectool.yaml gives roles to groups",
        )
    return mine


def permit(peer: Peer, roles: Roles, before: DocumentSet, after: DocumentSet) -> tuple[str, ...]:
    """The roles that a change used, for the record. Raises PrivilegeError that says which group is missing."""
    mine = present(peer, roles)
    if ROOT in mine:
        return mine
    wanted = needs(before, after)
    missing = [need for need in wanted if need.role not in mine]
    if missing:
        told = ", ".join(map(str, missing[:MAX_TOLD]))
        more = f" and {len(missing) - MAX_TOLD} more" if len(missing) > MAX_TOLD else ""
        raise PrivilegeError(
            f"{peer.name} ({', '.join(mine)}) may not change {told}{more}",
            "; ".join(_way(role, roles) for role in dict.fromkeys(need.role for need in missing)),
        )
    return tuple(sorted({need.role for need in wanted})) or mine


def _way(role: str, roles: Roles) -> str:
    groups = roles.get(role, ())
    if not groups:
        return f"role {role} is held by no group (setting `roles` in sectool.yaml): ask root"
    return f"role {role} needs group {' or '.join(groups)}"


def _all(roles: Roles) -> str:
    return ", ".join(dict.fromkeys(group for groups in roles.values() for group in groups))
