"""Rows to stdout in the format that was asked for: tables for people, versioned data for programs."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TextIO

from sectool.cli.text import escape, fit, width

Row = Mapping[str, Any]


class Format(StrEnum):
    """What `-o` takes."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"
    YAML = "yaml"


STYLES = {"good": "32", "bad": "31", "warn": "33", "dim": "2", "bold": "1"}


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table. `show` turns a row into text (escaped afterwards, whatever it is)."""

    title: str
    show: Callable[[Row], object]
    style: Callable[[Row], str] | None = None
    wide: bool = False  # only in `-o wide`
    right: bool = False
    least: int = 0  # columns to hold when rows are streamed


def paint(text: str, style: str, color: bool) -> str:
    """`text` in one of STYLES, or as it is when colour is off or the style is empty."""
    code = STYLES.get(style)
    return f"\x1b[{code}m{text}\x1b[0m" if color and code else text


def dumps(value: object, *, indent: int | None = None) -> str:
    """JSON in ASCII: no control character, C1 or bidi mark can reach a terminal through it."""
    text = json.dumps(value, indent=indent, ensure_ascii=True, default=str, allow_nan=False)
    return text.replace("\x7f", "\\u007f")


class Table:
    """Aligned columns, either of rows known beforehand or streamed line by line."""

    def __init__(
        self, columns: Sequence[Column], *, wide: bool, color: bool, out: TextIO | None = None
    ) -> None:
        self.columns = [c for c in columns if wide or not c.wide]
        self.color = color
        self.out = out or sys.stdout
        terminal = self.out.isatty()
        # Only a terminal has an edge; a file or pipe gets whole lines.
        self.edge = shutil.get_terminal_size().columns if terminal and not wide else None
        self.widths = [max(width(c.title), c.least) for c in self.columns]

    def measure(self, rows: Iterable[Row]) -> None:
        """Widen the columns to hold `rows`."""
        for row in rows:
            for i, column in enumerate(self.columns):
                self.widths[i] = max(self.widths[i], width(escape(column.show(row))))

    def header(self) -> None:
        """Print the titles."""
        self._line([(c.title, "bold") for c in self.columns])

    def row(self, row: Row) -> None:
        """Print one row."""
        self._line([(escape(c.show(row)), c.style(row) if c.style else "") for c in self.columns])

    def _line(self, cells: list[tuple[str, str]]) -> None:
        room = self.edge
        parts: list[str] = []
        for i, (text, style) in enumerate(cells):
            if room is not None:
                if room <= 0:
                    break
                text = fit(text, room)
            pad = " " * max(0, self.widths[i] - width(text))
            painted = paint(text, style, self.color)
            parts.append(pad + painted if self.columns[i].right else painted + pad)
            if room is not None:
                room -= max(self.widths[i], width(text)) + 2
        self.out.write("  ".join(parts).rstrip() + "\n")


def emit(
    rows: Sequence[Row],
    columns: Sequence[Column],
    fmt: Format,
    schema: str,
    *,
    color: bool = False,
    extra: Row | None = None,
    out: TextIO | None = None,
) -> None:
    """Write `rows` as `fmt`. `schema` names the row type and its version, e.g. `sectool.flow/1`.

    JSON and YAML give one object: schema, `extra`, and `items`. JSON lines and CSV give the rows alone.
    """
    out = out or sys.stdout
    match fmt:
        case Format.TABLE | Format.WIDE:
            table = Table(columns, wide=fmt is Format.WIDE, color=color, out=out)
            table.measure(rows)
            table.header()
            for row in rows:
                table.row(row)
        case Format.JSON:
            out.write(dumps({"schema": schema, **(extra or {}), "items": list(rows)}, indent=2) + "\n")
        case Format.JSONL:
            for row in rows:
                out.write(json_line(row, schema) + "\n")
        case Format.CSV:
            writer = CsvWriter(out)
            for row in rows:
                writer.row(row)
        case Format.YAML:
            out.write(yaml_text({"schema": schema, **(extra or {}), "items": [dict(r) for r in rows]}))


def emit_document(document: Row, fmt: Format, schema: str, out: TextIO | None = None) -> None:
    """Write one object as JSON or YAML (every other format has its own renderer)."""
    out = out or sys.stdout
    whole = {"schema": schema, **document}
    if fmt is Format.YAML:
        out.write(yaml_text(whole))
    elif fmt is Format.JSONL:
        out.write(dumps(whole) + "\n")
    else:
        out.write(dumps(whole, indent=2) + "\n")


def json_line(row: Row, schema: str) -> str:
    """One JSON object on one line, with its schema first."""
    return dumps({"schema": schema, **row})


def yaml_text(value: object) -> str:
    """YAML in ASCII, keys in the order given."""
    import yaml

    plain = json.loads(dumps(value))  # to plain types; also what the other formats would show
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=False, width=110)
    return text


class CsvWriter:
    """CSV with the keys of the first row as header; nested values as JSON, text escaped."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.keys: list[str] | None = None

    def row(self, row: Row) -> None:
        """Write one row, and the header before the first."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        if self.keys is None:
            self.keys = list(row)
            writer.writerow([escape(k) for k in self.keys])
        writer.writerow([_csv_cell(row.get(k)) for k in self.keys])
        self.out.write(buffer.getvalue())


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list | tuple):
        return dumps(value)
    return escape(value)
