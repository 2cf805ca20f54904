"""The rule sentence: one grammar for YAML, command line and explanations.

    rule = verb source "to" "call" destination ["on" services] ["encrypted"]
           ["where" conditions] ["until" date] ["because" text]
    verb = "allow" | "deny" | "audit" | "require" "encryption" "for"

A hand-written recursive descent over at most a few dozen tokens. `str()` of a sentence is its canonical text,
and parsing that gives the same sentence again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from sectool.policy.condition import DAY, Condition, instant_us, parse_conditions
from sectool.policy.selector import Selector, parse_selector
from sectool.policy.service import Service, parse_services
from sectool.policy.tokens import Reader, quote
from sectool.policy.yamlpos import Scalar, closest

MAX_REASON: Final = 500  # characters of a because text


class Verb(StrEnum):
    """What a rule does, as the sentence says it."""

    ALLOW = "allow"
    DENY = "deny"
    AUDIT = "audit"
    REQUIRE = "require encryption for"


@dataclass(frozen=True, slots=True)
class Until:
    """When a rule stops to match: the first UTC microsecond at which it no longer does."""

    text: str
    us: int

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Sentence:
    """One rule. No services means all of them."""

    verb: Verb
    source: Selector
    destination: Selector
    services: tuple[Service, ...] = ()
    encrypted: bool = False
    conditions: tuple[Condition, ...] = ()
    until: Until | None = None
    because: str = ""

    def __str__(self) -> str:
        parts = [f"{self.verb} {self.source} to call {self.destination}"]
        if self.services:
            parts.append("on " + ",".join(map(str, self.services)))
        if self.encrypted:
            parts.append("encrypted")
        if self.conditions:
            parts.append("where " + " and ".join(map(str, self.conditions)))
        if self.until:
            parts.append(f"until {self.until}")
        if self.because:
            parts.append("because " + quote(self.because))
        return " ".join(parts)


def parse_sentence(text: str | Scalar, source: str = "<rule>") -> Sentence:
    """Parse one sentence, a text or a YAML scalar. Raises DocumentError that points at the word."""
    scalar = text if isinstance(text, Scalar) else Scalar.whole(text, source)
    reader = Reader(scalar)
    verb = _verb(reader)
    origin = parse_selector(reader, "who may call" if verb is Verb.ALLOW else "the calling side")
    reader.expect("to", "after the calling side")
    reader.expect("call", "after 'to'")
    target = parse_selector(reader, "the called side")
    services = parse_services(reader) if reader.accept("on") else ()
    encrypted = _encrypted(reader, verb)
    conditions = parse_conditions(reader) if reader.accept("where") else ()
    until = _until(reader) if reader.accept("until") else None
    because = _because(reader) if reader.accept("because") else ""
    if reader.token.kind != "end":
        raise _trailing(reader)
    return Sentence(verb, origin, target, services, encrypted, conditions, until, because)


def _verb(reader: Reader) -> Verb:
    if reader.accept("require"):
        reader.expect("encryption", "after 'require'")
        reader.expect("for", "after 'require encryption'")
        return Verb.REQUIRE
    for verb in (Verb.ALLOW, Verb.DENY, Verb.AUDIT):
        if reader.accept(verb.value):
            return verb
    raise reader.unexpected(
        "'allow', 'deny', 'audit' or 'require encryption for'", ["allow", "deny", "audit", "require"]
    )


def _encrypted(reader: Reader, verb: Verb) -> bool:
    token = reader.token
    if not reader.accept("encrypted"):
        return False
    if verb is Verb.DENY:
        raise reader.fail(token, "a denied call is never encrypted", "remove 'encrypted'")
    if verb is Verb.REQUIRE:
        raise reader.fail(token, "'require encryption for' already says so", "remove 'encrypted'")
    return True


def _until(reader: Reader) -> Until:
    token = reader.token
    us = instant_us(token.text) if token.kind == "word" else None
    if us is None:
        raise reader.unexpected(
            "a date after 'until'", hint="2026-12-31 (to the end of that day, UTC) or 2026-12-31T18:00:00Z"
        )
    reader.take()
    if "T" not in token.text.upper():
        return Until(token.text, us + DAY)
    try:
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)
    except OverflowError:
        raise reader.fail(
            token,
            f"{token} is outside the years 1 to 9999 in UTC",
            "leave 'until' out for a rule without end",
        ) from None
    return Until(moment.isoformat().replace("+00:00", "Z"), us)


def _because(reader: Reader) -> str:
    token = reader.token
    if token.kind != "string":
        raise reader.unexpected("a quoted text after 'because'", hint='because "TICKET-1, what it is for"')
    if not token.text.strip():
        raise reader.fail(token, "the reason is empty", "say why, or leave 'because' out")
    if len(token.text) > MAX_REASON:
        raise reader.fail(
            token, f"the reason has {len(token.text)} characters; at most {MAX_REASON} are kept", "shorten it"
        )
    reader.take()
    return token.text


_TAIL: Final = ("on", "encrypted", "where", "until", "because")


def _trailing(reader: Reader) -> Exception:
    token = reader.token
    if token.kind == "word" and token.text in _TAIL:
        return reader.fail(
            token,
            f"{token} is given twice or out of order",
            'the order is: on SERVICES, encrypted, where CONDITION, until DATE, because "TEXT"',
        )
    if token.kind == "word" and token.text in ("and", "or"):
        return reader.fail(
            token,
            f"{token} cannot stand here",
            "clauses of a selector are joined by ','; 'and' only after 'where'",
        )
    hint = closest(token.text, _TAIL) if token.kind == "word" else ""
    hint = hint or "remove it, or make a second rule of it"
    return reader.fail(
        token, f"expected 'on', 'encrypted', 'where', 'until', 'because' or the end, found {token}", hint
    )
