"""Flow filters: one grammar for the CLI's flags, the one-line form of the TUI and the wire.

    flags      --from-label app=web --from-label app=api --not --to-port 443 --verdict deny
    one line   from-label=app=web from-label=app=api not to-port=443 verdict=deny
    JSON       [{"field": "label", "side": "from", "any": ["app=web", "app=api"]}, …]

The same flag given again widens (OR), different flags narrow (AND), `not` turns around the next one alone.
A bare flag (`label`) holds when either end of the flow matches; `from-` is its initiator, `to-` its responder.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from sectool.errors import UsageError
from sectool.events import Action, DropReason
from sectool.labels import LabelError, check_label

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_E = TypeVar("_E", Action, DropReason)


class FilterError(UsageError):
    """A filter that cannot be understood. `start` and `end` delimit the place in the text (0-based)."""

    def __init__(self, message: str, hint: str = "", start: int = 0, end: int = 0) -> None:
        super().__init__(message, hint)
        self.start = start
        self.end = end


class Side(StrEnum):
    """Which end of the flow a clause speaks of."""

    ANY = "any"
    FROM = "from"
    TO = "to"


class Field(StrEnum):
    """What a clause looks at."""

    LABEL = "label"
    IDENTITY = "identity"
    IP = "ip"
    NET = "net"
    PORT = "port"
    WORKLOAD = "workload"
    VERDICT = "verdict"
    REASON = "reason"
    PROTOCOL = "protocol"
    ENCRYPTED = "encrypted"


SIDED = (Field.LABEL, Field.IDENTITY, Field.IP, Field.NET, Field.PORT, Field.WORKLOAD)

HELP = {
    Field.LABEL: "label: key, key=value, or several with commas (all must hold)",
    Field.IDENTITY: "SPIFFE id; * stands for any text",
    Field.IP: "IP address",
    Field.NET: "network in CIDR notation",
    Field.PORT: "port, or range low-high",
    Field.WORKLOAD: "workload name on this host; * stands for any text",
    Field.VERDICT: "allow, deny, audit or error",
    Field.REASON: "why denied, as in `sectool flows`: default-deny, credential-expired, …",
    Field.PROTOCOL: "tcp, udp, icmp, icmpv6 or a protocol number",
    Field.ENCRYPTED: "yes or no",
}


@dataclass(frozen=True, slots=True)
class LabelMatch:
    """All of these labels; a value of None asks for the key alone."""

    labels: tuple[tuple[str, str | None], ...]

    def __str__(self) -> str:
        return ",".join(key if value is None else f"{key}={value}" for key, value in self.labels)


@dataclass(frozen=True, slots=True)
class Pattern:
    """A name in which `*` stands for any text, also none."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class InNetwork:
    """An address of this network (a single address has a full-length prefix)."""

    network: Network

    def __str__(self) -> str:
        return str(self.network)


@dataclass(frozen=True, slots=True)
class Address:
    """Exactly this address."""

    address: ipaddress.IPv4Address | ipaddress.IPv6Address

    def __str__(self) -> str:
        return str(self.address)


@dataclass(frozen=True, slots=True)
class PortRange:
    """A port from `low` to `high`, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class IsVerdict:
    """This event.action."""

    action: Action

    def __str__(self) -> str:
        return self.action.name.lower()


@dataclass(frozen=True, slots=True)
class IsReason:
    """This drop_reason, ours or the peer's."""

    reason: DropReason

    def __str__(self) -> str:
        return self.reason.name.lower()


@dataclass(frozen=True, slots=True)
class IsProtocol:
    """This IP protocol number."""

    number: int

    def __str__(self) -> str:
        return next((name for name, number in _PROTOCOLS.items() if number == self.number), str(self.number))


@dataclass(frozen=True, slots=True)
class IsEncrypted:
    """Encrypted by us, or not."""

    yes: bool

    def __str__(self) -> str:
        return "yes" if self.yes else "no"


Value = (
    LabelMatch | Pattern | InNetwork | Address | PortRange | IsVerdict | IsReason | IsProtocol | IsEncrypted
)

_PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "icmpv6": 58}


@dataclass(frozen=True, slots=True)
class Clause:
    """Holds when `field` on `side` matches any of `values`; the other way round when `negated`."""

    field: Field
    side: Side
    values: tuple[Value, ...]
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Filter:
    """Holds when all clauses do. The empty filter holds always."""

    clauses: tuple[Clause, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.clauses)

    def to_json(self) -> list[dict[str, Any]]:
        """A JSON-ready list; `from_json` reads it back."""
        out: list[dict[str, Any]] = []
        for clause in self.clauses:
            item: dict[str, Any] = {"field": str(clause.field), "any": [str(v) for v in clause.values]}
            if clause.side is not Side.ANY:
                item["side"] = str(clause.side)
            if clause.negated:
                item["not"] = True
            out.append(item)
        return out

    @classmethod
    def from_json(cls, data: object) -> Filter:
        """The filter of a JSON value (None is the empty one). Raises FilterError."""
        if data is None:
            return cls()
        if not isinstance(data, list) or len(data) > 100:
            raise FilterError("a filter is a list of at most 100 clauses")
        return cls(tuple(_clause_from_json(item) for item in data))

    def __str__(self) -> str:
        """The one-line form; `parse_text` reads it back."""
        return " ".join(
            f"{'not ' if c.negated else ''}{flag_name(c.field, c.side)}={_quoted(str(v))}"
            for c in self.clauses
            for v in c.values
        )


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag of the grammar, without dashes."""

    name: str
    field: Field
    side: Side
    implied: str | None  # the value of a flag that takes none
    help: str


def flag_name(field: Field, side: Side = Side.ANY) -> str:
    """`from-label`, `label`, `verdict`, …"""
    return str(field) if side is Side.ANY else f"{side}-{field}"


def _flags() -> dict[str, Flag]:
    out: dict[str, Flag] = {}
    ends = {Side.ANY: "either end", Side.FROM: "the initiator", Side.TO: "the responder"}
    for field in Field:
        for side in Side if field in SIDED else (Side.ANY,):
            where = f" ({ends[side]})" if field in SIDED else ""
            name = flag_name(field, side)
            out[name] = Flag(name, field, side, None, HELP[field] + where)
    out["encrypted"] = Flag("encrypted", Field.ENCRYPTED, Side.ANY, "yes", "only encrypted flows")
    out["unencrypted"] = Flag("unencrypted", Field.ENCRYPTED, Side.ANY, "no", "only flows not encrypted")
    return out


FLAGS = _flags()


def parse_value(field: Field, text: str) -> Value:
    """What `text` means for `field`. Raises FilterError."""
    try:
        match field:
            case Field.LABEL:
                return _label(text)
            case Field.IDENTITY | Field.WORKLOAD:
                return _pattern(field, text)
            case Field.IP:
                return Address(ipaddress.ip_address(text))
            case Field.NET:
                return InNetwork(ipaddress.ip_network(text, strict=False))
            case Field.PORT:
                return _port(text)
            case Field.VERDICT:
                return IsVerdict(_word(Action, text, "verdict"))
            case Field.REASON:
                return IsReason(_word(DropReason, text, "reason"))
            case Field.PROTOCOL:
                return _protocol(text)
            case Field.ENCRYPTED:
                return IsEncrypted({"yes": True, "no": False}[text.lower()])
    except LabelError as error:
        raise FilterError(str(error)) from None
    except (ValueError, KeyError):
        raise FilterError(f"{text!r} does not fit {field}", f"{field} takes: {HELP[field]}") from None


def _label(text: str) -> LabelMatch:
    labels: list[tuple[str, str | None]] = []
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        check_label(key, value)
        labels.append((key, value if equals else None))
    return LabelMatch(tuple(labels))


def _pattern(field: Field, text: str) -> Pattern:
    if not text or len(text) > 2048 or not text.isprintable() or '"' in text:
        raise FilterError(f"{field} needs a name", f"{field} takes: {HELP[field]}")
    return Pattern(text)


_NUMBER = re.compile(r"[0-9]{1,5}")


def _port(text: str) -> PortRange:
    low, _, high = text.partition("-")
    if not _NUMBER.fullmatch(low) or not _NUMBER.fullmatch(high or low):
        raise ValueError
    ports = PortRange(int(low), int(high or low))
    if not ports.low <= ports.high <= 65535:
        raise ValueError
    return ports


def _protocol(text: str) -> IsProtocol:
    known = _PROTOCOLS.get(text.lower())
    if known is None and (not _NUMBER.fullmatch(text) or int(text) > 255):
        raise ValueError
    return IsProtocol(int(text) if known is None else known)


def _word(kind: type[_E], text: str, what: str) -> _E:
    word = text.upper().replace("-", "_")
    if word in kind.__members__ and kind[word].value:
        return kind[word]
    import difflib  # only on the way to an error

    names = [name.lower() for name, value in kind.__members__.items() if value]
    near = difflib.get_close_matches(word.lower(), names, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"one of: {', '.join(names)}"
    raise FilterError(f"there is no {what} {text!r}", hint)


def parse_tokens(tokens: Sequence[str]) -> Filter:
    """A filter from command-line tokens: `--from-label app=web`, `--verdict=deny`, `--not`, `--encrypted`.

    Raises FilterError for anything else, with the token's index as `start`.
    """
    items: list[tuple[Flag, str, bool]] = []
    negated = False
    index = 0
    while index < len(tokens):
        at, word = index, tokens[index]
        index += 1
        if word == "--not":
            negated = not negated
            continue
        name, equals, text = word.removeprefix("--").partition("=")
        flag = FLAGS.get(name) if word.startswith("--") else None
        if flag is None:
            raise FilterError(f"there is no filter {word!r}", _nearest(name, "--"), at, at + 1)
        if flag.implied is not None:
            if equals:
                raise FilterError(f"--{name} takes no value", "", at, at + 1)
            text = flag.implied
        elif not equals:
            if index == len(tokens):
                raise FilterError(f"--{name} needs a value", flag.help, at, at + 1)
            text = tokens[index]
            index += 1
        items.append((flag, text, negated))
        negated = False
    if negated:
        raise FilterError("--not at the end negates nothing", "put it before the filter it shall turn around")
    return build(items)


def build(items: Iterable[tuple[Flag, str, bool]]) -> Filter:
    """A filter from (flag, value, negated) in the order given."""
    return _group((flag, parse_value(flag.field, text), negated) for flag, text, negated in items)


def _group(items: Iterable[tuple[Flag, Value, bool]]) -> Filter:
    wanted: dict[tuple[Field, Side], list[Value]] = {}
    refused: list[Clause] = []
    for flag, value, negated in items:
        if negated:
            refused.append(Clause(flag.field, flag.side, (value,), True))
        else:
            values = wanted.setdefault((flag.field, flag.side), [])
            if value not in values:
                values.append(value)
    return Filter((*(Clause(f, s, tuple(values)) for (f, s), values in wanted.items()), *refused))


_WORD = re.compile(r'(?:[^\s"]|"[^"]*")+')


def parse_text(text: str) -> Filter:
    """A filter from its one-line form. Raises FilterError with the place of the offending word."""
    items: list[tuple[Flag, Value, bool]] = []
    negated = False
    if text.count('"') % 2:
        raise FilterError('a quotation mark (") is missing', "", text.rindex('"'), len(text))
    for found in _WORD.finditer(text):
        word, start, end = found.group(), found.start(), found.end()
        if word in ("not", "!"):
            negated = not negated
            continue
        if word.startswith("!"):
            negated, word = not negated, word[1:]
        name, equals, raw = word.partition("=")
        flag = FLAGS.get(name.removeprefix("--"))
        if flag is None:
            raise FilterError(f"there is no filter {name!r}", _nearest(name, ""), start, start + len(name))
        value = raw.replace('"', "")
        if flag.implied is not None and not equals:
            value = flag.implied
        elif flag.name == "unencrypted":
            raise FilterError("unencrypted takes no value", "write unencrypted, or encrypted=no", start, end)
        elif not value:
            raise FilterError(f"{name} needs a value", f"{name}=…  {flag.help}", start, end)
        try:
            items.append((flag, parse_value(flag.field, value), negated))
        except FilterError as error:
            raise FilterError(error.message, error.hint, end - len(raw) if equals else start, end) from None
        negated = False
    if negated:
        raise FilterError("not at the end negates nothing", "", len(text.rstrip()) - 1, len(text))
    return _group(items)


def _quoted(text: str) -> str:
    return f'"{text}"' if re.search(r"\s", text) else text


def _nearest(name: str, dashes: str) -> str:
    import difflib  # only on the way to an error

    near = difflib.get_close_matches(name, FLAGS, 3, 0.5)
    return (
        f"did you mean {' or '.join(dashes + n for n in near)}?" if near else f"filters: {', '.join(FLAGS)}"
    )


def _clause_from_json(item: object) -> Clause:
    if not isinstance(item, dict) or not item.keys() <= {"field", "side", "any", "not"}:
        raise FilterError("a clause has field, any, and perhaps side and not")
    values, negated = item.get("any"), item.get("not", False)
    try:
        field, side = Field(str(item.get("field"))), Side(str(item.get("side", "any")))
    except ValueError:
        raise FilterError(f"there is no filter on {item.get('side')} {item.get('field')}") from None
    if not isinstance(negated, bool) or (side is not Side.ANY and field not in SIDED):
        raise FilterError(f"{field} cannot be asked that way")
    if not isinstance(values, list) or not 1 <= len(values) <= 1000:
        raise FilterError("`any` of a clause is a list of one to 1000 values")
    if not all(isinstance(v, str) for v in values):
        raise FilterError("values of a clause are texts")
    return Clause(field, side, tuple(parse_value(field, v) for v in values), negated)
