"""Text that came from peers, made safe to print."""

from __future__ import annotations

import unicodedata

# Cc: C0, DEL, C1. Cf: bidi overrides and isolates, zero-width and tag characters. Cs: lone surrogates.
# Zl, Zp: line and paragraph separators. Co, Cn: whatever a font or terminal cares to make of them.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn"})


def escape(text: object) -> str:
    """`text` with every character that could steer a terminal or reorder a line written as an escape.

    The result is one line, holds no control character, and a backslash escape is visible as such.
    """
    raw = str(text)
    if raw.isascii() and raw.isprintable():
        return raw
    return "".join(_escaped(c) if unicodedata.category(c) in _UNSAFE else c for c in raw)


def escape_block(text: str) -> str:
    """Like `escape`, for text of our own layout: line breaks and tabs stay."""
    return "\n".join("\t".join(escape(part) for part in line.split("\t")) for line in text.split("\n"))


def _escaped(char: str) -> str:
    code = ord(char)
    if char in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[char]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def width(text: str) -> int:
    """Terminal columns of escaped text (East Asian wide characters count two, combining marks none)."""
    if text.isascii():
        return len(text)
    return sum(_columns(c) for c in text)


def _columns(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def fit(text: str, columns: int) -> str:
    """`text` cut to at most `columns` terminal columns, the cut shown by `…`."""
    if width(text) <= columns:
        return text
    out: list[str] = []
    room = columns - 1
    for char in text:
        room -= _columns(char)
        if room < 0:
            break
        out.append(char)
    return "".join(out) + "…"


def duration(seconds: float) -> str:
    """`90` → `1m30s`: two largest units, for people."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2]) or "0s"


def size(octets: int) -> str:
    """Bytes in binary units: `1536` → `1.5KiB`."""
    value = float(octets)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{int(value)}{unit}" if unit == "B" else f"{value:.1f}{unit}"
        value /= 1024
    return str(octets)
