"""Policy: documents, the rule sentence, the engine that decides, and what explains, compares and tests it.

Names are imported when first used: reading documents does not load the engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sectool.policy.changes import Change, diff
    from sectool.policy.documents import load, parse
    from sectool.policy.engine import Decision, Engine
    from sectool.policy.explanation import Explanation, explain
    from sectool.policy.flow import FlowSpec, parse_flow
    from sectool.policy.model import (
        DocumentSet,
        Mode,
        NetworkDoc,
        PolicyDoc,
        TestDoc,
        WorkloadDoc,
    )
    from sectool.policy.request import Party, Request
    from sectool.policy.rules import Rule
    from sectool.policy.sentence import Sentence, parse_sentence
    from sectool.policy.testing import TestResult, run_tests

_HOME = {
    "Change": "changes",
    "Decision": "engine",
    "DocumentSet": "model",
    "Engine": "engine",
    "Explanation": "explanation",
    "FlowSpec": "flow",
    "Mode": "model",
    "NetworkDoc": "model",
    "Party": "request",
    "PolicyDoc": "model",
    "Request": "request",
    "Rule": "rules",
    "Sentence": "sentence",
    "TestDoc": "model",
    "TestResult": "testing",
    "WorkloadDoc": "model",
    "diff": "changes",
    "explain": "explanation",
    "load": "documents",
    "parse": "documents",
    "parse_flow": "flow",
    "parse_sentence": "sentence",
    "run_tests": "testing",
}

__all__ = [
    "Change",
    "Decision",
    "DocumentSet",
    "Engine",
    "Explanation",
    "FlowSpec",
    "Mode",
    "NetworkDoc",
    "Party",
    "PolicyDoc",
    "Request",
    "Rule",
    "Sentence",
    "TestDoc",
    "TestResult",
    "WorkloadDoc",
    "diff",
    "explain",
    "load",
    "parse",
    "parse_flow",
    "parse_sentence",
    "run_tests",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
