"""Who a rule speaks of: label selectors, networks, host names, or anyone.

Label selectors are those of Kubernetes (apimachinery `labels.Parse`), plus `key=prefix*`. All clauses must
hold; `!=` and `notin` hold when the key is absent. A party without a proven identity has no labels and no
selector matches it, a negative one neither: `app!=web` is a statement about a workload we know.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sectool.labels import LabelError, check_label
from sectool.policy.network import IPNetwork, parse_cidr
from sectool.policy.tokens import RESERVED, Reader, Token

MAX_CLAUSES: Final = 32
MAX_VALUES: Final = 256

_OPERATORS: Final = frozenset({"=", "==", "!=", "in", "notin"})  # what may follow a label key
_HOST_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
NETWORK_NAME = re.compile(r"[A-Za-z](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


class Op(StrEnum):
    """Clause operators, spelled as in the language."""

    EQ = "="
    NE = "!="
    IN = "in"
    NOTIN = "notin"
    EXISTS = "exists"
    ABSENT = "!"
    PREFIX = "=*"


@dataclass(frozen=True, slots=True)
class Clause:
    """One condition on one label. `values` has one entry for =, != and prefix (without its *)."""

    key: str
    op: Op
    values: tuple[str, ...] = ()

    def holds(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        match self.op:
            case Op.EQ | Op.IN:
                return value is not None and value in self.values
            case Op.NE | Op.NOTIN:
                return value is None or value not in self.values
            case Op.EXISTS:
                return value is not None
            case Op.ABSENT:
                return value is None
            case Op.PREFIX:
                return value is not None and value.startswith(self.values[0])

    def __str__(self) -> str:
        match self.op:
            case Op.EQ | Op.NE:
                return f"{self.key}{self.op}{_value(self.values[0])}"
            case Op.IN | Op.NOTIN:
                return f"{self.key} {self.op} ({','.join(map(_value, self.values))})"
            case Op.EXISTS:
                return self.key
            case Op.ABSENT:
                return f"!{self.key}"
            case Op.PREFIX:
                return f"{self.key}={self.values[0]}*"


def _value(value: str) -> str:
    return value or '""'


@dataclass(frozen=True, slots=True)
class Labels:
    """`app=web,env in (prod,staging),!legacy`"""

    clauses: tuple[Clause, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.clauses))


@dataclass(frozen=True, slots=True)
class NamedNet:
    """`net:NAME`, a Network document"""

    name: str

    def __str__(self) -> str:
        return f"net:{self.name}"


@dataclass(frozen=True, slots=True)
class Cidr:
    """`net:10.0.0.0/8`"""

    network: IPNetwork

    def __str__(self) -> str:
        return f"net:{self.network}"


@dataclass(frozen=True, slots=True)
class Fqdn:
    """`fqdn:api.example.com`, or with `wildcard` any name below: `fqdn:*.example.com`."""

    name: str
    wildcard: bool = False

    def matches(self, names: frozenset[str]) -> bool:
        if self.wildcard:
            tail = "." + self.name
            return any(name.endswith(tail) for name in names)
        return self.name in names

    def __str__(self) -> str:
        return f"fqdn:{'*.' if self.wildcard else ''}{self.name}"


@dataclass(frozen=True, slots=True)
class Anyone:
    """`any`: every party, identified or not."""

    def __str__(self) -> str:
        return "any"


Selector = Labels | NamedNet | Cidr | Fqdn | Anyone


def parse_selector(reader: Reader, what: str) -> Selector:
    """Read one selector; `what` says whom it is to name ('the source'). Raises DocumentError."""
    token = reader.token
    single: Selector | None = None
    if token.kind == "word" and reader.following.text not in _OPERATORS:
        prefix, colon, rest = token.text.partition(":")
        if token.text == "any":
            single = Anyone()
        elif colon and prefix == "net":
            single = parse_net(reader, token, rest)
        elif colon and prefix == "fqdn":
            single = parse_fqdn(reader, token, rest)
    if single is not None:
        reader.take()
        if reader.token.text == "," and reader.token.kind == "sign":
            raise reader.fail(
                reader.token, f"'{token.text}' stands alone", "labels cannot be combined with it"
            )
        return single
    clauses = [_clause(reader, what, ())]
    while reader.accept(","):
        if len(clauses) == MAX_CLAUSES:
            raise reader.fail(
                reader.token,
                f"more than {MAX_CLAUSES} clauses in one selector",
                "give the workloads a label of their own",
            )
        clauses.append(_clause(reader, "a further label clause", tuple(clauses)))
    return Labels(tuple(clauses))


def parse_net(reader: Reader, token: Token, text: str) -> NamedNet | Cidr:
    """What stands behind `net:`; a name starts with a letter and has no colon or slash."""
    if not text:
        raise reader.fail(
            token, "'net:' needs a name or a CIDR right behind it", "e.g. net:internet or net:10.0.0.0/8"
        )
    if text[0].isdigit() or ":" in text or "/" in text:
        try:
            return Cidr(parse_cidr(text))
        except ValueError as error:
            message, _, hint = str(error).partition("; ")
            raise reader.fail(token, message, hint, 4) from None
    if not NETWORK_NAME.fullmatch(text):
        raise reader.fail(token, f"{text!r} is not a network name", "letters, digits and . _ - inside", 4)
    return NamedNet(text)


def parse_fqdn(reader: Reader, token: Token, text: str) -> Fqdn:
    """What stands behind `fqdn:`."""
    wildcard = text.startswith("*.")
    name = text[2:] if wildcard else text
    try:
        return Fqdn(host_name(name), wildcard)
    except ValueError as error:
        hint = "a * may only stand as the whole first part, as in fqdn:*.example.com" if "*" in name else ""
        raise reader.fail(token, str(error), hint or "e.g. fqdn:api.example.com", 5) from None


def host_name(text: str) -> str:
    """A host name in lower case without final dot. Raises ValueError (RFC 1035 sizes, `_` allowed)."""
    name = text.lower().removesuffix(".")
    if len(name) > 253 or not all(_HOST_LABEL.fullmatch(part) for part in name.split(".")):
        raise ValueError(f"{text!r} is not a host name")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name
    raise ValueError(f"{text!r} is an address, not a host name; write net:{name}/32")


def _clause(reader: Reader, what: str, before: tuple[Clause, ...]) -> Clause:
    first = reader.token
    if reader.accept("!"):
        key = _key(reader, "a label key after '!'", bare=False)
        clause = Clause(key, Op.ABSENT)
    else:
        key = _key(reader, what, bare=True)
        token = reader.token
        if token.kind == "sign" and token.text in ("=", "==", "!="):
            reader.take()
            clause = _equality(reader, key, token)
        elif token.kind == "word" and token.text in ("in", "notin"):
            reader.take()
            clause = Clause(key, Op(token.text), _values(reader, key, token))
        elif token.kind == "sign" and token.text in ("<", ">", "<=", ">="):
            raise reader.fail(
                token,
                f"'{token.text}' cannot be used in a selector",
                f"write: where source.{key} {token.text} …",
            )
        else:
            clause = Clause(key, Op.EXISTS)
    for other in before:
        if other == clause:
            raise reader.fail(first, f"clause '{clause}' is given twice", "keep one of them")
        if other.key == clause.key and other.op is clause.op is Op.EQ:
            raise reader.fail(
                first,
                f"'{clause}' can never hold together with '{other}'",
                f"for either of two values write {key} in ({other.values[0]},{clause.values[0]})",
            )
    return clause


def _key(reader: Reader, what: str, *, bare: bool) -> str:
    token = reader.token
    if token.kind != "word":
        raise reader.unexpected(what, hint=_SELECTOR_HINT if bare else "")
    if bare and token.text in RESERVED and reader.following.text not in _OPERATORS:
        raise reader.unexpected(what, hint=_SELECTOR_HINT)
    try:
        check_label(token.text, "")
    except LabelError as error:
        raise reader.fail(token, str(error), _prefix_hint(token.text)) from None
    reader.take()
    return token.text


_SELECTOR_HINT: Final = "write labels (app=web), net:NAME, net:CIDR, fqdn:NAME or any"


_VALUE_HINT: Final = "keys and values begin and end with a letter or digit"


def _prefix_hint(word: str) -> str:
    prefix, colon, rest = word.partition(":")
    if not colon:
        return _VALUE_HINT
    if prefix == "ip":
        return f"in a rule, write an address as a network: net:{rest}/{128 if ':' in rest else 32}"
    if prefix in ("nets", "network", "cidr"):
        return f"did you mean 'net:{rest}'?"
    if prefix in ("dns", "host", "name"):
        return f"did you mean 'fqdn:{rest}'?"
    return f"label clauses are written key=value: {prefix}={rest}"


def _equality(reader: Reader, key: str, operator: Token) -> Clause:
    token = reader.token
    if token.kind == "word" and token.text.endswith("*"):
        prefix = token.text[:-1]
        if operator.text == "!=":
            raise reader.fail(
                token, "a prefix can be asked for with = only", f"'{key}={token.text}' in a deny rule"
            )
        if not prefix:
            raise reader.fail(token, f"'{key}=*' asks for any value", f"write just '{key}' for that")
        _check(reader, token, key, prefix + "x", prefix)
        reader.take()
        return Clause(key, Op.PREFIX, (prefix,))
    return Clause(key, Op.NE if operator.text == "!=" else Op.EQ, (_one_value(reader, key),))


def _values(reader: Reader, key: str, operator: Token) -> tuple[str, ...]:
    reader.expect("(", f"after '{operator.text}'")
    out: list[str] = []
    while True:
        token = reader.token
        value = _one_value(reader, key, in_list=True)
        if value in out:
            raise reader.fail(token, f"value {token} is given twice", "keep one of them")
        if len(out) == MAX_VALUES:
            raise reader.fail(
                token, f"more than {MAX_VALUES} values", "make two rules of it, or ask for key=prefix*"
            )
        out.append(value)
        if reader.accept(")"):
            return tuple(out)
        if not reader.accept(","):
            raise reader.unexpected("',' or ')' in the list of values")


def _one_value(reader: Reader, key: str, *, in_list: bool = False) -> str:
    token = reader.token
    reserved = token.kind == "word" and token.spaced and token.text in RESERVED and not in_list
    if token.kind not in ("word", "string") or reserved:
        raise reader.unexpected(f"a value for label '{key}'", hint='the empty value is written ""')
    _check(reader, token, key, token.text, token.text)
    reader.take()
    return token.text


def _check(reader: Reader, token: Token, key: str, value: str, shown: str) -> None:
    try:
        check_label(key, value)
    except LabelError as error:
        hint = "a * may only stand at the end, after =" if "*" in shown else _VALUE_HINT
        raise reader.fail(token, str(error), hint) from None


def equality(labels: Mapping[str, str], keys: list[str]) -> Labels:
    """The selector that asks for exactly these labels' values."""
    return Labels(tuple(Clause(key, Op.EQ, (labels[key],)) for key in keys))
