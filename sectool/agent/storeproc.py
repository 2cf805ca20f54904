"""The store process as the agent's child: it drains all rings into segments and serves reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sectool.agent.children import Child, Process
from sectool.agent.nursery import Nursery, Program
from sectool.api.paths import Paths

DRAIN_S = 10.0  # at the end it takes what is left in the rings


class StoreProcess:
    """Packets never wait for it: while it is down the rings fill, and what does not fit is counted."""

    def __init__(
        self, paths: Paths, group: str | None, nursery: Nursery, died: Callable[[str], None]
    ) -> None:
        self._paths = paths
        self._group = group
        self._nursery = nursery
        self.child = Child("event store", self._start, died)

    async def _start(self) -> Process:
        args = [
            *("--state", str(self._paths.state), "--run", str(self._paths.run)),
            *(("--group", self._group) if self._group else ()),
        ]
        return await self._nursery.bear(Program.STORE, args)

    async def begin(self, timeout_s: float) -> bool:
        """Start it; whether it serves reads within `timeout_s` seconds."""
        await self.child.begin()
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not await self.answers():
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    async def answers(self) -> bool:
        """Whether somebody listens on its socket."""
        try:
            _, writer = await asyncio.open_unix_connection(str(self._paths.events_socket))
        except OSError:
            return False
        writer.close()
        return True

    async def stop(self) -> None:
        """Let it drain and close its segments."""
        await self.child.stop(DRAIN_S)
