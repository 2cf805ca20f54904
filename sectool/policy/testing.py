"""Runs the Test documents of a set: policies are tested like code, by the code that enforces them."""

from __future__ import annotations

from dataclasses import dataclass

from sectool.errors import UsageError
from sectool.events import Action, DropReason, now_us
from sectool.policy.engine import Decision, Engine
from sectool.policy.model import DocumentSet, Expectation, Mode, PolicyDoc


@dataclass(frozen=True, slots=True)
class TestResult:
    """The outcome of one line of a Test. `message` says what happened, also when it passed."""

    test: str
    text: str
    where: str
    passed: bool
    message: str
    decision: Decision | None
    allow: bool = True  # what was expected

    __test__ = False

    def lines(self) -> list[str]:
        """For people: one line when passed, else with the rule and the place."""
        if self.passed:
            return [f"ok    {self.test}: {self.text}"]
        return [f"FAIL  {self.test}: {self.text}", f"      at {self.where}: {self.message}"]


def run_tests(documents: DocumentSet, at_us: int | None = None) -> list[TestResult]:
    """Every line of every Test that is not off, in order. `at_us`: the moment to test, default now."""
    moment = now_us() if at_us is None else at_us
    enforced = Engine(documents)
    staged: Engine | None = None
    networks = {doc.name: doc.spec for doc in documents.networks}
    out: list[TestResult] = []
    for test in documents.tests:
        if test.mode is Mode.OFF:
            continue
        engine = enforced
        if test.mode is Mode.STAGE:
            staged = staged or Engine(as_if_enforced(documents))
            engine = staged
        for line in test.expectations:
            try:
                decision = engine.decide(line.flow.request(networks), moment)
            except UsageError as error:
                out.append(TestResult(test.name, line.text, line.where, False, str(error), None, line.allow))
                continue
            problem = _problem(line, decision)
            out.append(
                TestResult(
                    test.name,
                    line.text,
                    line.where,
                    not problem,
                    problem or _outcome(decision),
                    decision,
                    line.allow,
                )
            )
    return out


def as_if_enforced(documents: DocumentSet) -> DocumentSet:
    """The same set with every staged Policy and Guardrail enforced."""
    from dataclasses import replace

    def enforced(docs: tuple[PolicyDoc, ...]) -> tuple[PolicyDoc, ...]:
        return tuple(replace(d, mode=Mode.ENFORCE) if d.mode is Mode.STAGE else d for d in docs)

    return replace(
        documents,
        policies=enforced(documents.policies),
        guardrails=enforced(documents.guardrails),
        network_policies=tuple(
            replace(d, mode=Mode.ENFORCE) if d.mode is Mode.STAGE else d for d in documents.network_policies
        ),
    )


def _problem(line: Expectation, decision: Decision) -> str:
    denied = decision.action is Action.DENY
    if line.allow and denied:
        return f"must be allowed, but is {_outcome(decision)}"
    if not line.allow and not denied:
        return f"must be denied, but is {_outcome(decision)}"
    if line.flow.encrypted and not decision.encrypt:
        return f"must be encrypted, but is {_outcome(decision)} without encryption"
    return ""


def _outcome(decision: Decision) -> str:
    word = {Action.ALLOW: "allowed", Action.AUDIT: "let through for audit"}.get(decision.action, "denied")
    if decision.reason is DropReason.ENCRYPTION_UNAVAILABLE:
        word = "denied for lack of encryption"
    if decision.rule is None:
        return f"{word} by default"
    return f"{word} by {decision.rule.title}: {decision.rule.text}"
