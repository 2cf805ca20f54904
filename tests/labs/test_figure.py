"""The protocol document's figure is what the committed capture shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from labs import figure
from sectool.errors import UsageError

IMAGES = Path(__file__).parents[2] / "docs" / "img"


def test_the_figure_is_drawn_from_the_capture() -> None:
    packets = figure.read(IMAGES / "handshake.pcap")
    assert figure.draw(packets) == (IMAGES / "handshake.svg").read_text(encoding="utf-8")


def test_the_capture_shows_a_whole_handshake_and_bare_packets_after_it() -> None:
    packets = figure.read(IMAGES / "handshake.pcap")
    kinds = [[kind for kind, _, _ in p.parts] for p in packets]
    assert [p.name for p in packets[:3]] == ["SYN", "SYN-ACK", "ACK"]
    assert kinds[0] == ["header", "header", "option", "hello"]
    assert kinds[1] == ["header", "header", "option", "answer"]
    assert kinds[2] == ["header", "header", "record"]
    heard = next(i for i, p in enumerate(packets) if i > 1 and not p.outward)
    assert all(set(parts) <= {"header", "data"} for parts in kinds[heard:])


def test_a_capture_without_a_connection_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pcap"
    empty.write_bytes((IMAGES / "handshake.pcap").read_bytes()[:24])
    with pytest.raises(UsageError, match="holds no TCP connection"):
        figure.read(empty)
