"""Case bundles: a window of history in a folder that any machine can open and check.

    manifest.json               what, when, where, and the SHA-256 of every other file
    manifest.sig                the host key's signature over it
    certificates/host.crt       whose key that is;  certificates/trust.pem  the roots the host trusted
    events/flows-…-1.parquet/   the window's flows and events, a file a table: what a reader opens as a segment
    control.sqlite              the whole control history, whose chain proves that nothing is missing from it
    policies/revision-N.yaml    the policies that were in force in the window
    captures/*.pcapng           packets, where some were taken

A signature proves who wrote the bundle, not that what the host saw is true. The roots inside are the bundle's own
word: only a root that the one who checks knows already makes the signer somebody.
"""

# ruff: noqa: S608 -- SQL is put together from this package's own schema and numbers

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.clock import iso
from sectool.errors import CredentialError, SectoolError, StoreError, UsageError
from sectool.identity.blob import SigningKey
from sectool.identity.profile import Profile, read_profile
from sectool.identity.trust import TrustBundle
from store.control import ControlHistory
from store.past import CONTROL, open_history
from store.query import MAX_TIMEOUT_MS
from store.reader import Reader
from store.schema import SEGMENT_TABLES, SEGMENT_VERSION
from store.sealed import copy_sealed
from store.segment import segment_files, segment_name

FORMAT = "sectool.case/1"
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
HOST_CERTIFICATE, ROOTS = "certificates/host.crt", "certificates/trust.pem"
MAX_MANIFEST = 16 << 20
PAGE = 200_000  # rows fetched at once
_DOMAIN = b"sectool case manifest v1\n"
_HASH = re.compile(r"[0-9a-f]{64}")
_MODE = 0o440


@dataclass(frozen=True, slots=True)
class Signer:
    """Who signs: the host CA's certificate and key, and the roots the host trusts (PEM)."""

    certificate: Profile
    key: SigningKey
    roots: bytes


@dataclass(frozen=True, slots=True)
class Checked:
    """What checking a bundle came to. Without `problems` nothing was changed since `host` signed it.

    `known`: a root that the checker trusts vouches for the signer; otherwise `signer` is a fingerprint to compare.
    """

    manifest: dict[str, Any]
    problems: tuple[str, ...]
    host: str
    signer: str
    known: bool


def export_case(
    reader: Reader | None,
    state: Path,
    target: Path,
    *,
    since: int,
    until: int,
    title: str,
    now_us: int,
    signer: Signer,
    captures: Sequence[Path] = (),
) -> dict[str, Any]:
    """Write the bundle of [since, until) (UTC microseconds) to the new folder `target`; its manifest.

    Without a reader it gets the sealed segments of that time as they are, and their chain, instead of rows.
    Raises UsageError when `target` exists, StoreError when a part cannot be read. What a failure leaves is removed.
    """
    if since >= until:
        raise UsageError("the window is empty: it ends before it begins", "give --since an earlier time")
    try:
        target.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise UsageError(f"{target} is there already", "a case is written to a folder of its own") from None
    try:
        if reader is None:
            counts = copy_sealed(state / "events", target / "events", since, until)
            given = {"segments": [path.name for path in segment_files(target / "events")]}
        else:
            counts, given = _write_events(reader, target / "events", since, until), {}
        head = _copy_control(state, target / CONTROL)
        _write_policies(state / "events", target / "policies", since, until)
        _put(target / HOST_CERTIFICATE, signer.certificate.certificate.public_bytes(Encoding.PEM))
        _put(target / ROOTS, signer.roots)
        for capture in captures:
            _put(target / "captures" / capture.name, capture.read_bytes())
        manifest = {
            "format": FORMAT,
            "title": title,
            "host": signer.certificate.host_name(),
            "trust_domain": signer.certificate.spiffe_id().trust_domain,
            "created": iso(now_us),
            "since": iso(since),
            "until": iso(until),
            "rows": counts,
            **given,
            "control_head": head,
            "files": [_listed(target, name) for name in _files(target)],
        }
        text = canonical(manifest)
        _put(target / MANIFEST, text)
        _put(target / SIGNATURE, base64.b64encode(_sign(signer.key, text)) + b"\n")
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, OSError):
            raise StoreError(f"cannot write the case: {error.strerror or error}", "is there room?") from None
        raise
    return manifest


def canonical(manifest: dict[str, Any]) -> bytes:
    """The one spelling of a manifest: equal content gives equal bytes."""
    return json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=True).encode() + b"\n"


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    with os.fdopen(fd, "wb") as file:
        file.write(data)


def _files(folder: Path) -> list[str]:
    """Everything below `folder` that is no folder, by its path from there."""
    found = (Path(where) / name for where, _, names in os.walk(folder) for name in names)
    return sorted(str(path.relative_to(folder)) for path in found)


def _listed(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    with path.open("rb") as file:
        return {
            "path": name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _write_events(reader: Reader, events: Path, since: int, until: int) -> dict[str, int]:
    folder = events / segment_name(since, 1).replace(".duckdb", ".parquet")
    folder.mkdir(mode=0o700, parents=True)
    scratch = folder / "scratch.duckdb"
    counts: dict[str, int] = {}
    try:
        with duckdb.connect(str(scratch)) as connection:
            for table, columns in SEGMENT_TABLES.items():
                names = ", ".join(f'"{name}" {kind}' for name, kind in columns)
                connection.execute(f"CREATE TABLE {table} ({names})")
                for page in _pages(reader, table, columns, since, until):
                    connection.register("page", page)
                    casts = ", ".join(f'"{name}"::{kind} AS "{name}"' for name, kind in columns)
                    connection.execute(f"INSERT INTO {table} SELECT {casts} FROM page")
                    connection.unregister("page")
                if table == "meta":
                    meta = f"{SEGMENT_VERSION}, make_timestamp({since:d}), 0, 0"
                    connection.execute(f"INSERT INTO meta SELECT {meta}")
                (counts[table],) = connection.execute(f"SELECT count(*) FROM {table}").fetchall()[0]
                order = "seq" if table in ("flow_records", "events") else "1"
                file = folder / f"{table}.parquet"
                connection.execute(
                    f"COPY (SELECT * FROM {table} ORDER BY {order}) TO '{_quoted(file)}'"
                    " (FORMAT parquet, COMPRESSION zstd)"
                )
                file.chmod(_MODE)
    except duckdb.Error as error:
        raise StoreError(f"the events cannot be written: {str(error).splitlines()[0][:300]}") from None
    finally:
        for path in (scratch, scratch.with_name(scratch.name + ".wal")):
            path.unlink(missing_ok=True)
    return {table: count for table, count in counts.items() if table not in ("meta", "positions")}


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _pages(
    reader: Reader, table: str, columns: Sequence[tuple[str, str]], since: int, until: int
) -> Iterator[Any]:
    """The window's rows of one table, by pages in order of their numbers; dictionaries whole, as far as needed."""
    if table in ("meta", "positions"):
        return
    names = ", ".join(
        f'"{name}"::VARCHAR AS "{name}"' if kind == "UUID" else f'"{name}"' for name, kind in columns
    )
    key = "seq" if table in ("flow_records", "events") else "id"
    window = "true"
    begin, end = f"make_timestamp({since:d})", f"make_timestamp({until:d})"
    if table == "flow_records":  # those that were open when the window begins belong to it
        window = (
            f"(event_start >= {begin} AND event_start < {end} OR event_start < {begin} AND"
            f" event_id::VARCHAR IN (SELECT event_id FROM flows_open_at({begin})))"
        )
    elif table == "events":  # and what says how the enforcer stood then
        window = (
            f"(ts >= {begin} AND ts < {end} OR ts < {begin} AND starts_with(type, 'enforcer.')"
            " AND ts >= (SELECT max(ts) FROM events WHERE type IN ('enforcer.start', 'enforcer.stop')"
            f" AND ts < {begin}))"
        )
    last = -1
    while True:
        result = reader.query(
            f"SELECT {names} FROM {table} WHERE {window} AND {key} > {last:d} ORDER BY {key} LIMIT {PAGE}",
            limit=PAGE,
            timeout_ms=MAX_TIMEOUT_MS,
        )
        if not result.table.num_rows:
            return
        yield result.table
        last = result.table[key][-1].as_py()
        if result.table.num_rows < PAGE and not result.truncated:
            return


def _copy_control(state: Path, target: Path) -> dict[str, Any]:
    """The control history in one file, and its newest entry."""
    source = state / CONTROL
    if not source.exists():
        return {"transactions": 0, "hash": ""}
    with ControlHistory(
        source, read_only=True
    ) as history:  # says what is wrong with it better than sqlite would
        problem = history.verify()
    if problem:
        raise StoreError(f"the control history does not hold: {problem}", "sectool store verify tells more")
    with (
        contextlib.closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as old,
        contextlib.closing(sqlite3.connect(target)) as new,
    ):
        old.backup(new)
        new.execute("PRAGMA journal_mode = DELETE")  # readers of the bundle add no files to it
    target.chmod(_MODE)
    return _control_head(target)


def _control_head(path: Path) -> dict[str, Any]:
    with ControlHistory(path, read_only=True) as history:
        entries = history.transactions()
    return {"transactions": len(entries), "hash": entries[-1].hash if entries else ""}


def _write_policies(events: Path, folder: Path, since: int, until: int) -> None:
    with open_history(events) as history:
        numbers = {
            int(v.body["revision"])
            for v in history.versions("activation")
            if v.valid_from < until and (v.valid_to is None or v.valid_to > since)
        }
        for number in sorted(numbers):
            revision = history.revision(number)
            if revision is not None:
                _put(folder / f"revision-{number}.yaml", revision.text.encode())


def _sign(key: SigningKey, text: bytes) -> bytes:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(_DOMAIN + text)
    return key.sign(_DOMAIN + text, ec.ECDSA(hashes.SHA256()))


def manifest_of(folder: Path) -> dict[str, Any]:
    """What a bundle says of itself, not checked. Raises UsageError for what is no bundle."""
    return parse_manifest(_read_small(folder / MANIFEST))


def check_case(folder: Path, trusted: TrustBundle | None) -> Checked:
    """Check a bundle: signature first, then every file against the signed list. Raises UsageError for what is none."""
    text = _read_small(folder / MANIFEST)
    manifest = parse_manifest(text)
    try:
        host = _certificate(_read_small(folder / HOST_CERTIFICATE), "host CA")
        host.check_ca()
        name, domain = host.host_name(), host.spiffe_id().trust_domain
        signature = base64.b64decode(_read_small(folder / SIGNATURE).strip(), validate=True)
        _verify(host, signature, text)
    except (CredentialError, binascii.Error, InvalidSignature) as error:
        why = error.message if isinstance(error, CredentialError) else "the signature does not fit"
        return Checked(
            manifest, (f"{MANIFEST}: was changed, or signed by somebody else: {why}",), "", "", False
        )
    problems = list(_compare(folder, manifest))
    if (manifest["host"], manifest["trust_domain"]) != (name, domain):
        problems.append(f"{MANIFEST}: says {manifest['host']}, but {name} of {domain} signed it")
    known = trusted is not None and any(_vouches(root, host) for root in trusted.roots.get(domain, ()))
    if not problems:
        problems += _check_control(folder, manifest)
    return Checked(manifest, tuple(problems), name, host.fingerprint.hex(), known)


def _read_small(path: Path) -> bytes:
    try:
        if path.is_symlink():
            raise UsageError(f"{path} is a link", "a case holds plain files only")
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{path.parent} is no case: there is no {path.name}", "sectool case export makes one"
        ) from None
    except (OSError, ValueError) as error:
        raise SectoolError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_MANIFEST:
        raise UsageError(f"{path} is too large to be what it should be")
    return data


def parse_manifest(text: bytes) -> dict[str, Any]:
    """The manifest, with everything that is used later in place. Raises UsageError."""
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UsageError(f"this is no manifest of {FORMAT}", "it may be of another release, or damaged")
    texts = all(
        isinstance(manifest.get(k), str)
        for k in ("title", "host", "trust_domain", "created", "since", "until")
    )
    files, head = manifest.get("files"), manifest.get("control_head")
    segments = manifest.get("segments", [])
    texts = texts and isinstance(segments, list) and all(isinstance(name, str) for name in segments)
    if not texts or not isinstance(files, list) or not all(map(_sound, files)) or not isinstance(head, dict):
        raise UsageError("the manifest lacks what it should hold", "it may be damaged")
    return manifest


def _sound(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("path"), str)
        and isinstance(entry.get("sha256"), str)
        and bool(_HASH.fullmatch(entry["sha256"]))
    )


def _certificate(pem: bytes, role: str) -> Profile:
    try:
        return read_profile(x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER), role)
    except ValueError as error:
        raise binascii.Error(str(error)) from None


def _verify(host: Profile, signature: bytes, text: bytes) -> None:
    key = host.public_key
    if isinstance(key, ed25519.Ed25519PublicKey):
        key.verify(signature, _DOMAIN + text)
    else:
        key.verify(signature, _DOMAIN + text, ec.ECDSA(hashes.SHA256()))


def _vouches(root: Profile, host: Profile) -> bool:
    try:
        host.issued_by(root)
    except CredentialError:
        return False
    return True


def _compare(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    listed = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    there = set(_files(folder)) - {MANIFEST, SIGNATURE}
    for name in sorted(there - listed.keys()):
        yield f"{name}: was added"
    for name in sorted(listed):
        path = folder / name
        if name not in there:
            yield f"{name}: is missing"
        elif path.is_symlink() or not path.is_file():
            yield f"{name}: is no plain file"
        elif not hmac.compare_digest(_listed(folder, name)["sha256"], listed[name]):
            yield f"{name}: was changed"


def _check_control(folder: Path, manifest: dict[str, Any]) -> list[str]:
    path = folder / CONTROL
    if not path.exists():
        return []
    try:
        with ControlHistory(path, read_only=True) as history:
            problem = history.verify()
        if problem is None and _control_head(path) != manifest["control_head"]:
            problem = "it does not end where the manifest says"
    except StoreError as error:
        problem = error.message
    return [f"{CONTROL}: {problem}"] if problem else []
