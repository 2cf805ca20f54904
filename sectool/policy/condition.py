"""`where`: what is compared when a rule has matched both parties.

`=` and `!=` compare text. The others compare numbers (`3`, `2.5`), durations (`7d`, `1d12h`) or dates
(`2026-12-31` or RFC 3339). A label that holds a date compares with a duration by its age:
`source.vuln-age > 7d` holds when the label is `8d`, and also when it is the date on which the vulnerability
became known and that is more than seven days ago. As in selectors, `!=` holds when a label is absent; every
other comparison with an absent label fails, and so do orderings of values of different kinds. A party
without a proven identity has no labels to compare: no condition on it holds, `!=` neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Final

from sectool.labels import LabelError, check_label
from sectool.policy.tokens import RESERVED, Reader, Token

SECOND: Final = 1_000_000
DAY: Final = 86_400 * SECOND
MAX_CONDITIONS: Final = 16

OPERATORS: Final = ("=", "!=", "<", ">", "<=", ">=")
_UNITS: Final = {"w": 7 * DAY, "d": DAY, "h": 3600 * SECOND, "m": 60 * SECOND, "s": SECOND}
_NUMBER = re.compile(r"[0-9]{1,18}(?:\.[0-9]{1,9})?")
_DURATION = re.compile(r"(?:[0-9]{1,9}[wdhms])+")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_INSTANT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?(?:[Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def instant_us(text: str) -> int | None:
    """UTC microseconds of a date (its start) or an RFC 3339 time; None when it is neither."""
    if _DATE.fullmatch(text):
        try:
            return (date.fromisoformat(text).toordinal() - date(1970, 1, 1).toordinal()) * DAY
        except ValueError:
            return None
    if _INSTANT.fullmatch(text):
        try:
            return (datetime.fromisoformat(text.upper()) - _EPOCH) // timedelta(microseconds=1)
        except ValueError:
            return None
    return None


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value with an order. `kind` is number, duration or date; durations and dates are in microseconds."""

    kind: str
    amount: Decimal


@lru_cache(maxsize=65_536)
def quantity(text: str) -> Quantity | None:
    """The number, duration or date that a text is, or None."""
    if _NUMBER.fullmatch(text):
        return Quantity("number", Decimal(text))
    if _DURATION.fullmatch(text):
        return Quantity(
            "duration",
            Decimal(sum(int(n) * _UNITS[unit] for n, unit in re.findall(r"([0-9]+)([wdhms])", text))),
        )
    instant = instant_us(text)
    return None if instant is None else Quantity("date", Decimal(instant))


def ordered(
    left: Quantity | None, operator: str, right: Quantity | None, now_us: int
) -> tuple[bool, int | None]:
    """Whether `left operator right` holds now, and when (UTC microseconds, after now) the answer flips."""
    if left is None or right is None:
        return False, None
    if left.kind == right.kind:
        return _compare(left.amount, operator, right.amount), None
    if left.kind == "date" and right.kind == "duration":
        # The age grows: now - date against the duration. The answer flips when the sides become equal or, for
        # > and <=, the microsecond after.
        flip = int(left.amount + right.amount) + (operator in (">", "<="))
        return _compare(now_us - left.amount, operator, right.amount), flip if flip > now_us else None
    if left.kind == "duration" and right.kind == "date":
        return ordered(right, _MIRRORED[operator], left, now_us)
    return False, None


_MIRRORED: Final = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def _compare(left: Decimal, operator: str, right: Decimal) -> bool:
    if operator == "<":
        return left < right
    if operator == ">":
        return left > right
    return left <= right if operator == "<=" else left >= right


@dataclass(frozen=True, slots=True)
class LabelRef:
    """`source.KEY` or `destination.KEY`"""

    side: str
    key: str

    def __str__(self) -> str:
        return f"{self.side}.{self.key}"


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison; the right side is a literal text or the other label."""

    left: LabelRef
    operator: str
    right: LabelRef | str

    def holds(
        self, source: Mapping[str, str] | None, destination: Mapping[str, str] | None, now_us: int
    ) -> tuple[bool, int | None]:
        """Whether it holds now, and when that flips by itself (UTC microseconds) if it does."""
        labels = source if self.left.side == "source" else destination
        if labels is None:
            return False, None
        left = labels.get(self.left.key)
        right: str | None
        if isinstance(self.right, LabelRef):
            labels = source if self.right.side == "source" else destination
            if labels is None:
                return False, None
            right = labels.get(self.right.key)
        else:
            right = self.right
        if left is None or right is None:
            return self.operator == "!=", None
        if self.operator == "=":
            return left == right, None
        if self.operator == "!=":
            return left != right, None
        return ordered(quantity(left), self.operator, quantity(right), now_us)

    def __str__(self) -> str:
        right = self.right
        if isinstance(right, str) and (
            not right or right.startswith(("source.", "destination.")) or right in RESERVED
        ):
            return f'{self.left} {self.operator} "{right}"'
        return f"{self.left} {self.operator} {right}"


def parse_conditions(reader: Reader) -> tuple[Condition, ...]:
    """Read `source.zone != destination.zone and …`. Raises DocumentError."""
    out: list[Condition] = []
    while True:
        token = reader.token
        condition = _condition(reader)
        if condition in out:
            raise reader.fail(token, f"condition '{condition}' is given twice", "keep one of them")
        if len(out) == MAX_CONDITIONS:
            raise reader.fail(
                token, f"more than {MAX_CONDITIONS} conditions in one rule", "make two rules of it"
            )
        out.append(condition)
        if not reader.accept("and"):
            if reader.token.text in ("or", ","):
                raise reader.fail(
                    reader.token,
                    f"conditions cannot be joined by {reader.token}",
                    "use 'and', or a second rule",
                )
            return tuple(out)


def _condition(reader: Reader) -> Condition:
    token = reader.token
    left = _reference(reader, token)
    if left is None:
        raise reader.unexpected(
            "source.KEY or destination.KEY",
            hint="a condition compares labels, e.g. source.zone != destination.zone",
        )
    reader.take()
    sign = reader.token
    if sign.kind != "sign" or sign.text not in (*OPERATORS, "=="):
        raise reader.unexpected("one of = != < > <= >=")
    reader.take()
    operator = "=" if sign.text == "==" else sign.text
    value = reader.token
    if value.kind not in ("word", "string") or (value.kind == "word" and value.text in RESERVED):
        raise reader.unexpected("a value, source.KEY or destination.KEY")
    right = _reference(reader, value)
    if right == left:
        raise reader.fail(
            value, f"'{left}' is compared with itself", "compare it with a value, or with the other side"
        )
    if right is None:
        _check_literal(reader, value, left, operator)
    reader.take()
    return Condition(left, operator, value.text if right is None else right)


def _reference(reader: Reader, token: Token) -> LabelRef | None:
    side, dot, key = token.text.partition(".")
    if token.kind != "word" or not dot or side not in ("source", "destination"):
        return None
    try:
        check_label(key, "")
    except LabelError as error:
        raise reader.fail(token, str(error), "e.g. source.zone", len(side) + 1) from None
    return LabelRef(side, key)


def _check_literal(reader: Reader, token: Token, left: LabelRef, operator: str) -> None:
    if operator not in ("=", "!="):
        if quantity(token.text) is None:
            raise reader.fail(
                token,
                f"{token} has no order, so '{operator}' cannot compare it",
                "write a number (3), a duration (7d, 12h), a date (2026-12-31) or a label of the other side",
            )
        return
    try:
        check_label(left.key, token.text)
    except LabelError as error:
        raise reader.fail(token, str(error), "labels cannot have such a value") from None
