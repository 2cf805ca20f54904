"""The report of an investigation for a terminal, as Markdown, and as one HTML file with plots.

The three say the same: sections of text and tables, made once, and written down in three ways. All cells came from
peers or files; each way escapes them for its own reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape as html_escape
from typing import Any

from sectool.cli.drawing import bars_svg, svg
from sectool.cli.moments import show_time
from sectool.cli.output import paint
from sectool.cli.text import duration, escape, size, width

_STYLE = (
    "body{font:14px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#223}"
    "table{border-collapse:collapse;margin:.6rem 0}td,th{border:1px solid #ccd;padding:.2rem .55rem;text-align:left;"
    "vertical-align:top}th{background:#eef2f7}svg{max-width:100%;height:auto}.bad{color:#b00}"
)


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, sentences, and perhaps a table. `picture` is SVG, for HTML alone."""

    title: str
    text: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    picture: str = ""


def sections(document: dict[str, Any]) -> list[Section]:
    """The report's parts, in the order they are read."""
    return [
        _summary(document),
        _denied(document),
        _peers(document),
        _timeline(document),
        _policies(document),
        _parties(document),
        _processes(document),
        *_radius(document),
    ]


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def _rows(rows: Sequence[Sequence[object]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(map(_cell, row)) for row in rows)


def _summary(d: dict[str, Any]) -> Section:
    allowed = sum(b["allowed"] for b in d["activity"])
    denied = sum(b["denied"] for b in d["activity"])
    lasted = duration((d["until"] - d["since"]) / 1e6)
    text = (
        f"{d['sort']} {d['about']}, {show_time(d['since'])} to {show_time(d['until'])} ({lasted})",
        f"{allowed} connections allowed, {denied} denied, with {len(d['peers'])} pairs of parties and services",
    )
    series = [(show_time(b["ts"]), b["allowed"], b["denied"]) for b in d["activity"]]
    return Section("Summary", text, picture=bars_svg("Connections over time", series))


def _denied(d: dict[str, Any]) -> Section:
    rows = [
        (
            r["count"],
            r["source"],
            r["destination"],
            r["service"],
            _reason(r),
            r["rule"],
            show_time(r["first"]),
            show_time(r["last"]),
        )
        for r in d["denied"]
    ]
    head = ("TIMES", "SOURCE", "DESTINATION", "SERVICE", "REASON", "RULE", "FIRST", "LAST")
    return Section("Denied attempts", () if rows else ("none",), head, _rows(rows))


def _reason(row: dict[str, Any]) -> str:
    return f"{row['reason']} ({row['peer_reason']} there)" if row["peer_reason"] else str(row["reason"])


def _peers(d: dict[str, Any]) -> Section:
    rows = [
        (
            p["source"],
            p["destination"],
            p["service"],
            p["allowed"] or "",
            p["denied"] or "",
            size(p["bytes"]) if p["bytes"] else "",
        )
        for p in d["peers"]
    ]
    edges: dict[tuple[str, str], dict[str, Any]] = {}
    known = set()
    for p in d["peers"]:
        edge = edges.setdefault(
            (p["source"], p["destination"]),
            {
                "source": p["source"],
                "destination": p["destination"],
                "services": [],
                "allowed": 0,
                "denied": 0,
            },
        )
        edge["services"].append(p["service"])
        edge["allowed"] += p["allowed"]
        edge["denied"] += p["denied"]
        known |= {p[end] for end in ("source", "destination") if p[f"{end}_labels"] is not None}
    names = sorted({name for pair in edges for name in pair})
    nodes = [{"name": name, "identified": name in known} for name in names]
    picture = svg(nodes, list(edges.values()), "Who it talks to") if edges else ""
    head = ("SOURCE", "DESTINATION", "SERVICE", "ALLOWED", "DENIED", "BYTES")
    return Section("Peers", () if rows else ("none",), head, _rows(rows), picture)


def _timeline(d: dict[str, Any]) -> Section:
    rows = [
        (
            show_time(e["ts"], precise=True),
            e["kind"],
            e["text"] + (f" x{e['count']}" if e["count"] > 1 else ""),
        )
        for e in d["timeline"]
    ]
    more = ("there is more; `sectool timeline` shows it",) if d["timeline_truncated"] else ()
    return Section("Timeline", more if rows else ("nothing",), ("TIME", "KIND", "WHAT"), _rows(rows))


def _policies(d: dict[str, Any]) -> Section:
    rows = [
        (
            p["revision"],
            p["host"],
            show_time(p["since"]),
            show_time(p["until"]),
            p["author"],
            p["reason"],
            p["hash"][:16],
        )
        for p in d["policies"]
    ]
    head = ("REVISION", "HOST", "SINCE", "UNTIL", "AUTHOR", "REASON", "HASH")
    return Section("Policy in force", () if rows else ("none on record",), head, _rows(rows))


def _parties(d: dict[str, Any]) -> Section:
    rows = [(p["side"], p["ip"], p["labels"], p["identity"], p["flows"]) for p in d["parties"]]
    head = ("SIDE", "ADDRESS", "LABELS", "IDENTITY", "CONNECTIONS")
    return Section("Identities and addresses", () if rows else ("none",), head, _rows(rows))


def _processes(d: dict[str, Any]) -> Section:
    rows = [
        (p["workload"], p["pid"], p["user"], p["executable"], p["sha256"], p["unit"], p["flows"])
        for p in d["processes"]
    ]
    head = ("WORKLOAD", "PID", "USER", "EXECUTABLE", "SHA-256", "UNIT", "CONNECTIONS")
    return Section("Processes on this host", () if rows else ("none on record",), head, _rows(rows))


def _radius(d: dict[str, Any]) -> list[Section]:
    radius = d["radius"]
    if not radius["subject"]:
        return [Section("Blast radius", ("there is no identity whose reach could be told",))]
    out = []
    before = {r["name"] for r in radius["then"]["reached"]} if radius["then"] else set()
    for when, words in (("then", "then"), ("now", "by the newest policy on record")):
        found = radius[when]
        title = f"Blast radius {words}"
        if found is None:
            out.append(
                Section(
                    title, (f"what {radius['subject']} could reach is not known: no policy is on record",)
                )
            )
            continue
        reached = found["reached"]
        text = [
            f"by revision {found['revision']}, {radius['subject']} can reach {_parties_text(len(reached))},"
            f" {sum(r['hops'] == 1 for r in reached)} of them directly"
            f" ({radius['known']} label sets were tried: those on record, and those that rules name)"
        ]
        if when == "now" and radius["then"]:
            now = {r["name"] for r in reached}
            text += [f"no longer: {name}" for name in sorted(before - now)]
            text += [f"newly: {name}" for name in sorted(now - before)]
        if not found["complete"]:
            text.append("there was too much to judge: more may be reachable")
        rows = [(r["hops"], r["name"], r["via"], ", ".join(r["services"])) for r in reached]
        edges = [
            {
                "source": r["via"],
                "destination": r["name"],
                "services": list(r["services"]),
                "allowed": 1,
                "denied": 0,
            }
            for r in reached
        ]
        names = dict.fromkeys([radius["subject"], *(r[end] for r in reached for end in ("via", "name"))])
        nodes = [{"name": name, "identified": not name.startswith("net:")} for name in names]
        picture = svg(nodes, edges, title) if len(names) <= 60 else ""
        out.append(
            Section(title, tuple(text), ("STEPS", "PARTY", "CALLED BY", "SERVICES"), _rows(rows), picture)
        )
    return out


def _parties_text(count: int) -> str:
    return "1 party" if count == 1 else f"{count} parties"


def plain(document: dict[str, Any], color: bool) -> str:
    """The report for a terminal."""
    out: list[str] = []
    for section in sections(document):
        out += [paint(section.title.upper(), "bold", color), *(f"  {escape(line)}" for line in section.text)]
        if section.rows:
            table = [section.head, *(tuple(map(escape, row)) for row in section.rows)]
            widths = [max(width(row[i]) for row in table) for i in range(len(section.head))]
            for row in table:
                cells = (cell + " " * (widths[i] - width(cell)) for i, cell in enumerate(row))
                out.append(("  " + "  ".join(cells)).rstrip())
        out.append("")
    return "\n".join(out)


def markdown(document: dict[str, Any]) -> str:
    """The report as Markdown (CommonMark with tables)."""
    out = [f"# Investigation: {_mark(document['about'])}", ""]
    for section in sections(document):
        out += [f"## {_mark(section.title)}", "", *(f"{_mark(line)}  " for line in section.text)]
        if section.text:
            out.append("")
        if section.rows:
            out.append("| " + " | ".join(section.head) + " |")
            out.append("|" + "---|" * len(section.head))
            out += ["| " + " | ".join(map(_mark, row)) + " |" for row in section.rows]
            out.append("")
    return "\n".join(out)


_SPECIAL = frozenset("\\`*_{}[]<>()#|!~&$^@")


def _mark(text: str) -> str:
    return "".join(f"\\{c}" if c in _SPECIAL else c for c in escape(text)).replace("://", "\\://")


def html(document: dict[str, Any]) -> str:
    """The report as one HTML file: no script, nothing loaded from anywhere."""
    title = f"Investigation: {document['about']}"
    out = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{_html(title)}</title><style>{_STYLE}</style></head><body><h1>{_html(title)}</h1>",
    ]
    for section in sections(document):
        out.append(f"<h2>{_html(section.title)}</h2>")
        out += [f"<p>{_html(line)}</p>" for line in section.text]
        if section.picture:
            out.append(section.picture)
        if section.rows:
            head = "".join(f"<th>{_html(cell)}</th>" for cell in section.head)
            body = "".join(
                "<tr>" + "".join(f"<td>{_html(cell)}</td>" for cell in row) + "</tr>" for row in section.rows
            )
            out.append(f"<table><tr>{head}</tr>{body}</table>")
    return "\n".join([*out, "</body></html>"]) + "\n"


def _html(text: str) -> str:
    return html_escape(escape(text), quote=True)
