"""`sectool store export` and `import`: sealed segments on other machines, as they were sealed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sectool.cli.case import host_signer, tell_manifest, trusted_roots
from sectool.cli.context import require_root, session
from sectool.cli.moments import moment_us
from sectool.cli.output import Format, emit_document
from sectool.errors import Exit
from sectool.events import now_us

Output = Annotated[Format, typer.Option("--output", "-o", help="table, json or yaml.")]


def export(
    ctx: typer.Context,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is not there yet.")],
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="TIME", help="Segments with rows from then on [default: all]."),
    ] = None,
    until: Annotated[str, typer.Option("--until", metavar="TIME", help="Up to then.")] = "now",
    title: Annotated[str, typer.Option("--title", metavar="TEXT", help="What it is kept for.")] = "",
    output: Output = Format.TABLE,
) -> None:
    """Copy sealed segments, as they are, with their chain of hashes and the control history, to another place.

    The folder is a case bundle, signed by this host, with whole segments in place of a window's rows: `case verify`
    checks it, `sectool --store DIR` opens it, `store import` takes it in elsewhere. What is not sealed yet is left out.

    \b
    Examples:
      sudo sectool store export /mnt/archive/march --since 2026-03-01 --until 2026-04-01
      sudo sectool store export /mnt/archive/all --title "before the disk is replaced"
    """
    from store.case import export_case

    require_root("signing with the host's key")
    here = session(ctx)
    manifest = export_case(
        None,
        here.paths.state,
        target,
        since=0 if since is None else moment_us(since),
        until=moment_us(until),
        title=title,
        now_us=now_us(),
        signer=host_signer(here),
    )
    if output in (Format.TABLE, Format.WIDE):
        tell_manifest(manifest)
        here.say(f"{len(manifest['segments'])} segments; next, elsewhere: sudo sectool store import {target}")
    else:
        emit_document(manifest, output, manifest["format"])


def import_(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `store export` wrote.")],
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="What to call it here [default: host and begin]."),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            "--root", metavar="FILE", help="Root certificates to trust, PEM [default: those of this host]."
        ),
    ] = None,
    trust_domain: Annotated[
        str,
        typer.Option(
            "--trust-domain", metavar="NAME", help="Whose roots --root holds [default: the bundle's]."
        ),
    ] = "",
    output: Output = Format.TABLE,
) -> None:
    """Take in exported segments: checked against signature, hashes and chain, and kept apart from this host's history.

    Nothing is merged. The copy lies in imported/NAME of the state folder and is asked with `--store`. Exits 1, with
    nothing taken, when anything does not hold; 4 when it holds but no root known here vouches for who signed it.

    \b
    Examples:
      sudo sectool store import /mnt/archive/march
      sudo sectool store import march --name db1-march --root shop-root.crt
    """
    from store.case import manifest_of
    from store.transfer import import_bundle, suggested_name

    here = session(ctx)
    require_root("writing to the state folder", f"sectool --store {folder}, which opens it where it is")
    trusted = trusted_roots(here, folder, root, trust_domain)
    found = import_bundle(folder, here.paths.state, name or suggested_name(manifest_of(folder)), trusted)
    if output in (Format.TABLE, Format.WIDE):
        tell_manifest(found.checked.manifest)
        here.say(f"{len(found.segments)} segments hold; next: sectool --store {found.folder} timeline")
    else:
        document = {
            "folder": str(found.folder),
            "segments": list(found.segments),
            "host": found.checked.host,
            "signer": found.checked.signer,
            "signer_known": found.checked.known,
        }
        emit_document(document, output, "sectool.store.import/1")
    if not found.checked.known:
        here.warn(
            f"no root known here vouches for {found.checked.host}; give its root with --root, or compare the SHA-256"
            f" of its certificate with what you know of it: {found.checked.signer}"
        )
        raise typer.Exit(int(Exit.PARTIAL))
