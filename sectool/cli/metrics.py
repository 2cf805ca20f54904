"""`sectool metrics`: numbers for a monitoring system."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sectool.cli.context import session

app = typer.Typer(rich_markup_mode=None)


@app.command()
def metrics(
    ctx: typer.Context,
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen", metavar="ADDRESS[:PORT]", help="Serve them over HTTP at /metrics [port: 9464]."
        ),
    ] = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Let --listen take an address that other hosts reach.")
    ] = False,
) -> None:
    """Print the daemon's and the store's numbers in the text format of Prometheus, or serve them.

    Read-only, and without addresses, names or identities. It needs no more than membership in the socket's group.
    While it serves and no daemon answers it says `sectool_up 0`. docs/howto/metrics.md has a unit and a scrape job.

    \b
    Examples:
      sectool metrics
      sectool metrics --listen 127.0.0.1:9464
    """
    from sectool.metrics.collect import Collector, collect

    at = session(ctx)
    if listen is None:
        sys.stdout.write(collect(at.paths))
        return
    import asyncio

    from sectool.metrics.endpoint import parse_address, serve

    address = parse_address(listen, remote=allow_remote)
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    collector = Collector(at.paths)
    collector()  # what is not permitted shows now, not at the first scrape

    def ready(port: int) -> None:
        at.say(f"metrics at http://{shown}:{port}/metrics")

    asyncio.run(serve(collector, address, ready=ready))
