"""`sectool lab attack`: what an intruder on the wire can do, to be tried against hosts of your own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Try what an intruder on the wire would try."
)

Kept = Annotated[Path, typer.Argument(metavar="FILE", help="A recorded SYN (pcap).")]
Spoof = Annotated[
    bool,
    typer.Option("--spoof", help="With the address and port of whom it was taken from, not this host's."),
]


@app.callback()
def attack() -> None:
    """Try what an intruder on the wire would try: record somebody's first packet, send it again, or change it.

    Nothing here knows a key. For hosts of your own, such as those of the lab.

    \b
    Examples:
      sectool lab attack record seen.pcap --to-port 80 -- sectool run -l app=batch -- curl http://10.77.0.10/
      sectool lab attack replay seen.pcap
      sectool lab attack forge seen.pcap --byte 130
    """


@app.command()
def record(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to keep it (pcap).")],
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND [ARG]...", help="What opens the connection.")
    ],
    to_port: Annotated[int, typer.Option("--to-port", help="The port that is called.", min=1, max=65535)],
) -> None:
    """Run a command and keep the first SYN with a handshake that goes by, as a tap on this host's cable would.

    \b
    Example:
      sectool lab attack record seen.pcap --to-port 80 -- sectool run -l app=batch -- curl http://10.77.0.10/
    """
    from labs import attacker

    found = attacker.record(file, to_port, command)
    sys.stderr.write(f"kept in {file}: {found}\n")


@app.command()
def replay(file: Kept, spoof: Spoof = False) -> None:
    """Send a recorded SYN again, as it is.

    \b
    Examples:
      sectool lab attack replay seen.pcap            from this host's address
      sectool lab attack replay seen.pcap --spoof    with the address it was taken from
    """
    _send(file, None, spoof)


@app.command()
def forge(
    file: Kept,
    byte: Annotated[int, typer.Option("--byte", help="Which byte behind the SYN to change, from 0.", min=0)],
    spoof: Spoof = False,
) -> None:
    """Send a recorded SYN with one bit of it changed, and a key of your own for the attempt.

    Bytes 12 to 43 are the key of one attempt, 44 to 75 the caller's, 76 and on its credential: who it is, who vouches
    for it, and the signatures (docs/protocol.md).

    \b
    Example:
      sectool lab attack forge seen.pcap --byte 130
    """
    _send(file, byte, spoof)


def _send(file: Path, byte: int | None, spoof: bool) -> None:
    from labs import attacker

    one = attacker.read(file)
    if byte is not None:
        one = one.forged(byte)
    if not spoof:
        one = attacker.here(one)
    attacker.send(one)
    sys.stderr.write(f"sent: {one}\n")
    sys.stderr.write(f"what {one.target} made of it is on its record: sectool flows --verdict deny\n")
