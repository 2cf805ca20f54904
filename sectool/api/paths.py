"""Where everything of one daemon lives: two folders, state (kept) and run (gone after `down`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

DEFAULT_STATE = "/var/lib/sectool"
DEFAULT_RUN = "/run/sectool"


@dataclass(frozen=True, slots=True)
class Paths:
    """The state and run folders of one daemon and the names inside them (see docs/architecture.md)."""

    state: Path
    run: Path

    @classmethod
    def resolve(
        cls, state: str | os.PathLike[str] | None = None, run: str | os.PathLike[str] | None = None
    ) -> Paths:
        """Absolute paths from options, else `SECTOOL_STATE` / `SECTOOL_RUN`, else the system's folders."""
        return cls(
            Path(state or os.environ.get("SECTOOL_STATE") or DEFAULT_STATE).absolute(),
            Path(run or os.environ.get("SECTOOL_RUN") or DEFAULT_RUN).absolute(),
        )

    @property
    def ca(self) -> Path:
        return self.state / "ca"

    @property
    def host(self) -> Path:
        return self.state / "host"

    @property
    def settings(self) -> Path:
        return self.state / "sectool.yaml"

    @property
    def control_history(self) -> Path:
        return self.state / "control.sqlite"

    @property
    def events(self) -> Path:
        return self.state / "events"

    @property
    def control_socket(self) -> Path:
        return self.run / "control.sock"

    @property
    def events_socket(self) -> Path:
        return self.run / "events.sock"

    @property
    def pid_file(self) -> Path:
        return self.run / "agent.pid"

    @property
    def log_file(self) -> Path:
        return self.run / "agent.log"

    @property
    def programs(self) -> Path:
        """Programs started by `sectool run` that a restarted daemon has to know again."""
        return self.run / "programs.json"

    @property
    def installed(self) -> Path:
        """What the kernel was changed to, so that `down` can undo it without the daemon."""
        return self.run / "installed.json"

    def agent_ring(self) -> Path:
        return self.run / "ring-agent"

    def worker_ring(self, number: int) -> Path:
        return self.run / f"ring-worker-{number}"
