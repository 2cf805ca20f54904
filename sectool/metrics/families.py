"""The numbers of one host, from what its daemon and store answer.

Labels take few values: workers, queues and rings by number or name, verdicts, reasons. No address, identity, name of a
workload or text of anybody else becomes a label, so nobody can make a monitoring system hold more by what he does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sectool.events import Action, DropReason
from sectool.metrics.exposition import Family, Kind, Labels

VERDICTS = frozenset({"adopted", *(action.name.lower() for action in Action)})
REASONS = frozenset(reason.name.lower() for reason in DropReason)
OTHER = "other"
MAX_PARTS = 256  # workers, or rings

Document = Mapping[str, Any]
Samples = Iterable[tuple[Labels, Any]]
NOTHING: Document = {}


def families(status: Document | None, stats: Document | None, identities: Document | None) -> list[Family]:
    """Everything that is known. `status` None: no daemon answers; `stats` None: the store does not.

    `identities` is the answer to `identity.list`. Whatever a daemon of another version does not say is left out.
    """
    out = [_gauge("sectool_up", "Whether the daemon answers.", [((), status is not None)])]
    if status is not None:
        out += _daemon(status)
        out += _certificates(status, identities)
        out += _workers(_list(status.get("workers")))
        restarts = _of(status.get("store")).get("restarts")
        out.append(
            _counter("sectool_store_restarts_total", "Restarts of the store process.", [((), restarts)])
        )
        out += _losses(status)
    out.append(_gauge("sectool_store_up", "Whether the event store answers.", [((), stats is not None)]))
    if stats is not None:
        out += _store(stats)
    return out


def _daemon(status: Document) -> Iterator[Family]:
    policy, broken = _of(status.get("policy")), status.get("break_glass")
    yield _gauge(
        "sectool_build_info",
        "Version of the daemon.",
        [((("version", str(status.get("version", ""))[:64]),), 1)],
    )
    yield _gauge(
        "sectool_start_time_seconds", "When the daemon started.", [((), _seconds(status.get("started")))]
    )
    yield _gauge(
        "sectool_enforcing", "Whether every worker enforces a policy.", [((), status.get("enforcing"))]
    )
    yield _gauge(
        "sectool_degraded",
        "Whether something keeps the daemon from working in full.",
        [((), status.get("state") == "degraded")],
    )
    yield _gauge(
        "sectool_problems",
        "Problems that `sectool status` names.",
        [((), len(_list(status.get("problems"))))],
    )
    yield _gauge(
        "sectool_rules_installed",
        "Whether the kernel rules are there.",
        [((), status.get("rules_installed"))],
    )
    yield _gauge(
        "sectool_observing",
        "Whether nothing is denied: the mode observe, or broken glass.",
        [((), status.get("observing"))],
    )
    yield _gauge(
        "sectool_break_glass_remaining_seconds",
        "How long denial stays suspended; 0: it is in force.",
        [((), _of(broken).get("left_s", 0))],
    )
    yield _gauge(
        "sectool_policy_revision",
        "Revision of the policy in force; 0: none.",
        [((), policy.get("revision", 0))],
    )
    yield _gauge(
        "sectool_policy_applied_time_seconds",
        "When that revision was applied.",
        [((), _seconds(policy.get("applied")))],
    )
    yield _gauge("sectool_workloads", "Workloads with an identity.", [((), status.get("workloads"))])
    yield _gauge(
        "sectool_namespaces_inside",
        "Other network namespaces enforced in.",
        [((), len(_list(status.get("inside"))))],
    )


def _certificates(status: Document, identities: Document | None) -> Iterator[Family]:
    ends: list[tuple[Labels, Any]] = [
        ((("certificate", "host_ca"),), _seconds(status.get("host_ca_expires")))
    ]
    if identities is not None:
        items = [_of(item) for item in _list(identities.get("items"))]
        yield _gauge("sectool_identities", "Identities in use.", [((), len(items))])
        yield _gauge(
            "sectool_identities_refused",
            "Identities in use that a list of revocations refuses.",
            [((), sum(bool(item.get("refused")) for item in items))],
        )
        first = min((n for item in items if (n := _number(item.get("not_after"))) is not None), default=None)
        ends.append(((("certificate", "first_identity"),), _seconds(first)))
    yield _gauge(
        "sectool_certificate_expiry_time_seconds",
        "When the host's CA expires, and the first of the identities in use.",
        ends,
    )


def _workers(workers: list[Any]) -> Iterator[Family]:
    each = [(str(_number(_of(w).get("number"))), _of(w)) for w in workers[:MAX_PARTS]]
    stats = [(n, _of(w.get("stats"))) for n, w in each]

    def of_workers(key: str) -> Samples:
        return [((("worker", n),), s.get(key)) for n, s in stats]

    def of_queues(key: str) -> Samples:
        kinds = (("normal", "queue"), ("bulk", "bulk"))
        return [
            ((("worker", n), ("queue", name)), _of(s.get(part)).get(key))
            for n, s in stats
            for name, part in kinds
        ]

    yield _gauge(
        "sectool_worker_enforcing",
        "Whether the packet worker enforces.",
        [((("worker", n),), w.get("enforcing")) for n, w in each],
    )
    yield _counter(
        "sectool_worker_restarts_total",
        "Restarts of the packet worker.",
        [((("worker", n),), w.get("restarts")) for n, w in each],
    )
    yield _counter(
        "sectool_flows_total",
        "Verdicts on flows since the worker started; adopted: established before it.",
        _by_name(stats, "verdicts", "verdict", VERDICTS),
    )
    yield _counter(
        "sectool_denials_total",
        "Denials since the worker started, by reason (docs/reference.md).",
        _by_name(stats, "reasons", "reason", REASONS),
    )
    yield _gauge("sectool_flows_live", "Flows that are authorised and not ended.", of_workers("live"))
    yield _gauge("sectool_flows_encrypted", "Live flows that are encrypted.", of_workers("encrypted"))
    yield _gauge(
        "sectool_flows_uncut", "Live flows that are denied and could not be cut yet.", of_workers("uncut")
    )
    yield _gauge("sectool_handshakes_open", "Handshakes under way.", of_workers("half_open"))
    yield _gauge(
        "sectool_sessions",
        "Sessions that spare a handshake: held as initiator, issued as responder.",
        [
            ((("worker", n), ("kind", kind)), _of(s.get("sessions")).get(kind))
            for n, s in stats
            for kind in ("held", "issued")
        ],
    )
    yield _gauge("sectool_packets_held", "Packets that wait for an identity.", of_workers("held"))
    yield _counter(
        "sectool_packets_total",
        "Packets judged since the worker started.",
        [
            ((("worker", n), ("queue", "normal")), s.get("packets"))
            if part == "queue"
            else ((("worker", n), ("queue", "bulk")), _of(s.get("bulk")).get("packets"))
            for n, s in stats
            for part in ("queue", "bulk")
        ],
    )
    yield _gauge("sectool_queue_packets", "Packets that wait in the kernel's queue.", of_queues("waiting"))
    yield _counter("sectool_queue_full_total", "Packets dropped: the queue was full.", of_queues("dropped"))
    yield _counter(
        "sectool_queue_buffer_full_total",
        "Packets dropped: the worker's socket buffer was full.",
        of_queues("user_dropped"),
    )
    yield _counter(
        "sectool_worker_failures_total", "Packets not judged for a failure.", of_workers("failures")
    )
    yield _counter(
        "sectool_worker_cpu_seconds_total",
        "Processor time of the packet worker.",
        [((("worker", n),), _seconds(s.get("cpu_us"))) for n, s in stats],
    )


def _losses(status: Document) -> Iterator[Family]:
    lost = [((("where", "agent"),), status.get("events_lost_by_agent"))]
    for worker in _list(status.get("workers"))[:MAX_PARTS]:
        number, stats = _number(_of(worker).get("number")), _of(_of(worker).get("stats"))
        lost.append(((("where", f"worker-{number}"),), stats.get("lost")))
    yield _counter("sectool_events_lost_total", "Events dropped because a ring was full.", lost)


def _store(stats: Document) -> Iterator[Family]:
    rings = sorted(_of(stats.get("rings")).items())[:MAX_PARTS]

    def of_rings(key: str) -> Samples:
        return [((("ring", str(name)[:64]),), _of(ring).get(key)) for name, ring in rings]

    for name, key, text in (
        ("flow_records", "flow_records", "Records of flows taken in since the store started."),
        ("events", "events", "Other events taken in since the store started."),
        ("lost", "lost", "Events that the store found lost."),
        ("damaged_slots", "damaged_slots", "Slots of rings that held no event."),
        ("batches", "batches", "Transactions."),
        ("failed_batches", "failed_batches", "Transactions that failed and were tried again."),
    ):
        yield _counter(f"sectool_store_{name}_total", text, [((), stats.get(key))])
    for quantile in ("p50", "p99"):
        milliseconds = _number(stats.get(f"insert_{quantile}_ms"))
        seconds = None if milliseconds is None else milliseconds / 1000
        yield _gauge(
            f"sectool_store_insert_{quantile}_seconds",
            f"Duration of a transaction, {'median' if quantile == 'p50' else '99th percentile'} of the latest 4096.",
            [((), seconds)],
        )
    yield _gauge("sectool_store_bytes", "Bytes of all segments.", [((), stats.get("bytes"))])
    yield _gauge("sectool_store_segments", "Segments.", [((), stats.get("segments"))])
    yield _gauge(
        "sectool_store_unopened_segments",
        "Segments that could not be opened.",
        [((), len(_list(stats.get("unopened_segments"))))],
    )
    yield _gauge(
        "sectool_store_degraded",
        "Whether something keeps the store from taking events in.",
        [((), bool(stats.get("degraded")))],
    )
    yield _gauge("sectool_ring_events", "Slots of the ring that wait for the store.", of_rings("pending"))
    yield _gauge("sectool_ring_capacity", "Slots of the ring.", of_rings("capacity"))
    yield _counter("sectool_ring_lost_total", "Events dropped because this ring was full.", of_rings("lost"))


def _by_name(
    stats: list[tuple[str, Document]], key: str, label: str, known: frozenset[str]
) -> list[tuple[Labels, Any]]:
    out: list[tuple[Labels, Any]] = []
    for worker, counters in ((n, _of(s.get(key))) for n, s in stats):
        sums: dict[str, float] = {}
        for name, count in counters.items():
            number = _number(count)
            if number is not None:
                named = name if name in known else OTHER
                sums[named] = sums.get(named, 0) + number
        out += [((("worker", worker), (label, name)), count) for name, count in sorted(sums.items())]
    return out


def _gauge(name: str, text: str, samples: Samples) -> Family:
    return Family(name, Kind.GAUGE, text, _known(samples))


def _counter(name: str, text: str, samples: Samples) -> Family:
    return Family(name, Kind.COUNTER, text, _known(samples))


def _known(samples: Samples) -> tuple[tuple[Labels, float], ...]:
    found = ((labels, int(value) if isinstance(value, bool) else _number(value)) for labels, value in samples)
    return tuple((labels, value) for labels, value in found if value is not None)


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _seconds(us: Any) -> float | None:
    number = _number(us)
    return None if number is None else number / 1_000_000


def _of(value: Any) -> Document:
    return value if isinstance(value, Mapping) else NOTHING


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
