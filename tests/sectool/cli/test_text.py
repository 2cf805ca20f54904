"""No character that steers a terminal or reorders a line passes."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectool.cli.text import duration, escape, escape_block, fit, size, width


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain", "plain"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x9b31m", "\\x9b31m"),  # C1: the one-byte CSI
        ("a\x07b\x7f", "a\\x07b\\x7f"),
        ("line\nbreak\r\ttab", "line\\nbreak\\r\\ttab"),
        ("exe\u202efdp.txt", "exe\\u202efdp.txt"),
        ("\u2066x\u2069", "\\u2066x\\u2069"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        ("\U000e0041tag", "\\U000e0041tag"),
        ("lone \ud800", "lone \\ud800"),
        ("\u2028", "\\u2028"),
        ("Größe 名前", "Größe 名前"),
        (7, "7"),
    ],
)
def test_escape(raw: object, shown: str) -> None:
    assert escape(raw) == shown


@given(st.text(st.characters()))
def test_nothing_unsafe_passes(text: str) -> None:
    out = escape(text)
    assert not any(unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn"} for c in out)
    out.encode("utf-8")


@given(st.text())
def test_block_keeps_only_breaks_and_tabs(text: str) -> None:
    out = escape_block(text)
    assert out.count("\n") == text.count("\n")
    assert not any(unicodedata.category(c) in {"Cc", "Cf"} for c in out if c not in "\n\t")


@given(st.text(), st.integers(1, 60))
def test_fit_never_exceeds(text: str, columns: int) -> None:
    safe = escape(text)
    out = fit(safe, columns)
    assert width(out) <= columns
    assert out == safe or out.endswith("…")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.9, "59s"), (90, "1m30s"), (3600, "1h"), (90061, "1d1h"), (-5, "0s")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("octets", "text"),
    [(0, "0B"), (1023, "1023B"), (1536, "1.5KiB"), (1 << 40, "1.0TiB"), (1 << 60, "1048576.0TiB")],
)
def test_size(octets: int, text: str) -> None:
    assert size(octets) == text
