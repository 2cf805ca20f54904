"""How commands have the store's files changed: by the store process, or by themselves when none runs."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sectool.cli.context import Session
from sectool.errors import NoDaemonError, StoreError, UsageError


@contextlib.contextmanager
def maintaining(at: Session) -> Iterator[Callable[..., Mapping[str, Any]]]:
    """How to have segments changed: called with an operation of the store's socket and its fields."""
    from sectool.api.client import Client

    try:
        if at.offline:
            raise NoDaemonError("--store asks no daemon")
        client = Client(at.paths.events_socket, timeout=3600.0)
        client.call("ping")
    except NoDaemonError:
        from store.process import Store

        if not at.paths.events.is_dir():
            raise StoreError(f"there are no events in {at.paths.events}") from None
        with tempfile.TemporaryDirectory(prefix="sectool-store-") as run:  # no rings are drained here
            store = Store(at.paths.state, Path(run))
            store.open()
            try:
                yield lambda op, **fields: _by_ourselves(store, op, fields)
            finally:
                store.step()  # writes what is to be told of it
                store.close()
        return
    with client:
        yield (
            lambda op, **fields: (
                client.call(op, **{key: value for key, value in fields.items() if value is not None}).header
            )
        )


def _by_ourselves(store: Any, op: str, fields: dict[str, Any]) -> dict[str, Any]:
    from sectool.api.server import Peer

    by = Peer(0, os.getuid(), 0).name
    if op == "prune":
        return {"retired": store.prune(fields["keep_bytes"], fields["keep_us"], by)}
    if op == "retain":
        return dict(store.upkeep.choose(fields, by).document())
    name, left = store.compact_next(fields["older_us"])
    return {"done": name, "left": left}


def parse_size(text: str) -> int:
    """Bytes of `500M`, `20G`, `1.5T`. Raises UsageError."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not found:
        raise UsageError(f"{text!r} is not a size", "write for example 500M, 20G or 1.5T")
    return round(float(found[1]) * (1 << 10 * " kmgt".index(found[2] or " ")))
