"""Connectivity as pictures in text formats: Graphviz, Mermaid, and an SVG that needs nothing else to be seen.

    layers: a party stands right of those that call it; cycles are cut where they were entered; within a layer
    parties are put near the middle of their callers, which keeps most lines from crossing.

Names come from peers: each format gets them escaped in its own way, and no control character passes.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from html import escape as html_escape
from typing import Any

from sectool.cli.text import escape, fit, width

Edge = Mapping[str, Any]
Node = Mapping[str, Any]

_CHAR, _HIGH, _GAP_X, _GAP_Y, _EDGE = 7.2, 30, 130, 18, 24
_MAX_NAME = 40
_MAX_SERVICES = 4


def edge_text(edge: Edge) -> str:
    """`tcp/443, tcp/80 · 120 allowed, 3 denied`."""
    services = list(edge["services"])
    more = f", +{len(services) - _MAX_SERVICES}" if services[_MAX_SERVICES:] else ""
    text = ", ".join(services[:_MAX_SERVICES]) + more
    counts = ", ".join(f"{edge[what]} {what}" for what in ("allowed", "denied") if edge[what])
    return f"{text} · {counts}" if counts else text


def graphviz(nodes: Sequence[Node], edges: Sequence[Edge]) -> str:
    """A graph in the DOT language."""

    def quoted(text: str) -> str:
        return '"' + escape(text).replace("\\", "\\\\").replace('"', '\\"') + '"'

    lines = ["digraph connectivity {", "  rankdir=LR;", "  node [shape=box, style=rounded, fontname=sans];"]
    lines += [f"  {quoted(n['name'])}{'' if n['identified'] else ' [style=dashed]'};" for n in nodes]
    for edge in edges:
        style = ", color=red, fontcolor=red, style=dashed" if not edge["allowed"] else ""
        lines.append(
            f"  {quoted(edge['source'])} -> {quoted(edge['destination'])} [label={quoted(edge_text(edge))}{style}];"
        )
    return "\n".join([*lines, "}"]) + "\n"


def mermaid(nodes: Sequence[Node], edges: Sequence[Edge]) -> str:
    """A Mermaid flowchart."""

    def quoted(text: str) -> str:
        kept = "".join(c if c.isalnum() or c in " =,./:+-_·" else f"#{ord(c)};" for c in escape(text))
        return f'"{kept}"'

    ids = {node["name"]: f"n{number}" for number, node in enumerate(nodes)}
    lines = ["flowchart LR"]
    lines += [f"  {ids[n['name']]}[{quoted(n['name'])}]" for n in nodes]
    for edge in edges:
        arrow = "-->" if edge["allowed"] else "-.->"
        lines.append(f"  {ids[edge['source']]} {arrow}|{quoted(edge_text(edge))}| {ids[edge['destination']]}")
    return "\n".join(lines) + "\n"


def layers(names: Sequence[str], links: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Names in columns from left to right, each column from top to bottom."""
    after: dict[str, list[str]] = defaultdict(list)
    before: dict[str, list[str]] = defaultdict(list)
    for source, destination in links:
        if source != destination and destination not in after[source]:
            after[source].append(destination)
            before[destination].append(source)
    rank = dict.fromkeys(names, 0)
    waiting = {name: len(before[name]) for name in names}
    ready = deque(name for name in names if not waiting[name])
    left = dict.fromkeys(names)
    while left:
        if not ready:  # only cycles are left: enter one where least comes in
            ready.append(min(left, key=lambda name: (waiting[name], names.index(name))))
        name = ready.popleft()
        if name not in left:
            continue
        del left[name]
        for other in after[name]:
            if other in left:
                rank[other] = max(rank[other], rank[name] + 1)
                waiting[other] -= 1
                if not waiting[other]:
                    ready.append(other)
    columns: list[list[str]] = [[] for _ in range(max(rank.values(), default=-1) + 1)]
    for name in names:
        columns[rank[name]].append(name)
    place = {name: float(i) for column in columns for i, name in enumerate(column)}
    for _ in range(4):
        for column in columns:
            middle = {n: _mean([place[m] for m in before[n] or after[n]], place[n]) for n in column}
            column.sort(key=lambda n: (middle[n], n))
            place.update({name: float(i) for i, name in enumerate(column)})
    return columns


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def svg(nodes: Sequence[Node], edges: Sequence[Edge], title: str = "Who talks to whom") -> str:
    """One SVG document, without scripts, fonts or links."""
    identified = {node["name"]: bool(node["identified"]) for node in nodes}
    columns = layers(list(identified), [(e["source"], e["destination"]) for e in edges])
    boxes: dict[str, tuple[float, float, float]] = {}
    x = 20.0
    high = max((len(column) for column in columns), default=1) * (_HIGH + _GAP_Y)
    for column in columns:
        wide = max(width(_shown(name)) for name in column) * _CHAR + 24
        top = 50 + (high - len(column) * (_HIGH + _GAP_Y)) / 2
        for row, name in enumerate(column):
            boxes[name] = (x, top + row * (_HIGH + _GAP_Y), wide)
        x += wide + _GAP_X
    total_w, total_h = max(x - _GAP_X + 60, 320), high + 90
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_w:.0f} {total_h:.0f}" width="{total_w:.0f}"'
        f' height="{total_h:.0f}" font-family="sans-serif" font-size="12" role="img">',
        f"<title>{_xml(title)}</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        '<defs><marker id="end" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0L8,4L0,8z" fill="context-stroke"/></marker></defs>',
        f'<text x="20" y="26" font-size="15" font-weight="bold">{_xml(title)}</text>',
    ]
    most = max((e["allowed"] + e["denied"] for e in edges), default=1) or 1
    out += [_line(edge, boxes, most) for edge in edges]
    out += [_box(name, place, identified[name]) for name, place in boxes.items()]
    legend = "dashed line: all denied; dashed box: no identity; width: how many connections"
    out.append(f'<text x="20" y="{total_h - 14:.0f}" fill="#667">{legend}</text></svg>')
    return "\n".join(out) + "\n"


def _box(name: str, place: tuple[float, float, float], identified: bool) -> str:
    left, top, wide = place
    dashed = "" if identified else ' stroke-dasharray="4 3"'
    return (
        f'<g><title>{_xml(name)}</title><rect x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{_HIGH}"'
        f' rx="6" fill="#f4f7fb" stroke="#456"{dashed}/>'
        f'<text x="{left + 12:.1f}" y="{top + 19:.1f}">{_xml(_shown(name))}</text></g>'
    )


def _shown(name: str) -> str:
    return fit(escape(name), _MAX_NAME)


def _xml(text: object) -> str:
    return html_escape(escape(text), quote=True)


def _line(edge: Edge, boxes: Mapping[str, tuple[float, float, float]], most: int) -> str:
    x1, top1, wide1 = boxes[edge["source"]]
    x2, top2, wide2 = boxes[edge["destination"]]
    y1, y2 = top1 + _HIGH / 2, top2 + _HIGH / 2
    if edge["source"] == edge["destination"]:  # a loop at its right
        x = x1 + wide1
        path = (x, y1 - 6), (x + 40, y1 - 26), (x + 40, y1 + 26), (x, y1 + 6)
    elif x2 > x1:
        x, reach = x1 + wide1, (x2 - x1 - wide1) / 2
        path = (x, y1), (x + reach, y1), (x2 - reach, y2), (x2, y2)
    else:  # back, below the boxes
        low, end = max(y1, y2) + _EDGE + 20, x2 + wide2 / 2
        path = (x1 + wide1 / 2, top1 + _HIGH), (x1, low), (end, low), (end, top2 + _HIGH)
    begin, *rest = (f"{x:.1f},{y:.1f}" for x, y in path)
    thick = 1 + 3 * ((edge["allowed"] + edge["denied"]) / most) ** 0.5
    color, dash = "#2a7", ""
    if edge["denied"]:
        color, dash = ("#c80", "") if edge["allowed"] else ("#c22", ' stroke-dasharray="6 4"')
    text = f"{edge['source']} -> {edge['destination']}: {edge_text(edge)}"
    return (
        f'<path d="M{begin} C{" ".join(rest)}" fill="none" stroke="{color}" stroke-width="{thick:.1f}"{dash}'
        f' marker-end="url(#end)"><title>{_xml(text)}</title></path>'
    )


def bars_svg(title: str, series: Sequence[tuple[str, int, int]]) -> str:
    """Stacked bars, allowed (green) below denied (red), one for each (name, allowed, denied)."""
    wide, high = 720, 160
    most = max((a + d for _, a, d in series), default=0) or 1
    step = (wide - 60) / max(1, len(series))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high + 40}" width="{wide}" height="{high + 40}"'
        ' font-family="sans-serif" font-size="11" role="img">',
        f"<title>{_xml(title)}</title>",
        f'<text x="50" y="14" font-weight="bold">{_xml(title)}</text><text x="4" y="34">{most}</text>',
        f'<path d="M50,24V{high}H{wide}" fill="none" stroke="#889"/>',
    ]
    for i, (name, allowed, denied) in enumerate(series):
        tall = (high - 26) / most
        left, base = 52 + i * step, float(high)
        for count, color, what in ((allowed, "#2a7", "allowed"), (denied, "#c22", "denied")):
            if count:
                base -= count * tall
                out.append(
                    f'<rect x="{left:.1f}" y="{base:.1f}" width="{max(1.0, step - 1):.1f}" height="{count * tall:.1f}"'
                    f' fill="{color}"><title>{_xml(f"{name}: {count} {what}")}</title></rect>'
                )
    if series:
        out.append(f'<text x="50" y="{high + 16}">{_xml(series[0][0])}</text>')
        out.append(f'<text x="{wide}" y="{high + 16}" text-anchor="end">{_xml(series[-1][0])}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
