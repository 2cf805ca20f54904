"""`sectool workload`: what runs on this host, who it is, and who says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sectool.cli.context import Session, session
from sectool.cli.moments import moment_us, show_time
from sectool.cli.output import Column, Format, emit, emit_document, paint
from sectool.cli.text import escape
from sectool.errors import DocumentError, UsageError

if TYPE_CHECKING:
    from sectool.policy.selector import Labels
    from store.control import Version

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

SCHEMA = "sectool.workload/2"
_At = Annotated[str | None, typer.Option("--at", metavar="TIME", help="As it was then: a time, or `2h` ago.")]
_Output = Annotated[Format, typer.Option("--output", "-o", help="Format of the data on stdout.")]


@app.callback()
def workload() -> None:
    """What runs on this host: workloads, their labels and who vouches for each, their processes.

    \b
    Examples:
      sectool workload list
      sectool workload show web
      sectool workload tree
    """


@app.command("list")
def list_(
    ctx: typer.Context,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", "-l", metavar="SELECTOR", help="Only with these labels; repeated: any of them."
        ),
    ] = None,
    user: Annotated[
        list[str] | None, typer.Option("--user", metavar="USER", help="Only of this user.")
    ] = None,
    unit: Annotated[
        list[str] | None, typer.Option("--unit", metavar="UNIT", help="Only of this unit.")
    ] = None,
    port: Annotated[
        list[str] | None, typer.Option("--port", metavar="PORT", help="Only listening on it: 443, tcp/443.")
    ] = None,
    container: Annotated[
        list[str] | None,
        typer.Option(
            "--container", metavar="NAME", help="Only in this container (name or beginning of its id)."
        ),
    ] = None,
    named: Annotated[
        bool, typer.Option("--named", help="Only those that a document or `sectool run` names.")
    ] = False,
    problem: Annotated[bool, typer.Option("--problem", help="Only those that have no identity.")] = False,
    ended: Annotated[bool, typer.Option("--ended", help="Those that have ended lately, too.")] = False,
    at: _At = None,
    output: _Output = Format.TABLE,
) -> None:
    """List the workloads that run on this host, with their labels and what the kernel attests of them.

    Each is found when it starts, and has its identity before its first connection. A filter that is repeated means
    any of its values; different filters all have to hold.

    \b
    Examples:
      sectool workload list --label app=web
      sectool workload list --port 5432 -o wide
      sectool workload list --at '2026-03-01 02:00' --user postgres
    """
    here = session(ctx)
    moment = moment_us(at) if at is not None else None
    if ended and moment is not None:
        raise UsageError("--ended and --at exclude each other", "--at shows those that ran at that time")
    wanted = _selectors(label)
    rows = [
        row
        for row in _rows(here, moment, ended)
        if (not wanted or any(_carries(row, selector) for selector in wanted))
        and (not user or row["user"] in user or str(row["uid"]) in user)
        and (not unit or row["unit"] in unit)
        and (not port or _listens(row, port))
        and (not container or _inside(row, container))
        and (not named or not row["automatic"])
        and (not problem or row["problem"])
    ]
    columns = [
        Column("NAME", lambda r: r["name"], style=lambda r: "bad" if r["problem"] else ""),
        Column("LABELS", lambda r: _labels(r, own=True)),
        Column("USER", lambda r: r["user"] or r["uid"]),
        Column("EXECUTABLE", lambda r: r["executable"] or "-"),
        Column("PORTS", lambda r: ",".join(r["ports"]) or "-"),
        Column("SINCE", lambda r: show_time(r["since"])),
        Column("UNTIL", lambda r: show_time(r.get("until")), wide=moment is None and not ended),
        Column("PROCESSES", lambda r: len(r["pids"]) if "pids" in r else "-", wide=True, right=True),
        Column("UNIT", lambda r: r["unit"] or "-", wide=True),
        Column("CONTAINER", lambda r: _container(r) or "-", wide=True),
        Column("PACKAGE", lambda r: r["package"] or "-", wide=True),
        Column("CGROUP", lambda r: r["cgroup"], wide=True),
        Column("SHA-256", lambda r: r["sha256"] or "-", wide=True),
    ]
    emit(rows, columns, output, SCHEMA, color=here.color, extra={"at": moment} if moment else None)
    without = sum(1 for row in rows if row["problem"])
    if without and output in (Format.TABLE, Format.WIDE):
        here.say(f"{without} of these have no identity: `sectool workload show NAME` tells why")


@app.command()
def show(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Its name, id, or the number of one of its processes.")
    ],
    at: _At = None,
    output: _Output = Format.TABLE,
) -> None:
    """Show one workload: each label with its origin, and the facts they rest on.

    Origins: attested (the kernel, or the container runtime under an id the kernel attests), operator (a Workload
    document or `sectool run`), host (enrolment), context (found out about the host). Labels that did not count, because
    somebody's word counts more, are told as well.

    \b
    Examples:
      sectool workload show web
      sectool workload show 4711 -o json
      sectool workload show web --at 1h
    """
    here = session(ctx)
    moment = moment_us(at) if at is not None else None
    rows = [
        row
        for row in _rows(here, moment, moment is None)
        if name in (row["name"], str(row["id"])) or (name.isdecimal() and int(name) in row.get("pids", ()))
    ]
    if not rows:
        when = f" at {show_time(moment)}" if moment is not None else ""
        raise UsageError(f"there is no workload {name!r}{when}", "`sectool workload list` names them all")
    if output not in (Format.TABLE, Format.WIDE):
        emit_document({"items": rows}, output, SCHEMA)
        return
    typer.echo("\n\n".join(_card(row, here.color) for row in rows))


@app.command()
def tree(
    ctx: typer.Context,
    at: _At = None,
    output: _Output = Format.TABLE,
) -> None:
    """Show the processes of all workloads by cgroup and parent.

    Of the past the workloads are on record, not their processes: with --at they are shown by cgroup alone.

    \b
    Examples:
      sectool workload tree
      sectool workload tree --at 1h
      sectool workload tree -o json
    """
    here = session(ctx)
    if at is not None:
        moment = moment_us(at)
        past = sorted(_rows(here, moment, ended=False), key=lambda row: (row["cgroup"], row["name"]))
        if output in (Format.TABLE, Format.WIDE):
            for line in _past_branches(past, here.color):
                typer.echo(line)
        else:
            emit(past, [], output, SCHEMA, extra={"at": moment})
        return
    with here.control() as control:
        rows = control.call("workload.tree")["items"]
    if output not in (Format.TABLE, Format.WIDE):
        emit(rows, [], output, "sectool.process/1")
        return
    for line in _branches(rows, here.color):
        typer.echo(line)


def _rows(here: Session, moment: int | None, ended: bool) -> list[dict[str, Any]]:
    """Workloads from the daemon, or, for a moment in the past, from the record when none runs."""
    from sectool.errors import NoDaemonError

    try:
        with here.control() as control:
            fields = {"at": moment} if moment is not None else {"ended": ended}
            return list(control.call("workload.list", **fields)["items"])
    except NoDaemonError:
        if moment is None or not here.paths.control_history.exists():
            raise
    from store.control import ControlHistory

    here.say(f"no daemon is running; reading {here.paths.control_history}")
    with ControlHistory(here.paths.control_history, read_only=True) as history:
        return [_recorded(version) for version in history.as_of("workload", moment)]


def _recorded(version: Version) -> dict[str, Any]:
    return {"id": int(version.key), "since": version.valid_from, "until": version.valid_to, **version.body}


def _selectors(texts: list[str] | None) -> list[Labels]:
    """Label selectors as in policies. Raises UsageError."""
    from sectool.policy import parse_sentence
    from sectool.policy.selector import Labels

    found: list[Labels] = []
    for text in texts or ():
        try:
            selector = parse_sentence(f"allow {text} to call any").source
        except DocumentError as error:
            raise UsageError(
                f"--label {text}: {error.message}", "write it as in policies: app=web,env!=dev"
            ) from None
        if not isinstance(selector, Labels):
            raise UsageError(
                f"--label {text}: this names no labels", "write it as in policies: app=web,env!=dev"
            )
        found.append(selector)
    return found


def _carries(row: Mapping[str, Any], selector: Labels) -> bool:
    return all(clause.holds(row["labels"]) for clause in selector.clauses)


def _listens(row: Mapping[str, Any], ports: Iterable[str]) -> bool:
    return any(have == want or have.endswith(f"/{want}") for have in row["ports"] for want in ports)


def _inside(row: Mapping[str, Any], names: Iterable[str]) -> bool:
    facts = row["container"]
    return any(
        name == facts.get("container.name") or (name and facts.get("container.id", "").startswith(name))
        for name in names
    )


def _labels(row: Mapping[str, Any], *, own: bool) -> str:
    """Labels but for those that stand in columns of their own."""
    shown = {k: v for k, v in row["labels"].items() if not (own and k in ("exe", "user", "unit"))}
    return ",".join(f"{k}={v}" for k, v in shown.items()) or "-"


def _container(row: Mapping[str, Any]) -> str:
    facts = row["container"]
    return str(facts.get("container.name") or facts.get("container.id", "")[:12])


def _card(row: Mapping[str, Any], color: bool) -> str:
    """One workload on some lines."""
    lines = [paint(escape(row["name"]), "bold", color)]

    def line(what: str, value: object) -> None:
        if value not in ("", None):
            lines.append(f"  {what:<12}{escape(value)}")

    line("named by", row["named_by"] or "nobody: an automatic identity")
    if row.get("spiffe_id"):
        line("identity", f"{row['spiffe_id']} until {show_time(row['not_after'])}")
    if row["problem"]:
        lines.append("  " + paint(f"{'no identity':<12}{escape(row['problem'])}", "bad", color))
    line("runs", f"{show_time(row['since'])} to {show_time(row['until']) if row.get('until') else 'now'}")
    line("processes", " ".join(map(str, row.get("pids", ()))))
    line("ports", " ".join(row["ports"]))
    line("user", f"{row['user'] or '?'} ({row['uid']})")
    line("executable", row["executable"] or "cannot be told: several programs share its sockets")
    line("SHA-256", row["sha256"])
    line("package", row["package"])
    line("unit", row["unit"])
    line("cgroup", row["cgroup"])
    lines.append("  labels")
    origins = row["origins"]
    wide = max((len(f"{k}={v}") for k, v in row["labels"].items()), default=0)
    for key, value in row["labels"].items():
        lines.append(f"    {escape(f'{key}={value}'):<{wide}}  {escape(origins.get(key, ''))}")
    for left in row["left_out"]:
        what = (
            f"{left['label']} of {left['from']} does not count: {left['by']} says otherwise, or owns the key"
        )
        lines.append("    " + paint(escape(what), "warn", color))
    if row["container"]:
        lines.append("  container")
        lines += [f"    {escape(f'{key}: {value}')}" for key, value in row["container"].items()]
    return "\n".join(lines)


def _past_branches(rows: list[dict[str, Any]], color: bool) -> Iterable[str]:
    """Lines of the tree without processes: cgroups, and the workloads in each."""
    cgroup = None
    for row in rows:
        if row["cgroup"] != cgroup:
            cgroup = row["cgroup"]
            yield paint(escape(cgroup), "bold", color)
        name = paint(escape(row["name"]), "dim", color)
        yield f"  {escape(row['executable'] or '?')}  {escape(row['user'] or row['uid'])}  {name}"


def _branches(rows: list[dict[str, Any]], color: bool) -> Iterable[str]:
    """Lines of the tree: cgroups, and in each its processes below their parents."""
    cgroup = None
    children: dict[int, list[dict[str, Any]]] = {}
    place = {row["pid"]: row["cgroup"] for row in rows}
    tops: list[dict[str, Any]] = []
    for row in rows:
        inside = place.get(row["parent"]) == row["cgroup"]
        (children.setdefault(row["parent"], []) if inside else tops).append(row)

    def below(row: dict[str, Any], depth: int) -> Iterable[str]:
        text = f"{'  ' * depth}{row['pid']} {escape(row['executable'] or '?')}  {escape(row['user'] or row['uid'])}"
        yield f"{text}  {paint(escape(row['workload']), 'dim', color)}"
        for child in children.get(row["pid"], ()):
            yield from below(child, depth + 1)

    for row in tops:
        if row["cgroup"] != cgroup:
            cgroup = row["cgroup"]
            yield paint(escape(cgroup), "bold", color)
        yield from below(row, 1)
