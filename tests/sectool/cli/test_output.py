"""One set of rows in every format: machine formats are versioned and exact, no format lets a control character out."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
import yaml

from sectool.cli.output import Column, CsvWriter, Format, Table, dumps, emit, emit_document, json_line

ROWS: list[dict[str, Any]] = [
    {"name": "web", "count": 3, "labels": {"app": "web"}},
    {"name": "evil\x1b[2J\u202e\x7f\x9b", "count": None, "labels": {}},
]
COLUMNS = [
    Column("NAME", lambda r: r["name"]),
    Column("COUNT", lambda r: r["count"] or 0, right=True),
    Column("LABELS", lambda r: r["labels"], wide=True),
]


def written(fmt: Format) -> str:
    out = io.StringIO()
    emit(ROWS, COLUMNS, fmt, "sectool.thing/1", extra={"total": 2}, out=out)
    return out.getvalue()


@pytest.mark.parametrize("fmt", list(Format))
def test_no_format_lets_a_control_character_out(fmt: Format) -> None:
    assert all(c == "\n" or c.isprintable() for c in written(fmt))


def test_json_is_versioned_and_exact() -> None:
    document = json.loads(written(Format.JSON))
    assert document["schema"] == "sectool.thing/1"
    assert document["total"] == 2
    assert document["items"] == ROWS


def test_json_lines_carry_the_schema_each() -> None:
    lines = [json.loads(line) for line in written(Format.JSONL).splitlines()]
    assert lines == [{"schema": "sectool.thing/1", **row} for row in ROWS]


def test_yaml_is_exact() -> None:
    document = yaml.safe_load(written(Format.YAML))
    assert document == {"schema": "sectool.thing/1", "total": 2, "items": ROWS}


def test_csv_has_a_header_and_nested_json() -> None:
    rows = list(csv.reader(io.StringIO(written(Format.CSV))))
    assert rows[0] == ["name", "count", "labels"]
    assert rows[1] == ["web", "3", '{"app": "web"}']
    assert rows[2][1] == ""
    assert len(rows) == 3


def test_csv_keeps_one_line_per_row() -> None:
    out = io.StringIO()
    writer = CsvWriter(out)
    writer.row({"a": 'x,"y"\nz', "b": True})
    assert list(csv.reader(io.StringIO(out.getvalue()))) == [["a", "b"], ['x,"y"\\nz', "true"]]


def test_table_aligns_and_hides_wide_columns() -> None:
    lines = written(Format.TABLE).splitlines()
    assert lines[0].split() == ["NAME", "COUNT"]
    assert lines[1].startswith("web ")
    at = lines[0].index("COUNT") + len("COUNT")
    assert lines[1][at - 1] == "3"
    assert "LABELS" in written(Format.WIDE)


def test_colour_only_where_asked() -> None:
    column = [Column("V", lambda r: r["v"], style=lambda _: "bad")]
    plain, painted = io.StringIO(), io.StringIO()
    emit([{"v": "deny"}], column, Format.TABLE, "x/1", out=plain)
    emit([{"v": "deny"}], column, Format.TABLE, "x/1", color=True, out=painted)
    assert "\x1b" not in plain.getvalue()
    assert "\x1b[31mdeny\x1b[0m" in painted.getvalue()


def test_a_terminal_gets_lines_no_longer_than_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "20")
    out = Terminal()
    emit(
        [{"a": "x" * 15, "b": "y" * 30}],
        [Column("A", lambda r: r["a"]), Column("B", lambda r: r["b"])],
        Format.TABLE,
        "x/1",
        out=out,
    )
    assert all(len(line) <= 20 for line in out.getvalue().splitlines())
    assert "…" in out.getvalue()


def test_streamed_rows_keep_to_the_least_width() -> None:
    out = io.StringIO()
    table = Table(
        [Column("A", lambda r: r["a"], least=6), Column("B", lambda r: r["b"])],
        wide=False,
        color=False,
        out=out,
    )
    table.header()
    table.row({"a": "x", "b": "y"})
    assert out.getvalue() == "A       B\nx       y\n"


def test_document_formats() -> None:
    for fmt, load in ((Format.JSON, json.loads), (Format.JSONL, json.loads), (Format.YAML, yaml.safe_load)):
        out = io.StringIO()
        emit_document({"a": 1}, fmt, "x/1", out)
        assert load(out.getvalue()) == {"schema": "x/1", "a": 1}


def test_not_a_number_is_refused_rather_than_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps(float("nan"))


def test_json_line_is_one_line() -> None:
    assert "\n" not in json_line({"a": "x\ny"}, "x/1")
