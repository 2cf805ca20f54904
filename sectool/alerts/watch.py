"""What is wrong now, and since when: findings come in, raised and cleared alerts go out. No I/O, no clock.

    finding                       no finding for `hold`
---------------> raised --------------------------------> cleared
                 (told once, however often it is found again)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sectool.alerts.rules import AlertRule, AlertSettings
from sectool.labels import stable_id

MAX_ACTIVE: Final = 1000
MAX_KEYS: Final = 20_000
MAX_PLACES: Final = 1000  # remembered of one source
MAX_ALL_PLACES: Final = 200_000  # and of all


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a rule is about. `subject` tells it from others of the same rule."""

    subject: str
    text: str
    owners: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Alert:
    """A raised alert; times in UTC microseconds. `count`: how often it was found."""

    id: int
    rule: str
    when: str
    finding: Finding
    raised_us: int
    seen_us: int
    count: int = 1

    def describe(self) -> dict[str, Any]:
        """As it is recorded and sent."""
        return {
            "id": self.id,
            "alert": self.rule,
            "when": self.when,
            "subject": self.finding.subject,
            "text": self.finding.text,
            "owners": list(self.finding.owners),
            "raised": self.raised_us,
            **({"details": dict(self.finding.details)} if self.finding.details else {}),
        }


@dataclass(frozen=True, slots=True)
class Change:
    """An alert that was raised, or is over."""

    alert: Alert
    raised: bool
    send: tuple[str, ...] = ()


class Watch:
    """The alerts that are raised. At most 1000 at a time; what is found beyond that is counted in `overflow`."""

    def __init__(self, settings: AlertSettings) -> None:
        self.settings = settings
        self.active: dict[int, Alert] = {}
        self.held: set[int] = set()
        self.overflow = 0

    def settle(self, settings: AlertSettings) -> None:
        """Other rules from now on; alerts of rules that are gone are cleared by the next `tick`."""
        self.settings = settings

    def restore(self, alert: Alert) -> None:
        """An alert that was raised before a restart."""
        self.active[alert.id] = alert

    def found(self, rule: AlertRule, findings: Iterable[Finding], now_us: int) -> list[Change]:
        """What a look at the record brought for one rule."""
        out = []
        for finding in findings:
            number = stable_id(f"{rule.name}\0{finding.subject}".encode())
            known = self.active.get(number)
            if known is not None:
                self.active[number] = replace(known, seen_us=now_us, count=known.count + 1)
                continue
            if len(self.active) >= MAX_ACTIVE:
                self.overflow += 1
                continue
            alert = Alert(number, rule.name, rule.when, finding, now_us, now_us)
            self.active[number] = alert
            out.append(Change(alert, True, rule.send))
        return out

    def hold(self, alert: Alert, send: tuple[str, ...]) -> list[Change]:
        """Raise an alert of no rule, which stays until `let_go` says so; it counts beside the bound."""
        known = alert.id in self.active
        self.held.add(alert.id)
        self.active[alert.id] = self.active.get(alert.id, alert)
        return [] if known else [Change(alert, True, send)]

    def let_go(self, number: int, send: tuple[str, ...]) -> list[Change]:
        """Clear an alert that was held, perhaps by a daemon before."""
        self.held.discard(number)
        alert = self.active.pop(number, None)
        return [] if alert is None else [Change(alert, False, send)]

    def tick(self, now_us: int) -> list[Change]:
        """Alerts that are over."""
        rules = {rule.name: rule for rule in self.settings.rules}
        out = []
        for alert in list(self.active.values()):
            if alert.id in self.held:
                continue
            rule = rules.get(alert.rule)
            if rule is None or now_us - alert.seen_us >= rule.hold_us:
                del self.active[alert.id]
                out.append(Change(alert, False, rule.send if rule else ()))
        return out


class Counting:
    """How often each key came within a stretch of time. Bounded: the oldest keys are forgotten first."""

    def __init__(self, within_us: int) -> None:
        self._within = within_us
        self._seen: dict[Any, deque[tuple[int, int]]] = {}

    def add(self, key: Any, count: int, now_us: int) -> int:
        """Count it; gives the sum within the stretch that ends now."""
        times = self._seen.setdefault(key, deque())
        times.append((now_us, count))
        while times[0][0] <= now_us - self._within:
            times.popleft()
        if len(self._seen) > MAX_KEYS:
            del self._seen[next(iter(self._seen))]
        return sum(n for _, n in times)


class Places:
    """How many different things each key touched within a stretch of time. Bounded in all, the oldest keys go first."""

    def __init__(self, within_us: int) -> None:
        self._within = within_us
        self._seen: dict[Any, dict[Any, int]] = {}
        self._total = 0

    def add(self, key: Any, place: Any, now_us: int) -> int:
        """Note it; gives how many different ones there are within the stretch that ends now, at most 1000."""
        places = self._seen.setdefault(key, {})
        self._total -= len(places)
        places.pop(place, None)
        places[place] = now_us
        while len(places) > MAX_PLACES or next(iter(places.values())) <= now_us - self._within:
            del places[next(iter(places))]
        self._total += len(places)
        while len(self._seen) > 1 and (self._total > MAX_ALL_PLACES or len(self._seen) > MAX_KEYS):
            oldest = next(iter(self._seen))
            if oldest == key:  # the newest is needed still
                self._seen[key] = self._seen.pop(key)
                continue
            self._total -= len(self._seen.pop(oldest))
        return len(places)
