"""Pictures of the console for the documentation, made from a running host: `python -m tui.pictures DIR`.

The host is named by SECTOOL_STATE and SECTOOL_RUN; it is only read. One SVG a view, `top-NAME.svg`.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from pathlib import Path

from sectool.api.paths import Paths
from tui.actions import VIEWS
from tui.app import Console
from tui.source import Source

SIZE = (110, 32)
KEYS = {"pulse": ("2",), "why": ("u", "w"), "identities": ("i", "G"), "query": ("s", "f5")}
PATIENCE_S = 60.0
BLANK = "&#160;"
_TEXT = re.compile(
    r'<text class="([^"]*)" x="([\d.]+)" y="([\d.]+)" textLength="([\d.]+)"([^>]*)>([^<]*)</text>'
)


def picture(app: Console, title: str) -> str:
    """What is on the screen, as SVG that every viewer draws alike.

    Fonts from the net are left out: looking at the docs must tell nobody. Blanks at the ends of a text are taken out
    and its place and length set accordingly, since some viewers drop them and stretch the rest over their place.
    """
    drawn = app.export_screenshot(title=title)
    return _TEXT.sub(_without_blanks, re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL))


def _without_blanks(found: re.Match[str]) -> str:
    style, x, y, length, rest, text = found.groups()
    left = text.removeprefix(BLANK * _ahead(text))
    bare = left[: len(left) - len(BLANK) * _ahead(left, end=True)]
    if not bare.strip():
        return ""
    columns = len(re.sub(r"&[^;]+;", "x", text))  # wide characters are drawn by nothing of ours
    cell = float(length) / columns
    begin = float(x) + cell * _ahead(text)
    width = cell * len(re.sub(r"&[^;]+;", "x", bare))
    return f'<text class="{style}" x="{begin:g}" y="{y}" textLength="{width:g}"{rest}>{bare}</text>'


def _ahead(text: str, *, end: bool = False) -> int:
    """How many blanks a text begins with, or ends with."""
    found = re.search(f"((?:{BLANK})*)$" if end else f"^((?:{BLANK})*)", text)
    return len(found[1]) // len(BLANK) if found else 0


async def draw(source: Source, folder: Path) -> list[Path]:
    """Open each view, wait for its answers, and save what stands there."""
    app = Console(source, theme="textual-dark")
    out: list[Path] = []
    async with app.run_test(size=SIZE) as pilot:
        for name, key, *_ in VIEWS:
            await pilot.press(*(KEYS.get(name, (key,))))
            deadline = time.monotonic() + PATIENCE_S
            await pilot.pause(0.3)
            while (app.view.asking or not app.facts) and time.monotonic() < deadline:
                await pilot.pause(0.1)
            await pilot.pause(0.3)
            file = folder / f"top-{name}.svg"
            file.write_text(picture(app, f"sectool top: {name}"))
            out.append(file)
            if name == "query":
                await pilot.press("escape")
    return out


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for made in asyncio.run(draw(Source(Paths.resolve(), read_only=True), target)):
        sys.stdout.write(f"{made}\n")
