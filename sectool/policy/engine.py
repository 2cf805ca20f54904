"""The one place that decides.

Evaluation, in this order; the first step that ends it decides:

  1. A guardrail denies                    -> denied (GUARDRAIL_DENY).
  2. A guardrail requires encryption       -> noted.
  3. An intent denies                      -> denied (INTENT_DENY).
  4. An intent allows (or NetworkPolicies) -> allowed; encrypted if any allowing intent, or step 2, says so;
                                              denied (ENCRYPTION_UNAVAILABLE) if so and the two ends cannot.
  5. An intent audits                      -> let through and marked (AUDIT); encryption as in step 4.
                                              Reached only by what would otherwise be denied by default, so it
                                              weakens nothing above.
  6. Nothing of the kind                   -> denied (DEFAULT_DENY).

Inside a step the first rule in order of document name and place is the one that is named; in steps 4 and 5
the first that demands encryption if one does. No verdict depends on the order of files or documents.

Rules of documents with `mode: stage` take part in the pending verdict only: what would be decided if they
were enforced too. `mode: off` takes part in nothing. A rule past its `until` does not match.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from sectool.events import Action, DropReason
from sectool.labels import LabelSet
from sectool.policy.collector import held
from sectool.policy.index import RuleIndex
from sectool.policy.model import DocumentSet
from sectool.policy.netpol import NetworkPolicies
from sectool.policy.network import IPAddress, NetworkTable
from sectool.policy.request import Party, Request
from sectool.policy.rules import CompiledRule, Facts, Networks, Phase, Rule, compile_rules

CACHE_SIZE: Final = 65_536  # decisions per generation; two generations are kept
_LABELS_SIZE: Final = 65_536  # label sets whose index keys are remembered
_NOWHERE: Final[frozenset[int]] = frozenset()
_FOREVER: Final = 1 << 63


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict with its reason.

    `rule` decided (None: default). `encrypt` demands encryption because of `encrypt_rule`.
    `pending_action` is what staged documents would make of it, NONE when there are none.
    At `valid_until_us` (UTC microseconds) an expiry or an age may change the verdict; None: never by itself.
    """

    action: Action
    reason: DropReason = DropReason.NONE
    rule: Rule | None = None
    encrypt: bool = False
    encrypt_rule: Rule | None = None
    pending_action: Action = Action.NONE
    pending_rule: Rule | None = None
    valid_until_us: int | None = None


class Verdict(NamedTuple):
    """Steps 1 to 6 over one set of matching rules."""

    action: Action
    reason: DropReason
    rule: CompiledRule | None
    encrypt_rule: CompiledRule | None


_DEFAULT: Final = Verdict(Action.DENY, DropReason.DEFAULT_DENY, None, None)


def judge(matching: Iterable[CompiledRule], can_encrypt: bool) -> Verdict:
    """The verdict of the rules that match, which must come in order of rank (so of phase)."""
    required: CompiledRule | None = None
    passing: CompiledRule | None = None
    for rule in matching:
        match rule.phase:
            case Phase.GUARDRAIL_DENY:
                return Verdict(Action.DENY, DropReason.GUARDRAIL_DENY, rule, None)
            case Phase.GUARDRAIL_ENCRYPTION:
                required = required or rule
            case Phase.INTENT_DENY:
                return Verdict(Action.DENY, DropReason.INTENT_DENY, rule, None)
            case Phase.INTENT_ALLOW | Phase.INTENT_AUDIT:
                if passing is None:
                    passing = rule
                elif rule.phase is not passing.phase:
                    break  # an audit rule behind an allow rule
                elif rule.sentence.encrypted and not passing.sentence.encrypted:
                    passing = rule
    if passing is None:
        return _DEFAULT
    if required is None and passing.sentence.encrypted:
        required = passing
    if required is not None and not can_encrypt:
        return Verdict(Action.DENY, DropReason.ENCRYPTION_UNAVAILABLE, required, required)
    action = Action.ALLOW if passing.phase is Phase.INTENT_ALLOW else Action.AUDIT
    return Verdict(action, DropReason.NONE, passing, required)


class _Known(NamedTuple):
    """What is remembered of a label set."""

    labels: dict[str, str]
    source_keys: list[int]
    destination_keys: list[int]


class Engine:
    """Decides requests by a set of documents. Build one per revision; its documents never change.

    Not to be shared between threads that decide at the same time.
    """

    @held()
    def __init__(self, documents: DocumentSet, revision: int = 0) -> None:
        self.documents = documents
        self.revision = revision
        networks = Networks(documents)
        self.compiled = compile_rules(documents, networks)
        self.network_policies = NetworkPolicies(documents.network_policies, networks)
        self.rules: tuple[Rule, ...] = (*(c.rule for c in self.compiled), *self.network_policies.rules)
        self.has_staged = any(c.staged for c in self.compiled) or self.network_policies.has_staged
        self.network_specs = tuple(networks.specs)  # all that rules speak of
        self._networks = NetworkTable(networks.specs)
        self._has_networks = bool(networks.specs)
        self._index = RuleIndex(self.compiled)
        self._has_names = any(
            side.names or side.below for side in (self._index.source, self._index.destination)
        )
        self._known: dict[LabelSet, _Known] = {}
        # Two generations: when the younger is full it becomes the older, so that the bound costs
        # no bookkeeping per hit, and a scan of all ports cannot push out for long what is in use.
        self._young: dict[object, tuple[Decision, int, int]] = {}
        self._old: dict[object, tuple[Decision, int, int]] = {}

    def rule(self, number: int) -> Rule | None:
        """The rule with this id."""
        return next((rule for rule in self.rules if rule.id == number), None)

    def decide(self, request: Request, now_us: int) -> Decision:
        """The verdict at `now_us` (UTC microseconds), from memory if it has been asked before."""
        source = request.source
        destination = request.destination
        if self._has_networks:
            at, to = source.address, destination.address
            places = (
                self._networks.find(at) if at is not None else _NOWHERE,
                self._networks.find(to) if to is not None else _NOWHERE,
            )
        else:
            places = _BOTH_NOWHERE
        key = (
            source.labels,
            destination.labels,
            request.protocol,
            request.port,
            request.icmp_code,
            request.can_encrypt,
            places,
            (source.names, destination.names) if self._has_names else None,
        )
        entry = self._young.get(key)
        if entry is None:
            entry = self._old.get(key)
            if entry is not None:
                self._remember(key, entry)
        if entry is not None and entry[1] <= now_us < entry[2]:
            return entry[0]
        decision = self.evaluate(request, now_us)
        # A decision that depends on the clock holds from now on, not before: the clock may be set back.
        until = decision.valid_until_us
        timed = until is not None
        self._remember(
            key, (decision, now_us if timed else -_FOREVER, until if until is not None else _FOREVER)
        )
        return decision

    def _remember(self, key: object, entry: tuple[Decision, int, int]) -> None:
        if len(self._young) >= CACHE_SIZE:
            self._old = self._young
            self._young = {}
        self._young[key] = entry

    def evaluate(self, request: Request, now_us: int) -> Decision:
        """What `decide` does for a request it has not seen."""
        matching, until = self.matching(request, now_us)
        pending: Verdict | None = None
        if self.has_staged:
            pending = judge(self._with_pods(matching, request, staged=True), request.can_encrypt)
            matching = [rule for rule in matching if not rule.staged]
        verdict = judge(self._with_pods(matching, request), request.can_encrypt)
        required = verdict.encrypt_rule
        return Decision(
            verdict.action,
            verdict.reason,
            verdict.rule.rule if verdict.rule else None,
            required is not None,
            required.rule if required else None,
            pending.action if pending else Action.NONE,
            pending.rule.rule if pending and pending.rule else None,
            until,
        )

    def _with_pods(
        self, matching: list[CompiledRule], request: Request, *, staged: bool = False
    ) -> list[CompiledRule]:
        """The rules that match, and what NetworkPolicies allow as the last of the intents that allow."""
        if not self.network_policies:
            return matching
        allowing = self.network_policies.allowing(
            self.facts(request.source),
            self.facts(request.destination),
            request.protocol,
            request.port,
            staged=staged,
        )
        if allowing is None:
            return matching
        before = [rule for rule in matching if rule.phase is not Phase.INTENT_AUDIT]
        return [*before, allowing, *matching[len(before) :]]

    def matching(self, request: Request, now_us: int) -> tuple[list[CompiledRule], int | None]:
        """All rules that match, staged ones included, in order of rank; and when that may change."""
        source, source_keys = self._facts(request.source, True)
        destination, destination_keys = self._facts(request.destination, False)
        protocol, port, code = request.protocol, request.port, request.icmp_code
        out: list[CompiledRule] = []
        until: int | None = None
        for rule in self._index.find(source_keys, destination_keys, protocol, port):
            if not rule.matches_parties(source, destination) or not rule.matches_service(
                protocol, port, code
            ):
                continue
            if rule.timed:
                holds, flip = rule.in_force(source, destination, now_us)
                if flip is not None and (until is None or flip < until):
                    until = flip
                if not holds:
                    continue
            out.append(rule)
        if len(out) > 1:
            out.sort(key=_rank)
        return out, until

    def facts(self, party: Party) -> Facts:
        """What rules see of a party."""
        return self._facts(party, True)[0]

    def _facts(self, party: Party, calling: bool) -> tuple[Facts, list[int]]:
        address: IPAddress | None = party.address
        side = self._index.source if calling else self._index.destination
        places = self._networks.find(address) if address is not None and self._has_networks else _NOWHERE
        if party.labels is None:
            facts = Facts(None, places, party.names)
            return facts, side.other_keys(facts)
        known = self._known.get(party.labels)
        if known is None:
            labels = dict(party.labels)
            known = _Known(
                labels, self._index.source.label_keys(labels), self._index.destination.label_keys(labels)
            )
            if len(self._known) >= _LABELS_SIZE:
                self._known.clear()
            self._known[party.labels] = known
        facts = Facts(known.labels, places, party.names)
        return facts, side.other_keys(facts) + (known.source_keys if calling else known.destination_keys)


_BOTH_NOWHERE: Final = (_NOWHERE, _NOWHERE)


def _rank(rule: CompiledRule) -> int:
    return rule.rank
