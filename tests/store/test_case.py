"""Case bundles: another reader opens them, and whatever is done to one is found."""

from __future__ import annotations

import base64
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.errors import UsageError
from sectool.identity.authority import load_authority_files
from sectool.identity.enrolment import enroll_host, init_ca
from sectool.identity.trust import TrustBundle
from sectool.labels import LabelSet
from store.case import Signer, canonical, check_case, export_case, parse_manifest
from store.reader import open_reader
from tests.store.shop import HOUR, fill, settle


@pytest.fixture(scope="module")
def bundle(
    make_lab: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Path, TrustBundle]]:
    """A lab, a bundle of its first 26 hours, and the roots it was signed under."""
    base = tmp_path_factory.mktemp("case")
    lab = make_lab(base)
    fill(lab)
    settle(lab)
    init_ca(lab.state, "shop.example")
    enroll_host(lab.state, "host1", lab.state / "ca", LabelSet({"zone": "a"}), None, None, force=False)
    host = lab.state / "host"
    certificate, key = load_authority_files(host / "host.crt", host / "host.key", "host CA", "")
    roots = (host / "trust.pem").read_bytes()
    reader = open_reader(lab.state, lab.run)
    capture = base / "db.pcapng"
    capture.write_bytes(b"packets")
    export_case(
        reader,
        lab.state,
        base / "case-1",
        since=lab.T0,
        until=lab.T0 + 26 * HOUR,
        title="incident",
        now_us=lab.T0,
        signer=Signer(certificate, key, roots),
        captures=[capture],
    )
    reader.close()
    yield lab, base / "case-1", TrustBundle.load(host / "trust.pem")


@pytest.fixture
def copy(bundle: tuple[Any, Path, TrustBundle], tmp_path: Path) -> Path:
    """A bundle to spoil."""
    target = tmp_path / "copy"
    shutil.copytree(bundle[1], target)
    for path in target.rglob("*"):
        if path.is_file():
            path.chmod(0o640)
    return target


def test_it_holds_and_answers_like_the_host(bundle: tuple[Any, Path, TrustBundle], tmp_path: Path) -> None:
    lab, folder, roots = bundle
    found = check_case(folder, roots)
    assert (found.problems, found.host, found.known) == ((), "host1", True)
    assert not check_case(folder, None).known
    host = open_reader(lab.state, lab.run)
    case = open_reader(folder, folder / "no-daemon")
    window = {"since": lab.T0, "until": lab.T0 + 26 * HOUR}
    try:
        assert case.flows(**window, last=500).table.equals(host.flows(**window, last=500).table)
        for question, fields in (
            ("timeline", {**window, "limit": 50}),
            ("changes", {"before": lab.T0 + 20 * HOUR, "after": lab.T0 + 26 * HOUR}),
            ("state", {"at": lab.T0 + 25 * HOUR}),
            ("connectivity", window),
        ):
            assert case.ask(question, **fields) == host.ask(question, **fields)
    finally:
        host.close()
        case.close()
    assert check_case(folder, roots).problems == ()  # reading left nothing in it
    assert (folder / "policies" / "revision-2.yaml").read_text().count("app=cache") == 2


def test_a_folder_that_is_there_is_not_touched(bundle: tuple[Any, Path, TrustBundle], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        export_case(None, tmp_path, tmp_path, since=1, until=2, title="", now_us=1, signer=None)  # type: ignore[arg-type]
    assert tmp_path.exists()


def _flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at if at >= 0 else len(data) // 2] ^= 1
    path.write_bytes(data)


def test_every_file_is_watched(copy: Path, bundle: tuple[Any, Path, TrustBundle]) -> None:
    names = [str(p.relative_to(copy)) for p in sorted(copy.rglob("*")) if p.is_file()]
    assert {"manifest.sig", "control.sqlite", "captures/db.pcapng", "certificates/host.crt"} <= set(names)
    for name in names:
        path = copy / name
        sound = path.read_bytes()
        _flip(path)
        try:
            problems = check_case(copy, bundle[2]).problems
        except UsageError:  # no manifest any more
            assert name == "manifest.json"
        else:
            assert problems, name
            assert name in problems[0] or name in ("manifest.sig", "certificates/host.crt")
        path.unlink()
        try:
            assert check_case(copy, bundle[2]).problems == (f"{name}: is missing",)
        except UsageError:
            assert name in ("manifest.json", "manifest.sig", "certificates/host.crt")
        path.write_bytes(sound)
    assert check_case(copy, bundle[2]).problems == ()


def test_what_is_added_or_linked_is_found(copy: Path, tmp_path: Path) -> None:
    (copy / "events" / "flows-20300101T000000Z-1.duckdb").write_bytes(b"more")
    assert check_case(copy, None).problems == ("events/flows-20300101T000000Z-1.duckdb: was added",)
    (copy / "events" / "flows-20300101T000000Z-1.duckdb").unlink()
    real = copy / "captures" / "db.pcapng"
    real.rename(tmp_path / "elsewhere")
    real.symlink_to(tmp_path / "elsewhere")
    assert check_case(copy, None).problems == ("captures/db.pcapng: is no plain file",)


def test_a_list_rewritten_to_fit_is_found(copy: Path) -> None:
    policy = copy / "policies" / "revision-1.yaml"
    policy.write_text("nothing was forbidden")
    manifest = json.loads((copy / "manifest.json").read_text())
    import hashlib

    for entry in manifest["files"]:
        if entry["path"] == "policies/revision-1.yaml":
            entry["sha256"] = hashlib.sha256(policy.read_bytes()).hexdigest()
    (copy / "manifest.json").write_bytes(canonical(manifest))
    assert "signature does not fit" in check_case(copy, None).problems[0]


def test_another_host_may_sign_but_is_not_known(
    copy: Path, bundle: tuple[Any, Path, TrustBundle], tmp_path: Path
) -> None:
    """All of it signed again with a key of the forger's own domain of the same name."""
    from store.case import _sign

    init_ca(tmp_path, "shop.example")
    enroll_host(tmp_path, "host1", tmp_path / "ca", LabelSet({}), None, None, force=False)
    host = tmp_path / "host"
    _, key = load_authority_files(host / "host.crt", host / "host.key", "host CA", "")
    manifest = json.loads((copy / "manifest.json").read_text())
    import hashlib

    (copy / "certificates" / "host.crt").write_bytes((host / "host.crt").read_bytes())
    for entry in manifest["files"]:
        entry["sha256"] = hashlib.sha256((copy / entry["path"]).read_bytes()).hexdigest()
    text = canonical(manifest)
    (copy / "manifest.json").write_bytes(text)
    (copy / "manifest.sig").write_bytes(base64.b64encode(_sign(key, text)))
    found = check_case(copy, bundle[2])
    assert found.problems == ()
    assert not found.known


def test_history_edited_before_signing_is_found(
    bundle: tuple[Any, Path, TrustBundle], tmp_path: Path
) -> None:
    """The chain inside speaks where the list of hashes was made over a lie."""
    from sectool.errors import StoreError

    lab, _, _ = bundle
    state = tmp_path / "state"
    shutil.copytree(lab.state, state)
    with sqlite3.connect(state / "control.sqlite") as db:
        db.execute("DROP TRIGGER rows_fixed")
        db.execute("UPDATE rows SET body = replace(body, 'alice', 'mallory')")
    host = state / "host"
    certificate, key = load_authority_files(host / "host.crt", host / "host.key", "host CA", "")
    reader = open_reader(state, tmp_path / "run")
    try:
        with pytest.raises(StoreError, match="does not hold"):
            export_case(
                reader,
                state,
                tmp_path / "out",
                since=lab.T0,
                until=lab.T0 + HOUR,
                title="",
                now_us=lab.T0,
                signer=Signer(certificate, key, b""),
            )
    finally:
        reader.close()
    assert not (tmp_path / "out").exists()


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=8),
        lambda s: (
            st.lists(s, max_size=3)
            | st.dictionaries(
                st.sampled_from(["format", "files", "title", "path", "sha256", "control_head"]), s, max_size=5
            )
        ),
        max_leaves=12,
    ).map(lambda v: json.dumps(v).encode())
)
def test_any_bytes_are_a_manifest_or_refused(data: bytes) -> None:
    try:
        manifest = parse_manifest(data)
    except UsageError:
        return
    assert canonical(manifest)
