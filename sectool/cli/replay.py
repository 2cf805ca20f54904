"""`sectool replay`: history shown again as it happened."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from sectool.cli.context import session
from sectool.cli.flowrow import flow_row
from sectool.cli.flows import flow_writer
from sectool.cli.moments import moment_us, show_time
from sectool.cli.output import Format
from sectool.cli.reading import reading
from sectool.cli.text import duration, escape
from sectool.filters import parse_tokens

app = typer.Typer(rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Holds the one command of this module."""


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def replay(
    ctx: typer.Context,
    from_: Annotated[
        str, typer.Option("--from", metavar="TIME", help="Begin there: 1h (ago), 02:00, a timestamp.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="TIME", help="End there.")] = "now",
    speed: Annotated[
        float, typer.Option("--speed", min=0, max=1_000_000, metavar="N", help="N times as fast; 0: at once.")
    ] = 1.0,
    output: Annotated[
        Format, typer.Option("--output", "-o", help="As for `sectool flows -f`.")
    ] = Format.TABLE,
) -> None:
    """Play recorded connections back as `sectool flows -f` showed them, with what else happened on stderr.

    Filters as for `sectool flows`. Where nothing happened for long, 5 seconds are enough, and it is said.

    \b
    Examples:
      sectool replay --from 02:00 --to 02:10 --speed 20
      sectool replay --from 1h --verdict deny --speed 0 -o jsonl
      sectool --store case-17 replay --from 2026-03-01T02:00:00Z --to 2026-03-01T02:05:00Z
    """
    from store.past import History
    from store.replay import replay as play
    from store.sentences import sentence

    here = session(ctx)
    write = flow_writer(here, output)
    nothing = History(None)
    with reading(here) as reader:
        steps = play(reader, parse_tokens(ctx.args), since=moment_us(from_), until=moment_us(to), speed=speed)
        for step in steps:
            if step.skipped:
                here.say(f"… {duration(step.skipped / 1e6)} in which nothing happened")
            if step.flow is not None:
                write(flow_row(step.flow))
                sys.stdout.flush()
            elif step.event is not None and not here.quiet:
                try:
                    body = json.loads(step.event["body"])
                    text = sentence(step.event["type"], body, nothing)[0]
                except (ValueError, AttributeError):
                    text = step.event["type"]
                sys.stderr.write(f"{show_time(step.ts, precise=True)}  {escape(text)}\n")
