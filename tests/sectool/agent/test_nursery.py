"""Workers and stores are forked from a process that has their code, and are children as if they had been started."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
DEADLINE = 60.0

# What a packet worker is asked here: it is configured by nobody, says so, and ends.
PRELUDE = """\
import asyncio, json, os, signal, socket, sys
from pathlib import Path
from sectool.agent.nursery import Nursery, Program

async def worker(nursery):
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        process = await nursery.bear(Program.WORKER, ["--config-fd", str(fd)], [fd])
    return ours, process

def facts(pid):
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    links = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links[int(entry.name)] = os.readlink(entry)
        except FileNotFoundError:
            pass  # a program that starts opens and closes what it reads
    return {
        "name": status["Name"].strip(), "parent": int(status["PPid"]), "session": os.getsid(pid) == pid,
        "stdin": links[0], "sockets": sum(link.startswith("socket:") for link in links.values()),
        "secret": any("secret" in link for link in links.values()),
    }

async def ended(ours, process):
    ours.shutdown(socket.SHUT_WR)
    return await process.wait()

def say(**words):
    print(json.dumps(words), flush=True)
"""

LIVES = """
async def main():
    nursery = Nursery()
    secret = open(sys.argv[1])  # opened after the fork: nobody born has it
    lives = []
    for killed in (False, False, True):
        if killed:
            os.kill(nursery._pid, signal.SIGKILL)
        ours, process = await worker(nursery)
        while facts(process.pid)["name"] in ("sectool-nursery", "setpriv"):  # on its way to be the program
            await asyncio.sleep(0.01)
        lives.append(facts(process.pid) | {"status": await ended(ours, process)})
    ours, process = await worker(Nursery())
    process.kill()
    say(lives=lives, own=os.getpid(), killed=await process.wait())

asyncio.run(main())
"""

DIES = """
async def main():
    nursery = Nursery()
    fd = int(sys.argv[1])
    process = await nursery.bear(Program.WORKER, ["--config-fd", str(fd)], [fd])
    say(worker=process.pid, nursery=nursery._pid)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def run(code: str, *args: object) -> tuple[dict[str, Any], str]:
    """What the program said, and what it and its children wrote to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=DEADLINE,
        check=False,
    )
    assert done.stdout, done
    said: dict[str, Any] = json.loads(done.stdout)
    return said, done.stderr


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_who_is_born_is_a_child_like_one_that_was_started(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch()
    said, errors = run(LIVES, secret)
    *forked, started = said["lives"]
    for life in (*forked, started):
        assert life["parent"] == said["own"]
        assert life["session"]
        assert life["stdin"] == "/dev/null"
        assert life["sockets"] == 1, "its line, and nothing of ours"
        assert not life["secret"]
        assert life["status"] == 1, "nobody has configured it"
    assert [life["name"] for life in forked] == ["sectool-worker"] * 2
    assert started["name"].startswith("python"), "without a nursery it is a program"
    assert said["killed"] == -signal.SIGKILL
    assert errors.startswith("no process can be forked any more")
    assert len(errors.splitlines()) == 1


def test_they_end_with_the_agent_however_it_ends() -> None:
    ours, theirs = socket.socketpair()  # the line is not what ends it: we keep it open
    argv = [sys.executable, "-c", PRELUDE + DIES, str(theirs.fileno())]
    with (
        ours,
        subprocess.Popen(
            argv, stdout=subprocess.PIPE, text=True, cwd=ROOT, pass_fds=[theirs.fileno()]
        ) as agent,
    ):
        theirs.close()
        assert agent.stdout is not None
        said = json.loads(agent.stdout.readline())
        agent.wait(DEADLINE)
        end = time.monotonic() + DEADLINE
        while not (gone(said["worker"]) and gone(said["nursery"])):
            assert time.monotonic() < end, said
            time.sleep(0.02)
