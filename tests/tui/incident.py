"""The incident of docs/incident.md, played in a lab by keys: `sudo python -m tests.tui.incident DIR` draws it there.

With a second folder, every view of the console is drawn into that, on another such night with more people about: the
pictures of docs/console.md and of the README.

web reads its orders from db. At night the network is split into zones: a guardrail keeps the front away from the back,
and the shop's permission is now for another workload. The operator sits at db's console and has only its keys.
"""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from labs.lab import SECTOOL, Lab
from labs.topology import POLICIES, SHOP
from sectool.api.paths import Paths
from sectool.errors import SectoolError
from tests.tui.conftest import screen
from tui.app import Console
from tui.grid import Grid
from tui.pictures import picture
from tui.source import Source
from tui.views.pulse import Pulse
from tui.views.why import Why

HOSTS = tuple(host for host in SHOP.hosts if host.name in ("web", "db"))
ALLOWED = "allow app=web to call app=db on tcp/5432 encrypted"
INSTEAD = "allow app=orders to call app=db on tcp/5432 encrypted"
EXPECTED = '"app=web,env=prod -> app=db,env=prod tcp/5432 encrypted"'
GUARDRAIL = """---
kind: Guardrail
name: zone-split
owner: security
rules:
  - deny zone=front to call zone=back because "SEC-4711 segmentation"
"""
REASON = "SEC-4711: zones"
PATIENCE_S = 90.0
SIZE = (120, 36)
# The shop, without the shop: what it asks of its database, twice a second, one line an answer.
READS = (
    "while :; do psql -X -At 'host={db} user=shop dbname=postgres connect_timeout=2'"
    " -c 'select count(*) from orders' 2>/dev/null || echo no; sleep 0.3; done"
)


def split(text: str) -> str:
    """The night's change of the lab's policy."""
    changed = text.replace(ALLOWED, INSTEAD).replace(EXPECTED, EXPECTED.replace("app=web", "app=orders"))
    return changed.rstrip() + "\n" + GUARDRAIL


@dataclass(slots=True)
class Night:
    """A lab in which the change has just been made. `answers` is what the shop got from its database."""

    lab: Lab
    answers: Path

    def read(self, since: int = 0) -> list[str]:
        """The shop's answers after the first `since`: numbers of orders, or `no`."""
        return self.answers.read_text().split()[since:]

    def source(self) -> Source:
        """What db's console looks at."""
        db = self.lab["db"]
        return Source(Paths.resolve(str(db.state), str(db.run_folder)))


@contextmanager
def night() -> Iterator[Night]:
    """Lab up, traffic flowing, then the change; and down again."""
    with tempfile.TemporaryDirectory(prefix="shop-") as folder:
        policy = Path(folder) / "shop.yaml"  # explanations name the file, and pictures show them
        policy.write_text((POLICIES / "shop.yaml").read_text())
        lab = Lab(
            f"night{secrets.token_hex(3)}", replace(SHOP, hosts=HOSTS, policies=(("lab.example", policy),))
        )
        lab.up(temporary=True)
    try:
        web, db = lab["web"], lab["db"]
        here = Night(lab, lab.folder / "answers")
        with here.answers.open("w") as out:
            shop = web.popen(
                [SECTOOL, "run", "--label", "app=web", "--", "sh", "-c", READS.format(db=db.host.ip4)],
                out=out,
                err=subprocess.DEVNULL,
            )
        try:
            _wait("the shop reads its orders", lambda: here.read()[2:])
            changed = db.folder / "split.yaml"
            changed.write_text(split(db.sectool("policy", "show")))
            db.sectool("policy", "apply", str(changed), "--reason", REASON)
            _wait("the shop is down", lambda: here.read()[-2:] == ["no", "no"])
            yield here
        finally:
            shop.kill()
            shop.wait()
    finally:
        lab.down()


def _wait(what: str, condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise SectoolError(f"waited {PATIENCE_S:.0f} s in vain for: {what}")
        time.sleep(0.05)


@dataclass(slots=True)
class Step:
    """What the operator sees at one point, in words, as text and as a picture, and the keys that led there."""

    words: str
    keys: tuple[str, ...]
    text: str
    drawn: str


@dataclass(slots=True)
class Operator:
    """Somebody with a keyboard and eyes."""

    app: Console
    pilot: Pilot[None]
    keys: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    _seen: int = 0

    async def press(self, *keys: str) -> None:
        """Type."""
        for key in keys:
            self.keys.append(key)
            await self.pilot.press(key)

    async def wait(self, what: str, condition: Callable[[], object]) -> None:
        """Look at the screen until something shows there."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > end:
                raise SectoolError(f"waited {PATIENCE_S:.0f} s in vain for: {what}\n{self.screen()}")
            await self.pilot.pause(0.05)
        await self.pilot.pause()

    def screen(self) -> str:
        """What stands on it."""
        return screen(self.app)

    def look(self, words: str) -> None:
        """Keep what is seen now."""
        title = f"sectool top on db: {words}"
        drawn = picture(self.app, title)
        self.steps.append(Step(words, tuple(self.keys[self._seen :]), self.screen(), drawn))
        self._seen = len(self.keys)

    @property
    def why(self) -> Why:
        """The view Why; it has to be in sight."""
        assert isinstance(self.app.view, Why)
        return self.app.view

    def denial(self) -> dict[str, Any]:
        """The denied group under the cursor of Pulse."""
        assert isinstance(self.app.view, Pulse)
        found: dict[str, Any] = self.app.view.selected() or {}
        return found


async def play(console: Operator) -> None:
    """From the landing view to a shop that works. Raises SectoolError when what is waited for does not come."""
    app, pilot = console.app, console.pilot
    await console.wait("the denial in Pulse", lambda: console.denial().get("policy") == "zone-split")
    console.look("Pulse: who is denied now, by which guardrail, and what was changed just before")

    await console.press("enter")
    await console.wait("the explanation", lambda: console.why.step == 0)
    console.look("Why: the guardrail, its owner, its revision, since when and by whom")

    await console.press("b", "o")
    await console.wait("the policy of before", lambda: "zone-split" not in console.screen())
    await console.wait("its text", lambda: ALLOWED in console.screen())
    console.look("Policies as of just before the change: there was no such guardrail")

    await console.press("0", "w", "d")
    await console.wait("the draft and its back-test", lambda: console.why.step == 2)
    console.look("The drafted fix, and what it would have changed in the last day")

    await console.press("a", "y")
    await console.wait("the guardrail's end", lambda: console.why.step == 4)
    await console.press("u")
    await console.wait("the denial that was behind it", lambda: len(app.query_one("#denied", Grid).rows) > 1)
    for _ in app.query_one("#denied", Grid).rows:
        if not console.denial().get("rule"):
            break
        await console.press("j")
        await pilot.pause()
    console.look("Behind the guardrail another denial: the permission went in the same change")

    await console.press("enter")
    await console.wait("the second explanation", lambda: console.why.step == 0)
    await console.press("d")
    await console.wait("its draft and back-test", lambda: console.why.step == 2)
    console.look("The smallest permission, drafted as a staged policy and back-tested")

    await console.press("a")
    await console.wait("the question", lambda: len(app.screen_stack) == 2)
    console.look("Nothing is changed without a question")
    await console.press("y")
    await console.wait("the staged policy", lambda: console.why.step == 3)
    console.look("Applied, staged: it is judged and recorded, and decides nothing yet")

    await console.press("P", "y")
    await console.wait("the promotion", lambda: console.why.step == 4)
    await console.press("f")
    grid = app.query_one("#flows", Grid)
    await console.wait("traffic", lambda: grid.rows and "✓ allow" in grid.rows[-1].cells)
    console.look("Promoted: the shop reads its orders again")


async def watch(here: Night) -> Operator:
    """One operator's night, played; what they saw and typed."""
    source = here.source()
    try:
        app = Console(source, theme="textual-dark")
        async with app.run_test(size=SIZE) as pilot:
            operator = Operator(app, pilot)
            await play(operator)
            return operator
    finally:
        source.close()


def draw(steps: list[Step], folder: Path) -> None:
    """One picture a step, `01.svg` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, 1):
        (folder / f"{number:02}.svg").write_text(step.drawn)
        sys.stdout.write(f"{number:02}  {' '.join(step.keys) or '-':16} {step.words}\n")


def passers_by(here: Night) -> None:
    """Others who try to reach the database that night, so that there is something to tell apart."""
    web, address = here.lab["web"], here.lab["db"].host.ip4
    for label, ports in (("app=report", (5432,)), ("app=batch", (5432, 22)), ("app=crawler", (22, 80, 9187))):
        for port in ports:
            reach = ["bash", "-c", f"exec 3<>/dev/tcp/{address}/{port}"]
            web.execute(web.workload([label], reach), timeout=3.0)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        with night() as happened:
            passers_by(happened)
            folder = str(Path(sys.argv[2]).absolute())
            done = happened.lab["db"].execute([sys.executable, "-m", "tui.pictures", folder], timeout=300.0)
            sys.stdout.write(done.out + done.err)
    with night() as happened:
        seen = asyncio.run(watch(happened))
        draw(seen.steps, Path(sys.argv[1]))
        sys.stdout.write(f"{len(seen.keys)} keystrokes\n")
