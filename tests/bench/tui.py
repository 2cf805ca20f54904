"""The console on a host with millions of events stored and thousands arriving: does it answer, and does it stay small.

A lab of one host with its daemon; the events come through a ring of its own, as a worker's do. The real `sectool top`
on a terminal of its own tells first paint, processor time and memory; keys are timed in a console driven by a pilot,
from the key to the screen that has taken it in. By default small; for the record, on a calm machine:

  export SECTOOL_BENCH_TUI_EVENTS=10000000 SECTOOL_BENCH_TUI_RATE=5000 SECTOOL_BENCH_TUI_SOAK=600
  sudo -E ./dev bench tui --rounds 1
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import secrets
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import numpy as np
from textual import events
from textual.pilot import Pilot

from labs.lab import SECTOOL, Lab, Node
from labs.topology import SHOP, Topology
from sectool.api.paths import Paths
from sectool.errors import SectoolError
from tests.bench.rows import Row, row
from tests.bench.store import CHUNK, wait_for
from tui.app import Console
from tui.pace import quicken
from tui.source import Source

EVENTS = int(os.environ.get("SECTOOL_BENCH_TUI_EVENTS", "100000"))
RATE = int(os.environ.get("SECTOOL_BENCH_TUI_RATE", "1000"))  # events a second while it is measured
SOAK = float(os.environ.get("SECTOOL_BENCH_TUI_SOAK", "15"))  # seconds
FILL_RATE = 100_000
IDLE = 10.0  # seconds of a live view that nobody touches
PATIENCE = 120.0 + EVENTS / 20_000  # seconds; the more there is, the longer anything may take
FILLS = 10  # tries to have all events stored: what does not fit into the ring is lost, and made up for
ALL_DAY = 86_400.0
SIZE = (36, 120)
DEPTH = 4  # a key goes from the app to the screen, its widget, the action, and what that tells others
NOTE = "keys: a pilot's, to the screen that has taken the key in; answer: until the view's questions are answered, too"
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
# One of each kind: views, windows, time, rows, pages, panes, marks, dialogs, prompts.
KEYS = (
    *("f", "k", "k", "j", "ctrl+u", "ctrl+d", "g", "G", "space", "enter", "escape", "p", "p"),
    *("1", "2", "3", "4", "5", "6", "3", "left_square_bracket", "left_square_bracket", "right_square_bracket", "0"),
    *("slash", *"verdict=deny", "enter", "escape", "question_mark", "escape", "colon", *"pulse", "enter"),
    *("tab", "tab", "j", "m", "b", "j", "l", "j", "z", "Z"),
    *("o", "j", "d", "i", "j", "h", "j", "u", "y", "u", "r", "R", "R", "0"),
)  # fmt: skip


class Terminal:
    """`sectool top` of a host on a terminal whose output is read and thrown away."""

    def __init__(self, node: Node) -> None:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
        self._file = ours
        self.seen = bytearray()
        environment = {**node.environment(), "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        begin = time.perf_counter()
        self.process = subprocess.Popen(
            [SECTOOL, "top"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        while b"Timeline" not in self.seen:
            if time.perf_counter() - begin > PATIENCE or not self._read(1.0):
                self.close()
                raise SectoolError(f"sectool top shows nothing: {bytes(self.seen[-300:])!r}")
        self.first_paint_ms = (time.perf_counter() - begin) * 1e3
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def _read(self, seconds: float) -> bool:
        """Take what has come; False when the program has gone."""
        if not select.select([self._file], [], [], seconds)[0]:
            return self.process.poll() is None
        try:
            self.seen += os.read(self._file, 1 << 16)
        except OSError:
            return False
        del self.seen[: -(1 << 16)]
        return True

    def _drain(self) -> None:
        while self._read(1.0):
            pass

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._file, text.encode())

    def processor_s(self) -> float:
        """Processor time used so far, in seconds."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def memory(self) -> int:
        """Resident memory in bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * PAGE

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def _produce(node: Node, ring: str, rate: int, seconds: float) -> subprocess.Popen[str]:
    code = (
        "import pathlib, sys; from tests.bench.store import produce;"
        " produce(pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))"
    )
    arguments = [str(node.run_folder / ring), str(rate), str(seconds)]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


async def _keys(source: Source) -> tuple[list[float], list[float]]:
    """For every key, in ms: until the screen has taken it in, and until no question is open."""
    taken, answered = [], []
    quicken()
    app = Console(source)
    async with app.run_test(size=(SIZE[1], SIZE[0])) as pilot:
        await _idle(app, pilot)
        for key in KEYS:
            begin = time.perf_counter()
            await _press(pilot, key)
            taken.append((time.perf_counter() - begin) * 1e3)
            await _idle(app, pilot)
            answered.append((time.perf_counter() - begin) * 1e3)
    return taken, answered


async def _press(pilot: Pilot[None], key: str) -> None:
    """A key, until all widgets have taken in what it led to and the screen is painted.

    `Pilot.press` waits on until the process has been idle for a while, at least 40 ms: that is for tests to be steady.
    """
    pilot.app.post_message(events.Key(key, key if len(key) == 1 else None))
    for _ in range(DEPTH):
        await pilot.pause(0)


async def _idle(app: Console, pilot: Pilot[None]) -> None:
    """Until the view's questions are answered; the doctor's examination is no answer of the store's."""
    end = time.monotonic() + PATIENCE
    while app.sight is None or set(app.view._asking) - {"doctor"}:
        if time.monotonic() > end:
            raise SectoolError(f"{app.view_name} asks still after {PATIENCE:g} s")
        await pilot.pause(0.005)


def _fill(node: Node, source: Source, wanted: int) -> int:
    """Have `wanted` events stored; how many there are then."""

    def stored() -> int:
        return int(source.status()["store"]["flow_records"])

    for number in range(FILLS):
        missing = -(-(wanted - stored()) // CHUNK) * CHUNK
        if missing <= 0:
            break
        before = stored()
        with _produce(node, f"ring-fill-{number}", FILL_RATE, missing / FILL_RATE) as process:
            refused = json.loads(process.communicate()[0])["refused"]
        wait_for("the events are stored", lambda: stored() >= before + missing - refused, PATIENCE)  # noqa: B023
    return stored()


def one_round() -> dict[tuple[str, str, str], float]:
    """One lab; (case, metric, unit) to value."""
    topology = Topology(tuple(host for host in SHOP.hosts if host.name == "rogue"), SHOP.policies)
    lab = Lab(f"bench{secrets.token_hex(3)}", topology)
    lab.up(temporary=True)
    made: list[subprocess.Popen[str]] = []
    top: Terminal | None = None
    try:
        node = lab["rogue"]
        source = Source(Paths.resolve(str(node.state), str(node.run_folder)))
        total = _fill(node, source, max(CHUNK, EVENTS // CHUNK * CHUNK))
        made.append(_produce(node, "ring-live", RATE, ALL_DAY))
        top = Terminal(node)
        pause = threading.Event()
        pause.wait(3.0)  # the first answers
        before, begin = top.processor_s(), time.perf_counter()
        pause.wait(IDLE)
        idle = (top.processor_s() - before) / (time.perf_counter() - begin)
        taken, answered = asyncio.run(_keys(source))
        top.type("f")
        times, sizes = [], []
        begin = time.perf_counter()
        while (now := time.perf_counter() - begin) < SOAK:
            times.append(now)
            sizes.append(top.memory())
            pause.wait(min(1.0, SOAK / 10))
        settled = len(times) // 4  # the first quarter fills caches
        slope = float(np.polyfit(times[settled:], sizes[settled:], 1)[0]) * 3600 / 1e6
    finally:
        if top is not None:
            top.close()
        for process in made:
            process.kill()
            process.wait()
        lab.down()
    load = f"{total / 1e6:.3g} M stored, {RATE:,}/s"
    return {
        (load, "first_paint", "ms"): top.first_paint_ms,
        (load, "key_p50", "ms"): float(np.median(taken)),
        (load, "key_p95", "ms"): float(np.quantile(taken, 0.95)),
        (load, "key_max", "ms"): max(taken),
        (load, "answer_p95", "ms"): float(np.quantile(answered, 0.95)),
        (load, "idle_cpu", "% of a core"): idle * 100,
        (f"tail for {SOAK:g} s", "memory", "MB"): sizes[-1] / 1e6,
        (f"tail for {SOAK:g} s", "memory_slope", "MB/h"): slope,
    }


def rows(rounds: int) -> list[Row]:
    """First paint, keys, idle processor time and memory of `sectool top`."""
    measured = [one_round() for _ in range(rounds)]
    return [row("tui", *key, [one[key] for one in measured]) for key in measured[0]]
