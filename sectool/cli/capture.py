"""`sectool capture`: packets of chosen flows into a file, and a look at them."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sectool.cli.context import Session, require_root, session
from sectool.cli.output import paint
from sectool.cli.reading import reading
from sectool.cli.text import escape, escape_block, size
from sectool.errors import Exit, NoDaemonError, SectoolError, UsageError
from sectool.events import now_us
from sectool.filters import Filter, parse_tokens
from sectool.moment import parse_duration

if TYPE_CHECKING:
    from nfq.capture import Key
    from nfq.evidence import Evidence
    from store.reader import Reader

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

TICK_S = 0.2
SETTLE_S = 2.0  # after the end, for verdicts of the last packets to be told of
_NUMBERS = {"tcp": 6, "udp": 17, "icmp": 1, "icmpv6": 58}


@app.callback()
def capture() -> None:
    """Packets of chosen connections as evidence: recorded as they cross this host, with whose they are.

    \b
    Examples:
      sectool capture start db.pcapng --to-port 5432 --reason "incident 17" --duration 1m
      sectool capture show db.pcapng --last 5
    """


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def start(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new pcapng file.")],
    reason: Annotated[str, typer.Option("--reason", "-r", metavar="TEXT", help="Why; it goes on record.")],
    payload: Annotated[
        bool, typer.Option("--payload", help="Whole packets. Without it, headers alone.")
    ] = False,
    duration: Annotated[
        str, typer.Option("--duration", "-d", metavar="TIME", help="Stop after that long.")
    ] = "1m",
    packets: Annotated[
        int, typer.Option("--packets", min=1, metavar="N", help="Stop after N packets.")
    ] = 100_000,
    megabytes: Annotated[int, typer.Option("--megabytes", min=1, metavar="N", help="Stop after N MB.")] = 100,
) -> None:
    """Record packets of the connections that filters choose, for Wireshark and `sectool capture show`.

    Filters are those of `sectool flows`.

    Packets are seen as they enter and leave this host's network namespace: encrypted connections stay
    encrypted. Connections that never come to the enforcer's queue again are seen like all others. Each packet
    carries a comment with both identities, the verdict and the rule. Who captured what and why becomes an event.
    Ends at a bound or with Ctrl-C.

    \b
    Examples:
      sectool capture start db.pcapng --to-port 5432 --reason "incident 17"
      sectool capture start denied.pcapng --verdict deny --duration 10m --reason "who knocks"
      sectool capture start web.pcapng --from-label app=web --payload --megabytes 20 --reason "broken uploads"
    """
    require_root("capturing packets", "sectool flows")
    here = session(ctx)
    chosen = parse_tokens(ctx.args)
    lasts = parse_duration(duration) / 1e6
    if not reason.strip():
        raise UsageError("a capture needs a reason", '--reason "why"')
    if file.exists():
        raise UsageError(f"{file} is there already", "a capture is written to a file of its own")
    with reading(here) as reader, here.control() as control:
        if not reader.live:
            raise NoDaemonError(
                "no daemon runs, and nothing would say whose the packets are", "start it with `sectool up`"
            )
        about: dict[str, Any] = {"filter": str(chosen), "file": str(file.absolute())}
        control.call("capture.note", reason=reason, whole=payload, **about)
        evidence = _record(here, reader, chosen, file, payload, packets, megabytes * 1_000_000, lasts)
        with file.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        control.call("capture.note", ended=True, packets=evidence.written, sha256=digest, **about)
    here.say(
        f"{evidence.written} packets, {size(evidence.size)}, of {len(evidence.chosen)} connections in {file}"
    )
    here.say(f"SHA-256 {digest}")


def _record(
    here: Session,
    reader: Reader,
    chosen: Filter,
    file: Path,
    payload: bool,
    packets: int,
    octets: int,
    lasts: float,
) -> Evidence:
    """Copy until a bound is reached or the user ends it. The file is whole whatever happens."""
    from nfq.capture import Tap
    from nfq.evidence import Evidence, PcapNg

    with contextlib.closing(PcapNg(file)) as sink, contextlib.closing(Tap()) as tap:
        evidence = Evidence(sink, payload, packets, octets)
        news: queue.Queue[tuple[Key, str]] = queue.Queue()
        _follow(reader, chosen, news)
        for stored in reader.flows(chosen, at=now_us(), last=100_000).table.to_pylist():
            for key, comment in _choice(stored):
                evidence.choose(key, comment)
        here.say("capturing; Ctrl-C ends it")
        end = time.monotonic() + lasts
        try:
            while not evidence.full and time.monotonic() < end:
                for seen in tap.packets(TICK_S):
                    evidence.offer(seen)
                    if evidence.full or time.monotonic() > end:
                        break
                _learn(evidence, news)
        except KeyboardInterrupt:
            here.say("ending")
        settled = time.monotonic() + SETTLE_S
        while not evidence.full and (left := settled - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                evidence.choose(*news.get(timeout=left))
        if dropped := tap.count_dropped():
            here.warn(f"{dropped} packets came too fast to be copied; they are missing")
    return evidence


def _learn(evidence: Evidence, news: queue.Queue[tuple[Key, str]]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            evidence.choose(*news.get_nowait())


def _follow(reader: Reader, chosen: Filter, news: queue.Queue[tuple[Key, str]]) -> None:
    """Have flows told of from now on, by a thread that ends with the program."""
    frames = iter(reader.tail(chosen))
    next(frames)

    def follow() -> None:
        with contextlib.suppress(SectoolError, OSError):
            for frame in frames:
                for stored in frame.table.to_pylist() if frame.table is not None else ():
                    for choice in _choice(stored):
                        news.put(choice)

    threading.Thread(target=follow, name="flows to capture", daemon=True).start()


def _choice(stored: dict[str, Any]) -> Iterator[tuple[Key, str]]:
    from nfq.capture import key_of_text

    transport = str(stored["transport"])
    protocol = _NUMBERS.get(transport) or int(transport)
    with contextlib.suppress(ValueError, TypeError):
        key = key_of_text(
            protocol,
            stored["source_ip"],
            stored["source_port"],
            stored["destination_ip"],
            stored["destination_port"],
        )
        yield key, comment_of(stored)


def comment_of(stored: dict[str, Any]) -> str:
    """Whose a packet is: both identities, the verdict, its rule and revision, and the flow's id."""
    ends = [
        stored[f"{e}_identity"] or stored[f"{e}_labels"] or "no identity" for e in ("source", "destination")
    ]
    why = f" ({stored['drop_reason']})" if stored["drop_reason"] else ""
    rule = f" by {stored['policy']}: {stored['rule']}" if stored["rule"] else ""
    revision = f", revision {stored['policy_revision']}" if stored["policy_revision"] else ""
    encrypted = ", encrypted" if stored["encryption"] == "encrypted" else ""
    return escape(
        f"{ends[0]} -> {ends[1]}: {stored['action']}{why}{rule}{revision}{encrypted}; flow {stored['event_id']}"
    )


@app.command()
def show(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A capture (pcapng or pcap).")],
    number: Annotated[
        int | None,
        typer.Option("--number", "-n", min=1, metavar="N", help="All of packet N: its layers and bytes."),
    ] = None,
    last: Annotated[int, typer.Option("--last", min=1, metavar="N", help="The newest N packets.")] = 50,
) -> None:
    """List the packets of a capture with their comments, or show one in full.

    \b
    Examples:
      sectool capture show db.pcapng
      sectool capture show db.pcapng --number 3
    """
    here = session(ctx)
    packets = _read(file)
    if number is not None:
        if number > len(packets):
            raise UsageError(f"{file} has {len(packets)} packets")
        packet = packets[number - 1]
        for comment in _comments(packet):
            sys.stdout.write(paint(escape(comment), "bold", here.color) + "\n")
        from scapy.utils import hexdump

        sys.stdout.write(
            escape_block(str(packet.show(dump=True)))
            + "\n"
            + escape_block(str(hexdump(packet, dump=True)))
            + "\n"
        )
        return
    first = max(0, len(packets) - last)
    for index, packet in enumerate(packets[first:], first + 1):
        moment = time.strftime("%H:%M:%S", time.gmtime(float(packet.time)))
        fraction = f"{float(packet.time) % 1:.6f}"[1:]
        comment = "; ".join(_comments(packet))
        sys.stdout.write(f"{index:>6}  {moment}{fraction}Z  {escape(packet.summary())}  {escape(comment)}\n")
    if not packets:
        here.say("there are no packets in it")
        raise typer.Exit(int(Exit.OK))


def _comments(packet: Any) -> list[str]:
    return [c.decode("utf-8", "replace") if isinstance(c, bytes) else str(c) for c in packet.comments or ()]


def _read(file: Path) -> list[Any]:
    import logging

    logging.getLogger("scapy").setLevel(logging.CRITICAL)
    import scapy.layers.inet6  # noqa: F401 -- so that both families are told apart
    from scapy.error import Scapy_Exception
    from scapy.utils import rdpcap

    try:
        return list(rdpcap(str(file)))
    except FileNotFoundError:
        raise UsageError(f"there is no file {file}") from None
    except (Scapy_Exception, OSError, EOFError, ValueError) as error:
        raise UsageError(f"{file} is no capture: {error}", "pcapng and pcap files can be read") from None
