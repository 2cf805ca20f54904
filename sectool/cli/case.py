"""`sectool case`: a window of history as a signed bundle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sectool.cli.context import Session, require_root, session
from sectool.cli.moments import moment_us
from sectool.cli.output import Format, emit_document, paint
from sectool.cli.reading import reading
from sectool.cli.text import escape, size
from sectool.errors import Exit, SectoolError, UsageError
from sectool.events import now_us

if TYPE_CHECKING:
    from sectool.identity.trust import TrustBundle
    from store.case import Checked, Signer

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

SCHEMA = "sectool.case-check/1"

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The bundle.")]
Root = Annotated[
    Path | None,
    typer.Option(
        "--root", metavar="FILE", help="Root certificates to trust, PEM [default: those this host trusts]."
    ),
]
Domain = Annotated[
    str,
    typer.Option("--trust-domain", metavar="NAME", help="Whose roots --root holds [default: the bundle's]."),
]
Output = Annotated[Format, typer.Option("--output", "-o", help="table, json or yaml.")]


@app.callback()
def case() -> None:
    """A window of history as a signed bundle that another machine checks and opens with the same commands.

    \b
    Examples:
      sectool case export case-17 --since 02:00 --until 03:00 --title "database unreachable"
      sectool case verify case-17 --root shop-root.crt
      sectool --store case-17 timeline --at 02:10
    """


@app.command()
def export(
    ctx: typer.Context,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is not there yet.")],
    since: Annotated[str, typer.Option("--since", metavar="TIME", help="Flows and events from then on.")],
    until: Annotated[str, typer.Option("--until", metavar="TIME", help="Up to then.")] = "now",
    title: Annotated[str, typer.Option("--title", metavar="TEXT", help="What the case is about.")] = "",
    capture: Annotated[
        list[Path] | None,
        typer.Option("--capture", metavar="FILE", help="A packet capture to include (.pcapng); repeatable."),
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Write the bundle: events as Parquet, policies, certificates, the control history, a signed list of hashes.

    It holds everything that is on record of that time, and is readable for its owner alone.

    \b
    Examples:
      sectool case export case-17 --since 1h
      sectool case export case-18 --since 02:00 --until 03:00 --capture db.pcapng --title "incident 18"
    """
    from store.case import export_case

    require_root("signing with the host's key")
    here = session(ctx)
    signer = host_signer(here)
    files = capture or []
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        raise UsageError("two captures have one name", "rename one")
    for file in files:
        if not file.is_file():
            raise UsageError(f"there is no file {file}")
    with reading(here) as reader:
        manifest = export_case(
            reader,
            here.paths.state,
            target,
            since=moment_us(since),
            until=moment_us(until),
            title=title,
            now_us=now_us(),
            signer=signer,
            captures=files,
        )
    if output in (Format.TABLE, Format.WIDE):
        tell_manifest(manifest)
        here.say(f"next: sectool case verify {target}; sectool --store {target} timeline")
    else:
        emit_document(manifest, output, manifest["format"])


@app.command()
def verify(
    ctx: typer.Context,
    folder: Folder,
    root: Root = None,
    trust_domain: Domain = "",
    output: Output = Format.TABLE,
) -> None:
    """Check that nothing in a bundle was changed since its host signed it, and who that host is.

    Exits 0 when it holds and a trusted root vouches for the signer, 1 when something was changed, added or removed,
    4 when it holds but the signer's root is not known here: then anybody could have written it.

    \b
    Examples:
      sectool case verify case-17
      sectool case verify case-17 --root shop-root.crt
    """
    here = session(ctx)
    found = _checked(here, folder, root, trust_domain)
    if output in (Format.TABLE, Format.WIDE):
        for problem in found.problems:
            sys.stdout.write(paint(escape(problem), "bad", here.color) + "\n")
        if not found.problems:
            sys.stdout.write(
                escape(f"{folder}: {len(found.manifest['files'])} files are as {found.host} signed them")
                + "\n"
            )
    else:
        document = {
            "holds": not found.problems,
            "signer_known": found.known,
            "host": found.host,
            "signer": found.signer,
            "problems": list(found.problems),
        }
        emit_document(document, output, SCHEMA)
    if found.problems:
        raise typer.Exit(int(Exit.DENIED))
    if not found.known:
        here.warn(
            f"no root known here vouches for {found.host}; give its root with --root, or compare the SHA-256 of its"
            f" certificate with what you know of it: {found.signer}"
        )
        raise typer.Exit(int(Exit.PARTIAL))


@app.command()
def show(
    ctx: typer.Context,
    folder: Folder,
    root: Root = None,
    trust_domain: Domain = "",
    output: Output = Format.TABLE,
) -> None:
    """Show what a bundle holds, after checking it (exits 1 when it was changed).

    \b
    Example:
      sectool case show case-17
    """
    here = session(ctx)
    found = _checked(here, folder, root, trust_domain)
    if output in (Format.TABLE, Format.WIDE):
        tell_manifest(found.manifest)
        for file in found.manifest["files"]:
            sys.stdout.write(
                f"  {file['sha256'][:16]}  {size(file.get('bytes') or 0):>9}  {escape(file['path'])}\n"
            )
    else:
        emit_document(found.manifest, output, found.manifest["format"])
    for problem in found.problems:
        here.warn(problem)
    if found.problems:
        raise typer.Exit(int(Exit.DENIED))


def host_signer(here: Session) -> Signer:
    """The host CA and its key, with which this host signs bundles. Raises SectoolError."""
    from sectool.identity.authority import load_authority_files
    from sectool.identity.files import read_file
    from store.case import Signer

    hint = "enrol this host first: sectool host enroll"
    certificate, key = load_authority_files(
        here.paths.host / "host.crt", here.paths.host / "host.key", "host CA", hint
    )
    return Signer(
        certificate, key, read_file(here.paths.host / "trust.pem", "there are no trusted roots here", hint)
    )


def _checked(here: Session, folder: Path, root: Path | None, trust_domain: str) -> Checked:
    from store.case import check_case

    return check_case(folder, trusted_roots(here, folder, root, trust_domain))


def trusted_roots(here: Session, folder: Path, root: Path | None, trust_domain: str) -> TrustBundle | None:
    """The roots given, else those this host trusts, if it can be asked; never those of the bundle."""
    from sectool.identity.trust import TrustBundle
    from store.case import manifest_of

    if root is not None:
        try:
            pem = root.read_text(encoding="ascii")
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {root}: {error}", "give the root's certificate in PEM") from None
        domain = trust_domain or manifest_of(folder)["trust_domain"]
        return TrustBundle().with_root(domain, pem)
    try:
        return TrustBundle.load(here.paths.host / "trust.pem")
    except (SectoolError, OSError):
        return None


def tell_manifest(manifest: dict[str, Any]) -> None:
    """What a bundle holds, in lines."""
    rows = manifest.get("rows") or {}
    for title, text in (
        ("case", manifest["title"] or "(no title)"),
        ("host", f"{manifest['host']} in {manifest['trust_domain']}"),
        ("window", f"{manifest['since']} to {manifest['until']}"),
        ("written", manifest["created"]),
        ("holds", ", ".join(f"{count} {table.replace('_', ' ')}" for table, count in rows.items())),
    ):
        sys.stdout.write(f"{title:<8} {escape(text)}\n")
