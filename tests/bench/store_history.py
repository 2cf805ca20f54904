"""A made-up past of any length, written as the store writes: for measuring questions of millions of events.

    python -m tests.bench.store_history FOLDER --events 100000000 --days 4

A fleet of a few hundred label sets on a thousand addresses. Which pair talks how often follows a power law; most
flows last less than a second, some for days; the long ones are told of by UPDATE records; some never end. Events of
each hour are a segment, sealed and indexed by the store's own code. The same seed gives the same events.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sectool.clock import DAY, HOUR, MINUTE, SECOND
from sectool.events import FLOW_DTYPE, Action, ConnState, Kind, Phase
from sectool.labels import LabelSet, stable_id
from store import segment
from store.catalog import Catalog
from store.control import Actor, ControlHistory
from store.ingest import MAX_SLOTS, Ingest
from store.shelf import Shelf

T0 = 1_772_323_200_000_000  # 2026-03-01T00:00:00Z
PAIRS = 20_000
APPS, ENVS, HOSTS = 60, 5, 1000
SERVICES = (443, 8080, 5432, 6379, 9092, 53, 3306, 8443)
UPDATES = (MINUTE, 10 * MINUTE, HOUR, 6 * HOUR, DAY)  # after that long a flow is told of again


@dataclass(frozen=True, slots=True)
class Written:
    """What was written. `seconds` it took, of which so many went into the index."""

    events: int
    segments: int
    seconds: float
    index_seconds: float


class Fleet:
    """Who talks to whom: label sets, addresses, identities, rules, and pairs by weight."""

    def __init__(self, rng: np.random.Generator) -> None:
        sets = [LabelSet({"app": f"app{a}", "env": f"env{e}"}) for a in range(APPS) for e in range(ENVS)]
        self.labels = np.array([s.id for s in sets])
        self.identities = np.array([stable_id(f"identity {s}".encode()) for s in sets])
        self.workloads = np.array([stable_id(f"workload {s}".encode()) for s in sets])
        texts = [f"allow app=app{a} to call env=env{e} on tcp/443" for a in range(APPS) for e in range(ENVS)]
        self.rules = np.array([stable_id(text.encode()) for text in texts])
        self.entries: list[dict[str, Any]] = []
        for n, one in enumerate(sets):
            name = f"app{n // ENVS}-env{n % ENVS}"
            self.entries += [
                {"type": "dict.labels", "id": one.id, "labels": dict(one)},
                {
                    "type": "dict.identity",
                    "id": int(self.identities[n]),
                    "spiffe_id": f"spiffe://bench.example/{name}",
                    "trust_domain": "bench.example",
                    "labels_id": one.id,
                    "fingerprint": f"{int(self.identities[n]):064x}",
                    "serial": n,
                    "issuer": "bench",
                    "not_before": T0,
                    "not_after": T0 + 400 * DAY,
                },
                {"type": "dict.workload", "id": int(self.workloads[n]), "name": name, "labels_id": one.id},
                {
                    "type": "dict.rule",
                    "id": int(self.rules[n]),
                    "policy": f"team{n % 7}",
                    "kind": "intent",
                    "owner": f"team{n % 7}",
                    "index": n,
                    "text": texts[n],
                    "revision": 1,
                },
            ]
        weight = 1.0 / np.arange(1, PAIRS + 1) ** 1.1
        self.weight = weight / weight.sum()
        count = len(sets)
        self.source, self.destination = rng.integers(0, count, PAIRS), rng.integers(0, count, PAIRS)
        self.source_host = _hosts(rng, count, self.source)
        self.destination_host = _hosts(rng, count, self.destination)
        self.service = rng.choice(np.array(SERVICES), PAIRS)
        self.denied = rng.random(PAIRS) < 0.08
        self.rule = rng.integers(0, count, PAIRS)
        self.flows = 0  # begun so far


def _hosts(rng: np.random.Generator, count: int, of: NDArray[np.int64]) -> NDArray[np.int64]:
    """One of the few addresses that a label set has, for each pair."""
    homes = rng.integers(0, HOSTS, (count, 4))
    return np.asarray(homes[of, rng.integers(0, 4, len(of))])


def _addresses(hosts: NDArray[np.int64]) -> NDArray[np.void]:
    out = np.zeros((len(hosts), 16), np.uint8)
    out[:, 10:12], out[:, 12] = 255, 10
    out[:, 14], out[:, 15] = hosts // 250, hosts % 250 + 1
    return out.view("V16")[:, 0]


def begun(fleet: Fleet, rng: np.random.Generator, since: int, width: int, count: int) -> NDArray[np.void]:
    """VERDICT records of `count` flows that begin in `width` microseconds from `since`, in order of time."""
    pair = rng.choice(PAIRS, count, p=fleet.weight)
    out = np.zeros(count, FLOW_DTYPE)
    starts = since + np.sort(rng.integers(0, width, count))
    out["kind"], out["phase"], out["point"], out["direction"] = Kind.FLOW, Phase.VERDICT, 1, 1
    out["transport"], out["ip_version"], out["flow_count"], out["auth_method"] = 6, 4, 1, 1
    out["auth_result"], out["encryption"], out["cipher"] = 2, np.where(pair % 4 == 0, 1, 2), pair % 4 > 0
    denied = fleet.denied[pair]
    out["action"] = np.where(denied, Action.DENY, Action.ALLOW)
    out["drop_reason"] = denied
    out["conn_state"] = np.where(denied, ConnState.S0, ConnState.S1)
    out["ts"] = out["start"] = starts
    out["source_port"] = rng.integers(32768, 61000, count)
    out["destination_port"] = fleet.service[pair]
    out["source_ip"] = _addresses(fleet.source_host[pair])
    out["destination_ip"] = _addresses(fleet.destination_host[pair])
    ids = np.zeros((count, 2), ">u8")  # as sectool.flowids makes them
    ids[:, 0] = (starts // 1000) << 16 | 0x7000 | (starts % 1000) * 4096 // 1000
    ids[:, 1] = np.uint64(1 << 63 | 0x1234_5678 << 32) + np.arange(
        fleet.flows, fleet.flows + count, dtype=np.uint64
    )
    fleet.flows += count
    out["event_id"] = ids.view("V16")[:, 0]
    out["community"] = rng.integers(0, 256, (count, 20), np.uint8).view("V20")[:, 0]
    out["history"] = np.frombuffer(b"S".ljust(12, b"\0"), "V12")[0]
    out["policy_revision"] = 1 + (starts - T0) // DAY
    out["policy_hash"] = stable_id(b"policy") - out["policy_revision"].astype(np.int64)
    for side, who in (("source", fleet.source[pair]), ("destination", fleet.destination[pair])):
        out[f"{side}_labels"], out[f"{side}_identity"] = fleet.labels[who], fleet.identities[who]
    out["source_workload"] = fleet.workloads[fleet.source[pair]]
    out["rule"] = np.where(denied, 0, fleet.rules[fleet.rule[pair]])
    out["pid"] = 1000 + fleet.source[pair] * 3
    out["uid"] = 1000 + fleet.source[pair] % 20
    out["cgroup"] = 5000 + fleet.source[pair]
    return out


def later(rng: np.random.Generator, verdicts: NDArray[np.void]) -> NDArray[np.void]:
    """UPDATE and END records of flows that were let through."""
    flows = verdicts[verdicts["action"] == Action.ALLOW]
    count = len(flows)
    lasts = np.exp(rng.normal(np.log(0.4 * SECOND), 2.4, count)).astype(np.int64) + 1000
    lasts = np.minimum(lasts, 30 * DAY)
    size = np.exp(rng.normal(8.5, 1.8, count)).astype(np.int64) + 60
    parts = []
    for after in UPDATES:
        still = lasts > after
        told = flows[still].copy()
        told["phase"], told["ts"] = Phase.UPDATE, told["start"] + after
        _count(told, (size[still] * (after / lasts[still])).astype(np.int64))
        parts.append(told)
    ends = rng.random(count) > 0.0005
    ended = flows[ends].copy()
    ended["phase"], ended["conn_state"] = Phase.END, ConnState.SF
    ended["ts"] = ended["end"] = ended["start"] + lasts[ends]
    ended["history"] = np.frombuffer(b"ShADadFf".ljust(12, b"\0"), "V12")[0]
    _count(ended, size[ends])
    return np.concatenate([*parts, ended])


def _count(records: NDArray[np.void], size: NDArray[np.int64]) -> None:
    records["source_bytes"], records["destination_bytes"] = size // 5, size
    records["source_packets"], records["destination_packets"] = size // 2000 + 3, size // 1400 + 4


def write(state: Path, events: int, *, days: float = 4.0, seed: int = 7, quiet: bool = True) -> Written:
    """Write about `events` flow records of `days` into the empty state folder; how many, and how long it took."""
    start = time.perf_counter()
    rng = np.random.default_rng(seed)
    fleet = Fleet(rng)
    folder = state / "events"
    folder.mkdir(parents=True, mode=0o750)
    _policies(state, days)
    catalog = Catalog(folder)
    hours = max(1, round(days * 24))
    waiting = np.zeros(0, FLOW_DTYPE)
    indexing = 0.0
    with tempfile.TemporaryDirectory(prefix="sectool-bench-") as run, contextlib.closing(catalog):
        shelf = Shelf(folder, Path(run))
        shelf.open_index(catalog, 0)
        ingest = Ingest(catalog, 1, {})
        busy = 1.0 + 0.6 * np.sin(np.arange(hours) / 24 * 2 * np.pi)
        flows = (busy / busy.sum() * events / 1.93).astype(np.int64)
        for hour in range(hours):
            begin = T0 + round(hour * days * DAY / hours)
            width = round(days * DAY / hours)
            live = ingest.begin_segment(begin)
            if not hour:
                ingest.write(fleet.entries, None, None)
            made = begun(fleet, rng, begin, width, int(flows[hour]))
            everything = np.concatenate([waiting, made, later(rng, made)])
            now = everything["ts"] < begin + width
            waiting = everything[~now & (everything["ts"] < T0 + days * DAY)]
            records = everything[now]
            records = records[np.argsort(records["ts"], kind="stable")]
            del everything, made
            for first in range(0, len(records), MAX_SLOTS):
                ingest.write([], records[first : first + MAX_SLOTS], None)
            with contextlib.closing(catalog.cursor()) as cursor:
                cursor.execute(f"CHECKPOINT {live.alias}")
                summary = segment.summarise(cursor, live.alias)
            shelf.seal(live.path, summary)
            catalog.reopen_read_only(live.path, 10.0)
            before = time.perf_counter()
            while shelf.extend_index(catalog, None, ingest.next_seq):
                pass
            indexing += time.perf_counter() - before
            if not quiet:
                print(f"{ingest.next_seq:,} events", file=sys.stderr)
        return Written(ingest.next_seq - 1, hours, time.perf_counter() - start, indexing)


def _policies(state: Path, days: float) -> None:
    with ControlHistory(state / "control.sqlite") as history:
        who = Actor(1000, "alice")
        for number in range(1, int(days) + 2):
            text = "kind: Policy\nname: shop\nowner: team-a\nrules:\n" + "".join(
                f"  - allow app=app{n} to call app=app{n + number} on tcp/443\n" for n in range(20)
            )
            moment = T0 + (number - 1) * DAY
            body = {
                "revision": number,
                "hash": f"{number:064x}",
                "text": text,
                "author": "alice",
                "reason": "bench",
                "roles": [],
            }
            history.append("policy", str(number), body, who, "bench", moment)
            history.append("activation", "bench", {"revision": number}, who, "bench", moment + 1)


def main() -> int:
    """Write a history into a new folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a state folder to make: `sectool --store FOLDER` reads it")
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--days", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=7)
    chosen = parser.parse_args()
    made = write(chosen.folder, chosen.events, days=chosen.days, seed=chosen.seed, quiet=False)
    size = sum(path.stat().st_size for path in (chosen.folder / "events").iterdir())
    print(
        f"{made.events:,} events in {made.segments} segments: {made.seconds:.0f} s, the index"
        f" {made.index_seconds:.0f} s of them; {size / made.events:.1f} bytes an event"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
