"""Whether denial is in force: modes `enforce` and `observe`, and the broken glass that suspends it for a while.

The mode is what was chosen last, in `state/mode.json`; without that file, or with one that cannot be read, it is
enforce. A restart changes neither the mode nor the end of a suspension. That end is kept twice, by the calendar and by
the clock that runs since boot, and the earlier counts: whoever sets the calendar back gains nothing. Each packet worker
knows it, too, and ends the suspension by itself if nobody tells it to.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sectool.agent.roles import ROOT, SECURITY, held
from sectool.api.server import Peer, Reply, Request
from sectool.errors import PrivilegeError, SectoolError, UsageError
from sectool.events import Type, now_us

if TYPE_CHECKING:
    from sectool.agent.daemon import Daemon

log = logging.getLogger("sectool.agent")

SHORTEST_S: Final = 1
LONGEST_S: Final = 24 * 3600
MAX_REASON: Final = 1000
ALERT: Final = "glass broken"
_FILE: Final = "mode.json"
_RULES: Final = "rules of the mode"
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


class Mode(StrEnum):
    """What becomes of what policy denies."""

    ENFORCE = "enforce"
    OBSERVE = "observe"  # it passes, and is recorded as what would have been denied


@dataclass(frozen=True, slots=True)
class Now:
    """The clocks: UTC microseconds, microseconds since boot (suspended time included), and which boot."""

    utc_us: int
    boot_us: int
    boot: str

    @classmethod
    def read(cls) -> Now:
        """Ask the kernel."""
        return cls(now_us(), time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000, _BOOT.read_text().strip())


@dataclass(frozen=True, slots=True)
class Suspension:
    """Denial suspended: by whom, why, since and until when."""

    by: str
    reason: str
    began_us: int
    until_us: int
    boot: str
    until_boot_us: int

    @classmethod
    def begin(cls, by: str, reason: str, seconds: int, now: Now) -> Suspension:
        """From now on, for so long."""
        us = seconds * 1_000_000
        return cls(by, reason, now.utc_us, now.utc_us + us, now.boot, now.boot_us + us)

    def left_us(self, now: Now) -> int:
        """Microseconds until its end, 0 when it is over. Never more than it was begun for."""
        left = min(self.until_us - now.utc_us, self.until_us - self.began_us)
        if now.boot == self.boot:
            left = min(left, self.until_boot_us - now.boot_us)
        return max(0, left)

    def carried_over(self, now: Now) -> Suspension:
        """As it goes on in this boot, by whose clock it ends from now on as well."""
        if now.boot == self.boot:
            return self
        return replace(self, boot=now.boot, until_boot_us=now.boot_us + self.left_us(now))


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is in the file."""

    mode: Mode = Mode.ENFORCE
    since_us: int = 0
    by: str = ""
    reason: str = ""
    suspension: Suspension | None = None


def load(state: Path) -> Chosen:
    """What was chosen last. Raises SectoolError for a file that cannot be understood."""
    path = state / _FILE
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return Chosen()
    except (OSError, ValueError) as error:
        raise SectoolError(
            f"cannot read {path}: {error}", "`sectool mode enforce` (or observe) writes it anew"
        ) from None


def parse(data: bytes) -> Chosen:
    """The file's bytes. Raises ValueError."""
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("not a mapping")
    broken = found.get("suspension")
    suspension = None
    if broken is not None:
        if not isinstance(broken, dict):
            raise ValueError("the suspension is not a mapping")
        suspension = Suspension(
            _field(broken, "by", str),
            _field(broken, "reason", str),
            _field(broken, "began_us", int),
            _field(broken, "until_us", int),
            _field(broken, "boot", str),
            _field(broken, "until_boot_us", int),
        )
    return Chosen(
        Mode(_field(found, "mode", str)),
        _field(found, "since_us", int),
        _field(found, "by", str),
        _field(found, "reason", str),
        suspension,
    )


def _field(table: Mapping[str, Any], name: str, kind: type) -> Any:
    value = table.get(name)
    if type(value) is not kind:
        raise ValueError(f"{name} is missing, or no {kind.__name__}")
    return value


def save(state: Path, chosen: Chosen) -> None:
    """Write it, whole or not at all, so that it outlives a crash of the host. Raises SectoolError."""
    path = state / _FILE
    new = path.with_suffix(".new")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(json.dumps(asdict(chosen), indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise SectoolError(f"cannot write {path}: {error.strerror}", "nothing has changed") from None


class Modes:
    """The mode of one daemon. `daemon` may be without parts that come later; nothing is told before `start`."""

    def __init__(self, daemon: Daemon, chosen: Mode | None) -> None:
        """`chosen`: by whoever starts the daemon; None: as before."""
        self._daemon = daemon
        self._state = daemon.paths.state
        self._trouble: SectoolError | None = None
        try:
            self.chosen = load(self._state)
        except SectoolError as error:
            self.chosen, self._trouble = Chosen(), error
        self._carry_over()
        self._before: Mode | None = None  # what a start changed, to be put on record
        before = self.chosen.mode
        if chosen is not None and chosen is not before:
            self.chosen = replace(
                self.chosen,
                mode=chosen,
                since_us=now_us(),
                by=Peer(0, os.getuid(), 0).name,
                reason="sectool up",
            )
            self._before = before
            save(self._state, self.chosen)

    def _carry_over(self) -> None:
        """After a boot the calendar alone tells what is left; from here on setting it back wins nothing again."""
        broken = self.chosen.suspension
        if broken is None or (going_on := broken.carried_over(Now.read())) is broken:
            return
        self.chosen = replace(self.chosen, suspension=going_on)
        with contextlib.suppress(SectoolError):  # it counts while this daemon runs, at least
            save(self._state, self.chosen)

    @property
    def mode(self) -> Mode:
        """Enforce or observe, whatever is suspended."""
        return self.chosen.mode

    @property
    def observing(self) -> bool:
        """Whether nothing is denied now."""
        return self.mode is Mode.OBSERVE or self.left_us() > 0

    def left_us(self) -> int:
        """How long denial is suspended still."""
        broken = self.chosen.suspension
        return 0 if broken is None else broken.left_us(Now.read())

    def told(self) -> dict[str, Any]:
        """For a packet worker: whether to deny, and when to begin again by itself (microseconds; None: when told)."""
        if self.mode is Mode.OBSERVE:
            return {"observing": True, "for_us": None}
        left = self.left_us()
        return {"observing": left > 0, "for_us": left or None}

    def describe(self) -> dict[str, Any]:
        """For `status`."""
        broken = self.chosen.suspension
        left = self.left_us()
        return {
            "mode": str(self.mode),
            "observing": self.observing,
            "mode_since": self.chosen.since_us or None,
            "mode_by": self.chosen.by,
            "mode_reason": self.chosen.reason,
            "break_glass": None
            if broken is None or not left
            else {
                "by": broken.by,
                "reason": broken.reason,
                "began": broken.began_us,
                "until": broken.until_us,
                "left_s": -(-left // 1_000_000),
            },
        }

    def start(self) -> None:
        """The daemon is up: say how it is, and go on with what was begun before."""
        if self._trouble is not None:
            self._daemon.health.raise_("mode", f"{self._trouble.message}; enforcing")
        if self._before is not None:
            facts = {"mode": str(self.mode), "before": str(self._before), "actor": self.chosen.by}
            self._daemon.events.emit(
                Type.MODE_CHANGED, host=self._daemon.host.name, **facts, reason=self.chosen.reason
            )
        if self.mode is Mode.OBSERVE:
            log.warning("observing: nothing is denied (`sectool mode enforce` begins)")
        broken = self.chosen.suspension
        if broken is not None and self.left_us():
            log.warning("denial is suspended by %s: %s", broken.by, broken.reason)
            self._alarm(broken)
        else:
            self.watch()

    def choose(self, mode: Mode, by: str, reason: str) -> None:
        """Enforce or observe from now on. Raises SectoolError, and then nothing has changed.

        Enforcing waits for nothing: neither a full disk nor a full ring may keep denial away.
        """
        before = self.mode
        chosen = replace(self.chosen, mode=mode, since_us=now_us(), by=by, reason=reason)
        if mode is Mode.ENFORCE:
            self._enforce(before, chosen)
            return
        if before is not mode:
            self._on_record(Type.MODE_CHANGED, mode=str(mode), before=str(before), actor=by, reason=reason)
        save(self._state, chosen)
        self.chosen, self._trouble = chosen, None
        self._daemon.health.clear("mode")
        log.warning("mode %s, by %s: %s", mode, by, reason or "no reason given")
        self._tell()

    def _enforce(self, before: Mode, chosen: Chosen) -> None:
        self.chosen, self._trouble = chosen, None
        self._tell()
        log.warning("mode %s, by %s: %s", chosen.mode, chosen.by, chosen.reason or "no reason given")
        if before is not chosen.mode:
            facts = {"mode": str(chosen.mode), "before": str(before), "actor": chosen.by}
            self._daemon.events.emit(
                Type.MODE_CHANGED, host=self._daemon.host.name, **facts, reason=chosen.reason
            )
        try:
            save(self._state, chosen)
        except SectoolError as error:
            self._daemon.health.raise_("mode", f"{error.message}; enforcing, but only until the next start")
        else:
            self._daemon.health.clear("mode")

    def suspend(self, seconds: int, by: str, reason: str) -> Suspension:
        """Suspend denial. Raises UsageError while it is: nobody extends it without ending it, which is on record."""
        broken = self.chosen.suspension
        if broken is not None and self.left_us():
            raise UsageError(
                f"denial is suspended already, by {broken.by}: {broken.reason}",
                "end that first (sectool break-glass --end), which is recorded, then begin anew",
            )
        if self.mode is Mode.OBSERVE:
            raise UsageError(
                "nothing is enforced in mode observe: there is no glass to break",
                "sectool mode enforce begins",
            )
        suspension = Suspension.begin(by, reason, seconds, Now.read())
        self._on_record(Type.BREAK_GLASS, actor=by, reason=reason, until=suspension.until_us, seconds=seconds)
        chosen = replace(self.chosen, suspension=suspension)
        save(self._state, chosen)
        self.chosen = chosen
        log.warning("denial is suspended for %d s by %s: %s", seconds, by, reason)
        self._tell()
        self._alarm(suspension)
        return suspension

    def resume(self, by: str, why: str) -> Suspension:
        """Deny again. Raises UsageError when nothing is suspended."""
        broken = self.chosen.suspension
        if broken is None or not self.left_us():
            raise UsageError("denial is not suspended", "sectool status shows what is in force")
        self._end(broken, by, why)
        return broken

    def watch(self) -> None:
        """Once a second: a suspension whose time has come is over."""
        broken = self.chosen.suspension
        if broken is not None and not self.left_us():
            self._end(broken, "sectool agent", "its time was over")

    def _end(self, broken: Suspension, by: str, why: str) -> None:
        self.chosen = replace(self.chosen, suspension=None)
        self._tell()  # first: what can go wrong with the disk must not keep it open
        seconds = max(0, now_us() - broken.began_us) // 1_000_000
        self._daemon.events.emit(
            Type.BREAK_GLASS_ENDED, actor=by, why=why, began_by=broken.by, seconds=seconds
        )
        log.warning("denial is in force again: %s", why)
        self._daemon.alerts.let_go(ALERT)
        try:
            save(self._state, self.chosen)
        except SectoolError as error:
            self._daemon.health.raise_("mode", error.message)

    def _tell(self) -> None:
        for worker in self._daemon.workers:
            worker.send({"t": "mode", **self.told()})

    def _alarm(self, broken: Suspension) -> None:
        until = time.strftime("%H:%M:%S UTC", time.gmtime(broken.until_us / 1e6))
        self._daemon.alerts.hold(
            ALERT,
            f"denial is suspended until {until} by {broken.by}: {broken.reason}",
            {"by": broken.by, "reason": broken.reason, "until": broken.until_us},
        )

    def _on_record(self, kind: Type, **facts: Any) -> None:
        if not self._daemon.events.emit(kind, host=self._daemon.host.name, **facts):
            raise SectoolError(
                "this cannot be put on record: the ring of events is full", "try again in a moment"
            )


# Operations of the control socket.


def _permit(daemon: Daemon, peer: Peer, what: str) -> None:
    mine = held(peer, daemon.settings.roles)
    if ROOT not in mine and SECURITY not in mine:
        groups = " or ".join(daemon.settings.roles.get(SECURITY, ()))
        raise PrivilegeError(
            f"{peer.name} may not {what}",
            f"it takes root or the role {SECURITY}" + (f" (group {groups})" if groups else ""),
        )


def _reason(request: Request) -> str:
    reason = request.text("reason").strip()
    if len(reason) > MAX_REASON:
        raise UsageError(f"{request.op}: the reason is longer than {MAX_REASON} characters")
    return reason


async def mode_set(daemon: Daemon, request: Request) -> Reply:
    """Enforce or observe: `mode`, `reason`."""
    _permit(daemon, request.peer, "change the mode")
    word = request.text("mode")
    if word not in list(Mode):
        raise UsageError(f"there is no mode {word!r}", f"modes are {', '.join(Mode)}")
    async with daemon.activation:
        before = daemon.modes.mode
        daemon.modes.choose(Mode(word), request.peer.name, _reason(request))
        try:
            await daemon.follow_mode()
        except SectoolError as error:
            # Not the name under which RuleWatch tells of missing rules: it would clear this at its next look.
            daemon.health.raise_(_RULES, f"they are not as mode {word} wants them: {error.message}")
            raise
        daemon.health.clear(_RULES)
    return Reply({"before": str(before), **daemon.modes.describe()})


async def break_glass(daemon: Daemon, request: Request) -> Reply:
    """Suspend denial for `seconds` because of `reason`; with `end`, end it."""
    if request.fields.get("end") is True:
        _permit(daemon, request.peer, "end the suspension of denial")
        why = _reason(request) or "ended by hand"
        async with daemon.activation:
            ended = daemon.modes.resume(request.peer.name, why)
        return Reply({"began_by": ended.by, **daemon.modes.describe()})
    _permit(daemon, request.peer, "suspend denial")
    seconds, reason = request.number("seconds"), _reason(request)
    if seconds is None or not SHORTEST_S <= seconds <= LONGEST_S:
        raise UsageError(
            f"denial can be suspended for {SHORTEST_S} s to {LONGEST_S // 3600} h", "e.g. --for 10m"
        )
    if not reason:
        raise UsageError("breaking the glass needs a reason", '--reason "why"')
    async with daemon.activation:
        daemon.modes.suspend(seconds, request.peer.name, reason)
    return Reply(daemon.modes.describe())
