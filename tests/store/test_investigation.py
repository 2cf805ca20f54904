"""Investigations of a small history, and their report in every form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sectool.cli.investigated import html, markdown, plain
from sectool.errors import UsageError
from store.reader import Reader, open_reader
from tests.store.shop import HOUR, fill, settle


@pytest.fixture(scope="module")
def past(
    make_lab: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Reader]]:
    lab = make_lab(tmp_path_factory.mktemp("investigation"))
    fill(lab)
    evil = {"point": 1, "source_ip": "203.0.113.66", "start": lab.T0 + 26 * HOUR + 7, "flow": 900}
    labels = lab.labels("app=web,tier=front")
    lab.ring().put(lab.record(**evil, source_labels=labels))
    settle(lab)
    reader = open_reader(lab.state, lab.run)
    yield lab, reader
    reader.close()


def test_a_workload_under_denials(past: tuple[Any, Reader]) -> None:
    lab, reader = past
    d = reader.ask("investigate", about="app=web", since=lab.T0 + 20 * HOUR, until=lab.T0 + 28 * HOUR)
    assert d["sort"] == "labels"
    assert sum(b["denied"] for b in d["activity"]) == 300
    assert sum(b["allowed"] for b in d["activity"]) == 2
    (denied,) = d["denied"]
    assert (denied["count"], denied["reason"], denied["service"]) == (300, "default_deny", "tcp/5432")
    assert [p["revision"] for p in d["policies"]] == [1, 2]
    assert d["processes"][0]["workload"] == "web"
    radius = d["radius"]
    assert radius["subject"] == "app=web"
    assert [(r["name"], r["hops"]) for r in radius["then"]["reached"]] == [("app=cache", 1), ("app=db", 2)]
    early = reader.ask("investigate", about="app=web", since=lab.T0, until=lab.T0 + 12 * HOUR)["radius"]
    assert [(r["name"], r["hops"]) for r in early["then"]["reached"]] == [("app=db", 1)]
    assert early["now"]["revision"] == 2


@pytest.mark.parametrize("about", ["203.0.113.9", "spiffe://lab/web", "policy:shop", "workload:web"])
def test_whatever_is_asked_about(past: tuple[Any, Reader], about: str) -> None:
    lab, reader = past
    d = reader.ask("investigate", about=about, since=lab.T0, until=lab.T0 + 48 * HOUR)
    assert d["peers"]
    for text in (plain(d, False), markdown(d), html(d)):
        assert about.rpartition("/")[2] in text.replace("\\", "")
    flow = reader.flows(first=1).table["event_id"][0].as_py()
    assert reader.ask("investigate", about=flow)["timeline"]
    with pytest.raises(UsageError):
        reader.ask("investigate", about="nobody at all")


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        assert not any(name.startswith("on") or name in ("href", "src") for name, _ in attrs)


def test_hostile_names_stay_text(past: tuple[Any, Reader]) -> None:
    lab, reader = past
    d = reader.ask("investigate", about="app=web", since=lab.T0, until=lab.T0 + 48 * HOUR)
    d["about"] = "<script>alert(1)</script>\x1b[31m|`[x](http://evil.example)"
    d["peers"][0]["source"] = d["denied"][0]["rule"] = d["radius"]["subject"] = d["about"]
    tags = _Tags()
    page = html(d)
    tags.feed(page)
    assert "script" not in tags.seen
    assert "svg" in tags.seen
    for text in (page, markdown(d), plain(d, False)):
        assert "\x1b" not in text
    rows = [line for line in markdown(d).splitlines() if line.startswith("|")]
    assert all(not re.search(r"(?<!\\)[<`\[]", line) for line in rows)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows if "alert" in line}) <= 2
