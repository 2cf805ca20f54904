"""What is valid and yet probably not meant, apart from what rules do to each other (sectool.policy.conflicts)."""

from __future__ import annotations

from sectool.policy.model import DocumentSet


def lint(documents: DocumentSet) -> list[str]:
    """What is valid and yet probably not meant."""
    notes: list[str] = []
    if not documents.policies and not documents.guardrails:
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
    return notes
