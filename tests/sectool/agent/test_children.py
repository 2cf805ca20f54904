"""Children are kept alive, ever more patiently, and told apart from those that were stopped on purpose."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from sectool.agent.children import LONGEST_DELAY_S, Backoff, Child, bound_to_parent, describe

DEADLINE = 15.0


async def spawn(code: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(*bound_to_parent([sys.executable, "-c", code]))


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.01)


def test_backoff_is_immediate_then_doubles_to_a_bound_and_forgives_a_long_life() -> None:
    backoff = Backoff()
    waits = [backoff.after(0.1) for _ in range(8)]
    assert waits[:4] == [0.0, 0.2, 0.4, 0.8]
    assert waits[-1] == LONGEST_DELAY_S
    assert backoff.after(60.0) == 0.0


def test_a_killed_child_comes_back_and_its_death_is_told() -> None:
    async def scenario() -> None:
        deaths: list[str] = []
        child = Child("c", lambda: spawn("import signal; signal.pause()"), deaths.append)
        await child.begin()
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: child.pid not in (None, first))
        assert deaths == ["was killed by SIGKILL"]
        assert child.restarts == 1
        await child.stop(5.0)
        assert child.pid is None
        assert len(deaths) == 1  # a stop is no death

    asyncio.run(scenario())


def test_one_that_ignores_sigterm_is_killed() -> None:
    async def scenario() -> None:
        ready = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); signal.pause()"

        async def start() -> asyncio.subprocess.Process:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", ready, stdout=asyncio.subprocess.PIPE
            )
            assert process.stdout is not None
            assert await process.stdout.read(1) == b"x"
            return process

        child = Child("c", start, lambda _: None)
        await child.begin()
        await child.stop(0.2)
        assert child.process is not None
        assert child.process.returncode == -signal.SIGKILL

    asyncio.run(scenario())


def test_a_program_that_cannot_start_is_an_error_at_first_and_tried_again_later() -> None:
    async def scenario() -> None:
        async def missing() -> asyncio.subprocess.Process:
            return await asyncio.create_subprocess_exec("/nonexistent/program")

        with pytest.raises(OSError, match="No such file"):
            await Child("c", missing, lambda _: None).begin()

        attempts: list[int] = []

        async def once() -> asyncio.subprocess.Process:
            attempts.append(1)
            if len(attempts) == 2:
                raise FileNotFoundError(2, "No such file")
            return await spawn("pass" if len(attempts) == 1 else "import signal; signal.pause()")

        deaths: list[str] = []
        child = Child("c", once, deaths.append)
        await child.begin()
        await until(lambda: len(attempts) == 3 and child.pid is not None)
        assert deaths[0] == "ended with status 0"
        assert deaths[1].startswith("does not start")
        await child.stop(5.0)

    asyncio.run(scenario())


def test_children_end_with_their_parent_however_it_ends(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, os, signal\n"
        "from sectool.agent.children import bound_to_parent\n"
        "wait = 'import signal; print(1, flush=True); signal.pause()'\n"
        "p = subprocess.Popen(bound_to_parent([sys.executable, '-c', wait]), stdout=subprocess.PIPE)\n"
        "p.stdout.read(1)\n"
        "print(p.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )

    async def scenario() -> None:
        parent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
        )
        assert parent.stdout is not None
        orphan = int(await parent.stdout.readline())
        await parent.wait()
        await until(lambda: not alive(orphan))

    asyncio.run(scenario())


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("status", "text"),
    [(0, "ended with status 0"), (-9, "was killed by SIGKILL"), (-200, "was killed by signal 200")],
)
def test_describe(status: int, text: str) -> None:
    assert describe(status) == text
