"""Alerts of a running daemon: looks at the record every few seconds, records what it finds, and has it sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from sectool.alerts.deliver import Delivery
from sectool.alerts.questions import Questions
from sectool.alerts.rules import QUIET, AlertSettings, load_alerts
from sectool.alerts.watch import Alert, Change, Finding, Watch
from sectool.api.client import Client
from sectool.api.server import Reply, Request
from sectool.errors import SectoolError, UsageError
from sectool.events import Type, now_us
from sectool.labels import stable_id
from sectool.policy import Engine

if TYPE_CHECKING:
    from pathlib import Path

    from sectool.agent.daemon import Daemon

log = logging.getLogger("sectool.agent")

EVERY_S: Final = 5.0
ASK_MS: Final = 10_000
RESTORED: Final = 5000  # alert events looked back for what was raised before a restart


class Alerts:
    """Watches for one daemon. It never holds up anything else: questions are asked in a thread."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._settings = QUIET
        self.watch = Watch(self._settings)
        self._questions = Questions(self._settings)
        self._deliveries: dict[str, Delivery] = {}
        self._next: int | None = None
        self._restored = False
        self._copy: Engine | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def _path(self) -> Path:
        return self._daemon.paths.state / "alerts.yaml"

    def start(self) -> None:
        """Look from now on, for what alerts.yaml says."""
        try:
            self._take(load_alerts(self._path))
        except SectoolError as error:  # whoever sends no alerts can enforce all the same
            self._daemon.health.raise_("alerts", error.message)
        self._task = asyncio.create_task(self._run(), name="alerts")

    async def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for delivery in self._deliveries.values():
            await delivery.close()

    def reread(self) -> None:
        """Take what is in the file now. Raises DocumentError, and then nothing has changed."""
        settings = load_alerts(self._path)
        self._daemon.health.clear("alerts")
        if settings != self._settings:
            self._take(settings)

    def _take(self, settings: AlertSettings) -> None:
        self._settings = settings
        self.watch.settle(settings)
        self._questions = Questions(settings)
        self._connect()

    def _connect(self) -> None:
        for name, delivery in list(self._deliveries.items()):
            if self._settings.targets.get(name) != delivery.target:
                del self._deliveries[name]
                self._hear(name, "")
                asyncio.get_running_loop().create_task(delivery.close())
        for name, target in self._settings.targets.items():
            if name not in self._deliveries:
                self._deliveries[name] = Delivery(target, lambda why, n=name: self._hear(n, why))  # type: ignore[misc]

    def _hear(self, name: str, why: str) -> None:
        what = f"alerts to {name}"
        if why:
            self._daemon.health.raise_(what, why)
        else:
            self._daemon.health.clear(what)

    async def _run(self) -> None:
        # What is recorded from now on counts, though the first look comes later.
        while self._next is None:
            try:
                self._next = await asyncio.to_thread(self._position)
            except SectoolError:
                await asyncio.sleep(0.2)
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                await self._look()
            except SectoolError as error:
                log.debug("alerts: the store does not answer: %s", error.message)
            except Exception:  # one bad look must not end watching
                log.exception("alerts: looking at the record failed")

    async def _look(self) -> None:
        now = now_us()
        active = self._daemon.revisions.active
        engine = active.engine if active else None
        questions, restore = self._questions, not self._restored
        end, found, before = await asyncio.to_thread(self._ask, questions, engine, restore, now)
        if restore:
            self._restored = True
            for alert in before:
                self.watch.restore(alert)
        self._next = end
        for rule, findings in found:
            if questions is self._questions:  # else the rules have changed meanwhile
                for change in self.watch.found(rule, findings, now):
                    self._tell(change, now)
        for change in self.watch.tick(now):
            self._tell(change, now)

    def _position(self) -> int:
        """The number that the next record will get."""
        with Client(self._daemon.paths.events_socket, timeout=5.0) as client:
            return int(client.call("ping")["next_seq"])

    def _ask(
        self, questions: Questions, engine: Engine | None, restore: bool, now: int
    ) -> tuple[int, list[Any], list[Alert]]:
        with Client(self._daemon.paths.events_socket, timeout=ASK_MS / 1000 + 5) as client:

            def ask(sql: str, limit: int) -> list[dict[str, Any]]:
                from store.reader import from_ipc

                answer = client.call("query", sql=sql, limit=limit, timeout_ms=ASK_MS)
                return list(from_ipc(answer.payload).to_pylist())

            end = int(client.call("ping")["next_seq"])
            before: list[Alert] = []
            if restore:
                told = "SELECT type, body FROM events WHERE type LIKE 'alert.%' ORDER BY seq DESC"
                before = raised_still(ask(told, RESTORED))
            first = end if self._next is None else min(self._next, end)
            found = list(questions.look(ask, self._own(engine), first, end, now)) if end > first else []
            return end, found, before

    def _own(self, engine: Engine | None) -> Engine | None:
        """A copy of the engine in force: one engine is not for two threads."""
        if engine is None:
            return None
        if self._copy is None or self._copy.documents is not engine.documents:
            self._copy = Engine(engine.documents, engine.revision)
        return self._copy

    def _tell(self, change: Change, now: int) -> None:
        body = change.alert.describe()
        state = "raised" if change.raised else "cleared"
        if not change.raised:
            body = {
                **body,
                "seconds": (now - change.alert.raised_us) // 1_000_000,
                "found": change.alert.count,
            }
        self._daemon.events.emit(Type.ALERT_RAISED if change.raised else Type.ALERT_CLEARED, **body)
        for name in change.send:
            delivery = self._deliveries.get(name)
            if delivery is not None:
                delivery.put({**body, "state": state, "host": self._daemon.host.name, "at": now})

    def hold(self, name: str, text: str, details: Mapping[str, Any]) -> None:
        """Raise an alert that no rule is about, and tell every target, until `let_go`."""
        now = now_us()
        alert = Alert(stable_id(name.encode()), name, "held", Finding(name, text, (), details), now, now)
        for change in self.watch.hold(alert, tuple(self._deliveries)):
            self._tell(change, now)

    def let_go(self, name: str) -> None:
        """It is over."""
        for change in self.watch.let_go(stable_id(name.encode()), tuple(self._deliveries)):
            self._tell(change, now_us())

    def try_target(self, name: str) -> None:
        """Send a test message. Raises UsageError for a target that there is not."""
        delivery = self._deliveries.get(name)
        if delivery is None:
            known = ", ".join(self._deliveries) or f"none; {self._path} defines them"
            raise UsageError(f"there is no target {name!r}", f"targets are: {known}")
        text = "this is a test; nothing is wrong"
        delivery.put(
            {"alert": "test", "text": text, "state": "test", "host": self._daemon.host.name, "at": now_us()}
        )


def raised_still(rows: list[dict[str, Any]]) -> list[Alert]:
    """Alerts that were raised and not cleared, from alert events, newest first."""
    out: dict[int, Alert] = {}
    over: set[int] = set()
    for row in rows:
        try:
            body = json.loads(row["body"])
            number = int(body["id"])
        except (ValueError, KeyError, TypeError):
            continue
        if row["type"] != Type.ALERT_RAISED or number in over:
            over.add(number)
        elif number not in out:
            out[number] = _alert(number, body)
            over.add(number)
    return list(out.values())


def _alert(number: int, body: Mapping[str, Any]) -> Alert:
    finding = Finding(
        str(body.get("subject", "")),
        str(body.get("text", "")),
        tuple(body.get("owners", ())),
        body.get("details", {}),
    )
    raised = int(body.get("raised", 0))
    return Alert(number, str(body.get("alert", "")), str(body.get("when", "")), finding, raised, now_us())


# Operations of the control socket.


async def alerts_list(daemon: Daemon, request: Request) -> Reply:
    """What is raised now, and what is watched for."""
    watch = daemon.alerts.watch
    return Reply(
        {
            "items": [
                {**alert.describe(), "seen": alert.seen_us, "count": alert.count}
                for alert in sorted(watch.active.values(), key=lambda a: a.raised_us)
            ],
            "overflow": watch.overflow,
            "rules": [
                {"name": rule.name, "when": str(rule.when), "send": list(rule.send)}
                for rule in watch.settings.rules
            ],
            "targets": [
                {"name": name, "how": str(target.how)}
                for name, target in sorted(watch.settings.targets.items())
            ],
        }
    )


async def alerts_test(daemon: Daemon, request: Request) -> Reply:
    """Send a test message to the target `name`."""
    daemon.alerts.try_target(request.text("name"))
    return Reply({"name": request.text("name")})
