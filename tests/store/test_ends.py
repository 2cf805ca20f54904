"""Two hosts' stores: what both saw, what one saw, where they differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sectool.events import Action, DropReason
from store.ends import join_ends
from store.reader import open_reader
from tests.store.shop import settle

SECOND = 1_000_000


def test_one_sided_and_unlike(make_lab: Callable[[Path], Any], tmp_path: Path) -> None:
    web, db = make_lab(tmp_path), make_lab(tmp_path)
    late = 3 * SECOND  # their clocks differ

    def both(flow: int, **there: Any) -> dict[str, Any]:
        return {"flow": flow, "source_port": 40_000 + flow, "start": web.T0 + flow * SECOND, **there}

    for flow in range(5):
        web.ring().put(web.record(**both(flow), point=1))
    for flow in (0, 1, 3):
        kinds: dict[int, dict[str, Any]] = {
            1: {"action": Action.DENY, "drop_reason": DropReason.DEFAULT_DENY},
            3: {"encryption": 2},
        }
        different = kinds.get(flow, {})
        db.ring().put(
            db.record(
                **{**both(flow), "start": db.T0 + flow * SECOND + late, **different}, point=2, direction=2
            )
        )
    db.ring().put(db.record(**both(9), point=2, source_ip="10.9.9.9"))  # from a host that is not asked
    # web's flow 4 used the ports of flow 0 again, a minute later: not the same flow
    web.ring().put(web.record(**{**both(7), "source_port": 40_000, "start": web.T0 + 90 * SECOND}, point=1))
    settle(web)
    settle(db)
    readers = [(name, open_reader(lab.state, lab.run)) for name, lab in (("web", web), ("db", db))]
    try:
        found = join_ends(readers, web.T0, web.T0 + 3600 * SECOND)
    finally:
        for _, reader in readers:
            reader.close()
    assert (found.both, found.elsewhere, found.truncated) == (3, 1, False)
    assert [row["start"] for row in found.lonely] == [web.T0 + n * SECOND for n in (2, 4, 90)]
    assert [row["covered"] for row in found.lonely] == [True, True, False]
    assert [row["differences"] for row in found.unlike] == [
        ["verdict: allow at the initiator, deny default_deny at the responder"],
        ["encryption: plain at the initiator, encrypted at the responder"],
    ]
