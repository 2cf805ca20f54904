"""What is valid and yet probably not meant, apart from what rules do to each other (sectool.policy.conflicts)."""

from __future__ import annotations

from sectool.policy.model import DocumentSet, Mode


def lint(documents: DocumentSet) -> list[str]:
    """What is valid and yet probably not meant."""
    notes: list[str] = []
    if not documents.policies and not documents.guardrails and not documents.network_policies:
        notes.append("there is no rule in this policy: every connection is denied")
    used = " ".join(
        str(r.sentence) for d in (*documents.policies, *documents.guardrails) for r in d.rules
    ).split()
    notes += [
        f"Network {doc.name} is used by no rule"
        for doc in documents.networks
        if f"net:{doc.name}" not in {word.strip(",") for word in used}
    ]
    notes += [
        f"{doc.kind} {doc.name} has no rules"
        for doc in (*documents.guardrails, *documents.policies)
        if not doc.rules
    ]
    return [*notes, *_open_namespaces(documents)]


def _open_namespaces(documents: DocumentSet) -> list[str]:
    """Namespaces that their first NetworkPolicy opens, since none isolates all their pods."""
    enforced = [doc for doc in documents.network_policies if doc.mode is not Mode.OFF]
    notes = []
    for namespace in sorted({doc.namespace for doc in enforced}):
        whole = [doc for doc in enforced if doc.namespace == namespace and not doc.selector]
        ways = [way for way in ("ingress", "egress") if all(getattr(doc, way) is None for doc in whole)]
        if ways:
            notes.append(
                f"pods of namespace {namespace} that no NetworkPolicy isolates are open for {' and '.join(ways)}, "
                "as in Kubernetes; one with podSelector: {} would isolate them"
            )
    return notes
