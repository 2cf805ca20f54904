"""state/alerts.yaml: what is worth an alert, and where alerts go. Read as strictly as policy documents.

    alerts:
      - name: someone new at the database
        when: new-pair
        to: app=db
        send: [ops]
      - {name: hammering, when: denied-burst, count: 500, within: 1m, send: [ops]}
    send:
      ops: {webhook: "https://hooks.example.org/sectool"}

Without the file there are two alerts, which are recorded and sent nowhere: events were lost, and a flow that a policy
allows was denied by a guardrail. With the file, what stands in it is all there is.
"""

from __future__ import annotations

import os
import re
import stat
import zoneinfo
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from sectool.errors import UsageError
from sectool.policy.condition import SECOND, quantity
from sectool.policy.selector import Anyone, Labels, Selector, parse_selector
from sectool.policy.tokens import Reader
from sectool.policy.yamlpos import (
    MAX_TEXT,
    Items,
    Node,
    Scalar,
    Source,
    Table,
    bad_character,
    closest,
    compose,
)

ANYONE: Final = Anyone()
MINUTE: Final = 60 * SECOND
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._/-]{0,61}[A-Za-z0-9])?")
_HOURS = re.compile(r"([0-9]{2}):([0-9]{2})-([0-9]{2}):([0-9]{2})")
_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MAX_RULES: Final = 100


class When(StrEnum):
    """What an alert is about."""

    NEW_PAIR = "new-pair"
    DENIED_BURST = "denied-burst"
    NEW_HOST = "new-host"
    SCAN = "scan"
    POLICY_CHANGE = "policy-change"
    LOSSES = "losses"
    VIOLATION = "guardrail-violation"


MEANS: Final[dict[When, str]] = {
    When.NEW_PAIR: "two parties talk that never did before, as far as the record goes",
    When.DENIED_BURST: "one pair is denied on one port at least `count` times `within` a time",
    When.NEW_HOST: "a workload's identity is used on a host that it was never used on",
    When.SCAN: "one source is denied at least `count` different addresses and ports `within` a time",
    When.POLICY_CHANGE: "policy was changed outside `hours`",
    When.LOSSES: "events were lost: the record has a gap",
    When.VIOLATION: "a guardrail denied what a policy allows; both owners are named",
}
_FIELDS: Final[dict[When, tuple[str, ...]]] = {
    When.NEW_PAIR: ("from", "to", "learn"),
    When.DENIED_BURST: ("from", "to", "count", "within"),
    When.NEW_HOST: ("learn",),
    When.SCAN: ("from", "count", "within"),
    When.POLICY_CHANGE: ("hours", "days", "zone"),
    When.LOSSES: (),
    When.VIOLATION: ("from", "to"),
}
MOST: Final[dict[When, int]] = {**dict.fromkeys(When, 1_000_000), When.SCAN: 1000}  # of `count`
_SHARED: Final = ("name", "when", "hold", "send")


@dataclass(frozen=True, slots=True)
class Hours:
    """Working hours: minutes of the day, in a zone, on some days (0: Monday)."""

    begin: int
    end: int
    days: frozenset[int]
    zone: str

    def __str__(self) -> str:
        days = ",".join(_DAYS[day] for day in sorted(self.days))
        begin, end = (f"{minutes // 60:02}:{minutes % 60:02}" for minutes in (self.begin, self.end))
        return f"{days} {begin}-{end} {self.zone}"


@dataclass(frozen=True, slots=True)
class AlertRule:
    """One alert. Times in microseconds; it is cleared when nothing was found for `hold_us`."""

    name: str
    when: When
    source: Selector = ANYONE
    destination: Selector = ANYONE
    count: int = 1
    within_us: int = MINUTE
    hold_us: int = 10 * MINUTE
    learn_us: int = 24 * 60 * MINUTE
    hours: Hours | None = None
    send: tuple[str, ...] = ()


class How(StrEnum):
    """Ways to send."""

    WEBHOOK = "webhook"
    SYSLOG = "syslog"
    COMMAND = "command"


@dataclass(frozen=True, slots=True)
class Target:
    """Where alerts go: a URL, `local` or `udp://HOST:PORT`, or a program with its arguments."""

    name: str
    how: How
    to: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AlertSettings:
    """The whole file."""

    rules: tuple[AlertRule, ...]
    targets: Mapping[str, Target]


QUIET: Final = AlertSettings(
    (
        AlertRule("events lost", When.LOSSES),
        AlertRule("guardrail violated", When.VIOLATION, hold_us=60 * MINUTE),
    ),
    {},
)


def load_alerts(path: Path) -> AlertSettings:
    """Settings from a file, the quiet ones when there is none. Raises DocumentError with the place of a mistake.

    A file that others can write is refused: the programs in it run with the daemon's rights.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            text = file.read(MAX_TEXT).decode("utf-8-sig")
    except FileNotFoundError:
        return QUIET
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}", "make it a UTF-8 file that root can read") from None
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or status.st_uid not in (0, os.geteuid()):
        raise UsageError(
            f"others than root can write {path}, and what stands in it runs as root",
            f"chown root {path}; chmod go-w {path}",
        )
    return parse_alerts(text, str(path))


def parse_alerts(text: str, name: str = "alerts.yaml") -> AlertSettings:
    """Parse the file's text; `name` is what errors call it."""
    nodes = list(compose(Source(name, text)))
    if not nodes:
        return AlertSettings((), {})
    if len(nodes) > 1:
        raise _fail(nodes[1], "a second document", "put everything into one")
    root = _table(nodes[0], "the file", ("alerts", "send"))
    targets = {}
    if "send" in root.entries:
        node = root.entries["send"][1]
        if not isinstance(node, Table):
            raise _fail(
                node,
                "'send' must be a mapping of names to targets",
                'e.g. send: {ops: {webhook: "https://…"}}',
            )
        targets = {key: _target(named, value) for key, (named, value) in node.entries.items()}
    rules: list[AlertRule] = []
    if "alerts" in root.entries:
        node = root.entries["alerts"][1]
        if not isinstance(node, Items):
            raise _fail(node, "'alerts' must be a list", "start each alert with '- name:'")
        if len(node.items) > MAX_RULES:
            raise _fail(
                node,
                f"{len(node.items)} alerts; at most {MAX_RULES} are watched",
                "join some by `from` and `to`",
            )
        for item in node.items:
            rules.append(_rule(item, targets, {rule.name for rule in rules}))
    return AlertSettings(tuple(rules), targets)


def _fail(node: Node, message: str, hint: str = "") -> Exception:
    return node.fail(message, hint)


def _table(node: Node, what: str, fields: tuple[str, ...]) -> Table:
    if not isinstance(node, Table):
        raise _fail(node, f"{what} must be a mapping", f"its fields are {', '.join(fields)}")
    for key, (named, _) in node.entries.items():
        if key not in fields:
            raise named.fail(
                f"{what} has no field {key!r}", closest(key, fields) or f"its fields are {', '.join(fields)}"
            )
    return node


def _word(table: Table, field: str, default: str | None = None) -> Scalar | None:
    if field not in table.entries:
        if default is None:
            raise table.fail(f"{field!r} is missing", f"add '{field}: …'")
        return None
    node = table.entries[field][1]
    if not isinstance(node, Scalar) or node.is_null or not node.value.strip():
        raise _fail(node, f"{field!r} must be a text", f"write '{field}: TEXT'")
    bad = bad_character(node.value)
    if bad >= 0:
        raise node.fail(
            f"character U+{ord(node.value[bad]):04X} may not stand in {field!r}", "remove it", bad
        )
    return node


def _rule(node: Node, targets: Mapping[str, Target], taken: set[str]) -> AlertRule:
    every = tuple(dict.fromkeys((*_SHARED, *(f for fields in _FIELDS.values() for f in fields))))
    table = _table(node, "an alert", every)
    name, kind = _word(table, "name"), _word(table, "when")
    assert name is not None
    assert kind is not None
    if not _NAME.fullmatch(name.value):
        raise name.fail(
            f"{name.value!r} is not a name", "letters, digits, spaces and . _ / - inside, at most 63"
        )
    if name.value in taken:
        raise name.fail(f"an alert named {name.value!r} exists already", "names are unique")
    kinds = [str(when) for when in When]
    if kind.value not in kinds:
        raise kind.fail(
            f"there is no alert {kind.value!r}", closest(kind.value, kinds) or f"one of {', '.join(kinds)}"
        )
    when = When(kind.value)
    for key, (named, _) in table.entries.items():
        if key not in (*_SHARED, *_FIELDS[when]):
            fields = ", ".join(_FIELDS[when]) or "no fields of its own"
            raise named.fail(f"a {when} alert has no {key!r}", f"it has {fields}")
    return AlertRule(
        name.value,
        when,
        _selector(table, "from"),
        _selector(table, "to"),
        _number(table, "count", {When.DENIED_BURST: 100, When.SCAN: 25}.get(when, 1), MOST[when]),
        _duration(table, "within", MINUTE, 3600 * SECOND),
        _duration(table, "hold", 10 * MINUTE, 7 * 86_400 * SECOND),
        _duration(table, "learn", 24 * 60 * MINUTE, 90 * 86_400 * SECOND),
        _hours(table) if when is When.POLICY_CHANGE else None,
        _sends(table, targets),
    )


def _selector(table: Table, field: str) -> Selector:
    node = _word(table, field, "")
    if node is None:
        return Anyone()
    reader = Reader(node)
    found = parse_selector(reader, "labels or any")
    if reader.token.kind != "end":
        raise reader.unexpected("the end")
    if not isinstance(found, (Labels, Anyone)):
        raise node.fail(f"{field!r} takes labels", "e.g. app=db,env=prod")
    return found


def _number(table: Table, field: str, default: int, most: int) -> int:
    node = _word(table, field, "")
    if node is None:
        return default
    text = node.value
    if not (text.isascii() and text.isdigit() and len(text) <= 7 and 1 <= int(text) <= most):
        raise node.fail(f"{text!r} is not a number from 1 to {most}", "write it in digits, e.g. 100")
    return int(node.value)


def _duration(table: Table, field: str, default: int, most: int) -> int:
    node = _word(table, field, "")
    if node is None:
        return default
    found = quantity(node.value)
    if found is None or found.kind != "duration" or not SECOND <= found.amount <= most:
        raise node.fail(
            f"{node.value!r} is not a time from 1s to {most // (3600 * SECOND)}h", "e.g. 30s, 10m or 1h"
        )
    return int(found.amount)


def _hours(table: Table) -> Hours:
    node = _word(table, "hours")
    assert node is not None
    found = _HOURS.fullmatch(node.value)
    times = [int(part) for part in found.groups()] if found else []
    if not times or times[0] > 24 or times[2] > 24 or times[1] > 59 or times[3] > 59:
        raise node.fail(
            f"{node.value!r} are not hours", "e.g. 08:00-18:00 (quoted, or YAML may read a number)"
        )
    begin, end = times[0] * 60 + times[1], times[2] * 60 + times[3]
    if not begin < end <= 24 * 60:
        raise node.fail("these hours end before they begin", "hours do not go over midnight")
    zone = _word(table, "zone", "UTC")
    if zone is not None:
        try:
            zoneinfo.ZoneInfo(zone.value)
        except (KeyError, ValueError, OSError):
            raise zone.fail(
                f"{zone.value!r} is not a time zone of this host", "e.g. Europe/Berlin or UTC"
            ) from None
    return Hours(begin, end, _days(table), zone.value if zone else "UTC")


def _days(table: Table) -> frozenset[int]:
    if "days" not in table.entries:
        return frozenset(range(5))
    node = table.entries["days"][1]
    if not isinstance(node, Items) or not node.items:
        raise _fail(node, "'days' must be a list", "e.g. days: [Mon, Tue, Wed, Thu, Fri]")
    out = set()
    for item in node.items:
        if not isinstance(item, Scalar) or item.value not in _DAYS:
            raise _fail(item, "this is not a day", f"one of {', '.join(_DAYS)}")
        out.add(_DAYS.index(item.value))
    return frozenset(out)


def _sends(table: Table, targets: Mapping[str, Target]) -> tuple[str, ...]:
    if "send" not in table.entries:
        return ()
    node = table.entries["send"][1]
    if not isinstance(node, Items):
        raise _fail(node, "'send' of an alert must be a list of targets", "e.g. send: [ops]")
    out = []
    for item in node.items:
        if not isinstance(item, Scalar) or item.value not in targets:
            known = ", ".join(targets) or "none is defined: add 'send:' beside 'alerts:'"
            raise _fail(item, "there is no such target", f"targets are: {known}")
        out.append(item.value)
    return tuple(dict.fromkeys(out))


def _target(named: Scalar, node: Node) -> Target:
    if not _NAME.fullmatch(named.value):
        raise named.fail(
            f"{named.value!r} is not a name", "letters, digits, spaces and . _ / - inside, at most 63"
        )
    table = _table(node, "a target", tuple(How))
    if len(table.entries) != 1:
        raise table.fail("a target has one way to send", f"one of {', '.join(How)}")
    ((word, (_, value)),) = table.entries.items()
    how = How(word)
    if how is How.COMMAND:
        if not isinstance(value, Items) or not value.items:
            raise _fail(
                value,
                "a command is a list: the program, then its arguments",
                "e.g. [/usr/local/bin/page, --urgent]",
            )
        words = []
        for item in value.items:
            if not isinstance(item, Scalar) or "\0" in item.value:
                raise _fail(item, "an argument must be a text", "put it in quotes")
            words.append(item.value)
        if not words[0].startswith("/"):
            raise _fail(
                value.items[0], f"{words[0]!r} does not start with /", "give the full path of the program"
            )
        return Target(named.value, how, tuple(words))
    text = _word(table, word)
    assert text is not None
    if how is How.WEBHOOK:
        _check_url(text, ("https", "http"), "e.g. https://hooks.example.org/sectool")
    elif text.value != "local":
        _check_url(text, ("udp",), "'local', or udp://HOST:PORT")
    return Target(named.value, how, (text.value,))


def _check_url(node: Scalar, schemes: tuple[str, ...], hint: str) -> None:
    try:
        parts = urlsplit(node.value)
        port = parts.port
    except ValueError:
        raise node.fail(f"{node.value!r} is not an address", hint) from None
    if parts.scheme not in schemes or not parts.hostname or (schemes == ("udp",) and port is None):
        raise node.fail(f"{node.value!r} is not an address that alerts can be sent to", hint)
    if parts.username is not None:
        raise node.fail(
            "no user and password in the address", "let the path carry a secret, or use a command"
        )
