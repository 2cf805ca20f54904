"""What followers get is what the view `flows` says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from sectool.events import FLOW_DTYPE, Kind, Phase
from sectool.filters import Filter
from store.flows import Tail, list_flows, no_new_flows
from store.query import run
from store.wording import address_text

ENUMS = {
    "point": 5,
    "action": 6,
    "direction": 4,
    "auth_method": 5,
    "auth_result": 5,
    "encryption": 4,
    "cipher": 4,
    "conn_state": 10,
    "decider": 4,
    "pending_action": 6,
    "flags": 16,
    "drop_reason": 90,
    "peer_reason": 400,
}


@pytest.fixture(params=range(2))
def records(lab: Any, request: pytest.FixtureRequest) -> NDArray[np.void]:
    """Records with random content, sound or not, and what they may name put into the dictionary."""
    dice = np.random.default_rng(request.param)
    records = np.frombuffer(dice.bytes(FLOW_DTYPE.itemsize * 300), FLOW_DTYPE).copy()
    records["kind"] = Kind.FLOW
    for name, count in ENUMS.items():
        records[name] = dice.integers(0, count, 300)
    for name in ("ts", "start", "end"):
        records[name] = dice.integers(0, 1 << 52, 300)
    records["end"][::2] = 0
    records["history"][::3] = np.frombuffer(b"ShADadFf\0\0\0\0", "V12")[0]
    known = [
        lab.labels("app=web"),
        lab.workload("web", 1),
        lab.identity("spiffe://x/y", 1),
        lab.rule("allow a to b"),
    ]
    for name in (
        "source_labels",
        "destination_workload",
        "source_identity",
        "rule",
        "pending_rule",
        "policy_hash",
    ):
        records[name] = dice.choice([0, *known], 300)
    for column, length in (("source_ip", 12), ("destination_ip", 8)):
        some = records[column][::2].copy().view(np.uint8).reshape(-1, 16)
        some[:, :length] = np.frombuffer((bytes(10) + b"\xff\xff")[:length], np.uint8)
        records[column][::2] = some.view("V16")[:, 0]
    return records


def stored(lab: Any, records: NDArray[np.void]) -> Any:
    """A store that has taken them in."""
    for record in records:
        assert lab.ring().put(record.tobytes())
    store = lab.inside()
    store.step()
    return store


def alike(got: pa.Table, want: pa.Table) -> None:
    for name in want.column_names:
        assert got[name].to_pylist() == want[name].to_pylist(), name
    assert got.schema.equals(want.schema)


def test_new_flows_are_like_the_view(lab: Any, records: NDArray[np.void]) -> None:
    records["phase"] = Phase.VERDICT
    store = stored(lab, records)
    tail = Tail(Filter(), 0)
    got = tail.advance(store.catalog, "flow_records", store.next_seq, 1000)
    want = run(store.catalog, "SELECT * FROM flows ORDER BY seq").table
    assert want.num_rows == 300
    assert got is not None
    alike(got, want)
    assert tail.next_seq == store.next_seq
    assert tail.advance(store.catalog, "flow_records", store.next_seq, 1000) is None


def test_listed_flows_are_like_the_view(lab: Any, records: NDArray[np.void]) -> None:
    """Also with records that came later, alone, several times, or before the verdict."""
    dice = np.random.default_rng(1)
    records["phase"] = dice.integers(1, 4, 300)
    for at in np.flatnonzero(dice.integers(0, 3, 300)[1:]):
        same = ("start", "event_id", "source_ip", "destination_ip", "ip_version")
        if not (records["phase"][at] == records["phase"][at + 1] != Phase.UPDATE):
            for name in same:
                records[name][at + 1] = records[name][at]
    records["end"] = np.where(records["phase"] == Phase.END, records["start"] + 5_000_000, 0)
    store = stored(lab, records)
    got = list_flows(store.catalog, Filter(), last=1000).table
    want = run(store.catalog, "SELECT * FROM flows ORDER BY event_start, event_id").table
    assert 50 < want.num_rows < 300
    alike(got.sort_by("seq"), want.sort_by("seq"))


def test_a_limit_leaves_the_rest_for_the_next_time(lab: Any) -> None:
    for flow in range(10):
        lab.ring().put(lab.record(flow=flow))
    store = lab.inside()
    store.step()
    tail, seen = Tail(Filter(), 0), []
    while (table := tail.advance(store.catalog, "flow_records", store.next_seq, 3)) is not None:
        assert table.num_rows <= 3
        seen += table["seq"].to_pylist()
    assert seen == list(range(1, 11))


def test_nothing(lab: Any) -> None:
    store = lab.inside()
    assert no_new_flows(store.catalog).schema.equals(run(store.catalog, "SELECT * FROM flows").table.schema)


def test_addresses() -> None:
    high = pa.array([0, 0, 0x2001_0DB8_0000_0000], pa.uint64())
    low = pa.array([0xFFFF_0A00_0001, 1, 5], pa.uint64())
    assert address_text(high, low).to_pylist() == ["10.0.0.1", "::1", "2001:db8::5"]
