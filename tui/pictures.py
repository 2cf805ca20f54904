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
PATIENCE_S = 60.0


async def draw(source: Source, folder: Path) -> list[Path]:
    """Open each view, wait for its answers, and save what stands there."""
    app = Console(source, theme="textual-dark")
    out: list[Path] = []
    async with app.run_test(size=SIZE) as pilot:
        for name, key, *_ in VIEWS:
            await pilot.press(*({"pulse": ("4",), "why": ("u", "w"), "query": ("s", "f5")}.get(name, (key,))))
            deadline = time.monotonic() + PATIENCE_S
            await pilot.pause(0.3)
            while (app.view.asking or not app.facts) and time.monotonic() < deadline:
                await pilot.pause(0.1)
            await pilot.pause(0.3)
            file = folder / f"top-{name}.svg"
            # Fonts from the net are left out: looking at the docs must tell nobody.
            drawn = app.export_screenshot(title=f"sectool top: {name}")
            file.write_text(re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL))
            out.append(file)
            if name == "query":
                await pilot.press("escape")
    return out


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for made in asyncio.run(draw(Source(Paths.resolve(), read_only=True), target)):
        sys.stdout.write(f"{made}\n")
