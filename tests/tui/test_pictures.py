"""Pictures of the console stand alone, and every text in them is where the terminal has it."""

from __future__ import annotations

import asyncio
import re

from tests.tui.conftest import Open, screen
from tui.pictures import BLANK, picture


def test_a_picture_asks_the_net_for_nothing_and_has_every_text_in_its_place(console: Open) -> None:
    async def look() -> None:
        async with console((100, 30)) as (app, _):
            drawn = picture(app, "pulse")
            assert "url(http" not in drawn
            assert "@font-face" not in drawn
            texts = re.findall(
                r'<text class="\S+-r\d+" x="([\d.]+)" y="([\d.]+)" textLength="([\d.]+)"[^>]*>([^<]*)<', drawn
            )
            assert texts
            cell = min(float(length) / len(text) for _, _, length, text in texts if text.isalpha())
            lines = screen(app).split("\n")
            rows = sorted({float(y) for _, y, _, _ in texts})
            wanted = [line for line in lines if line.strip()]
            assert len(rows) == len(wanted)
            for x, y, length, text in texts:
                bare = re.sub(r"&[^;]+;", "x", text)
                assert not text.startswith(BLANK)
                assert not text.endswith(BLANK)
                begin = round(float(x) / cell)
                assert abs(float(length) - cell * len(bare)) < 0.01 * cell * len(bare) + 0.1
                there = wanted[rows.index(float(y))][begin : begin + len(bare)]
                plain = text.replace(BLANK, " ")
                if "&" not in plain:
                    assert there == plain

    asyncio.run(look())
