"""What may be changed from here, and why not: what is looked at, how the console was started, who asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Need(StrEnum):
    """What an action takes."""

    NOTHING = ""
    ROLE = "role"  # one of those that may change policy; which one, depends on the documents
    ROOT = "root"


@dataclass(frozen=True, slots=True)
class Rights:
    """`never`: why nothing at all is changed. Else what the daemon says of the asker (see `sectool status -o json`)."""

    never: str = ""
    user: str = ""
    roles: tuple[str, ...] | None = None  # None: not known yet, and then the daemon is the judge

    @classmethod
    def of(cls, facts: Mapping[str, Any], never: str) -> Rights:
        """From the daemon's status."""
        caller = facts.get("caller")
        if never or not isinstance(caller, Mapping):
            return cls(never)
        return cls("", str(caller.get("user", "")), tuple(map(str, caller.get("roles", ()))))

    def why_not(self, need: Need) -> str:
        """Why what takes `need` cannot be done, for people; empty when it can be tried."""
        if need is Need.NOTHING:
            return ""
        if self.never:
            return self.never
        if self.roles is None or "root" in self.roles:
            return ""
        if need is Need.ROOT:
            return f"it is for root, and you are {self.user}: run it with sudo"
        if not self.roles:
            return (
                f"{self.user} holds no role that may change policy: run it with sudo, or join a role's group"
            )
        return ""

    @property
    def nothing(self) -> bool:
        """Whether nothing at all can be changed."""
        return bool(self.why_not(Need.ROLE))
