"""Sealed segments elsewhere: the same answers, everything that was changed on the way found, nothing merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sectool.cli.main import main
from sectool.errors import StoreError, UsageError
from sectool.identity.authority import load_authority_files
from sectool.identity.enrolment import enroll_host, init_ca
from sectool.identity.trust import TrustBundle
from sectool.labels import LabelSet
from store import case, sealed, segment
from store.case import Signer, export_case
from store.control import Actor, ControlHistory
from store.reader import LocalReader
from store.transfer import import_bundle
from store.verify import verify

HOUR = 3_600_000_000
Host = tuple[Any, Signer, TrustBundle]


@pytest.fixture(scope="module")
def host(make_lab: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host with four sealed segments of an hour each, the first compact; who signs; the roots."""
    lab = make_lab(tmp_path_factory.mktemp("transfer"))
    for life in range(4):
        store = lab.inside()
        lab.ring().put(lab.record(flow=life, pid=life, start=lab.T0 + life * HOUR))
        store.step()
        if life == 1:
            assert store.compact_next(0)[0]
        store.close()
    with ControlHistory(lab.state / "control.sqlite") as control:
        control.append("policy", "1", {"text": "rule"}, Actor(0, "root"), "why", lab.T0)
    init_ca(lab.state, "shop.example")
    enroll_host(lab.state, "host1", lab.state / "ca", LabelSet({"zone": "a"}), None, None, force=False)
    folder = lab.state / "host"
    certificate, key = load_authority_files(folder / "host.crt", folder / "host.key", "host CA", "")
    roots = TrustBundle.load(folder / "trust.pem")
    yield lab, Signer(certificate, key, (folder / "trust.pem").read_bytes()), roots


def export(host: Host, target: Path, hours: tuple[int, int]) -> dict[str, Any]:
    lab, signer, _ = host
    since, until = (lab.T0 + hour * HOUR for hour in hours)
    return export_case(
        None, lab.state, target, since=since, until=until, title="kept", now_us=lab.T0, signer=signer
    )


def pids(state: Path) -> list[int]:
    reader = LocalReader(state / "events")
    try:
        return list(reader.query("SELECT pid FROM flow_records ORDER BY seq").table["pid"].to_pylist())
    finally:
        reader.close()


def edit(path: Path, at: float = 0.5) -> None:
    path.chmod(0o640)
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def test_there_and_back(host: Host, tmp_path: Path) -> None:
    lab, _, roots = host
    manifest = export(host, tmp_path / "out", (0, 2))
    names = [path.name for path in segment.segment_files(lab.events)[:2]]
    assert manifest["segments"] == names
    assert Path(names[0]).suffix == segment.COMPACT
    assert manifest["rows"] == {"flow_records": 2, "events": 0}
    assert pids(tmp_path / "out") == [0, 1], "it is opened where it is"
    found = import_bundle(tmp_path / "out", tmp_path / "other", "march", roots)
    assert found.checked.known
    assert found.folder == tmp_path / "other" / "imported" / "march"
    assert pids(found.folder) == [0, 1]
    assert verify(found.folder).problems == (), "what was not exported is not missed"
    assert not (tmp_path / "other" / "events").exists(), "nothing is merged"
    with pytest.raises(UsageError, match="already"):
        import_bundle(tmp_path / "out", tmp_path / "other", "march", roots)
    assert not import_bundle(tmp_path / "out", tmp_path / "other", "again", None).checked.known


def test_what_was_changed_on_the_way_is_not_taken(host: Host, tmp_path: Path) -> None:
    export(host, tmp_path / "out", (0, 3))
    native = segment.segment_files(tmp_path / "out" / "events")[1].name
    changes: list[Callable[[Path], Any]] = [
        lambda bundle: edit(bundle / "events" / native),
        lambda bundle: (bundle / "events" / native).unlink(),
        lambda bundle: edit(bundle / "events" / segment.CHAIN),
        lambda bundle: edit(bundle / "manifest.json", 0.9),
        lambda bundle: (bundle / "events" / "flows-20260101T000000Z-1.duckdb").write_bytes(b"more"),
    ]
    for number, change in enumerate(changes):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "out", copy)
        change(copy)
        with pytest.raises((StoreError, UsageError)):
            import_bundle(copy, tmp_path / "other", "x", host[2])
        assert not list((tmp_path / "other").rglob("*x*")), "nothing was taken"


def test_a_signed_bundle_whose_chain_does_not_hold(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a host whose history was tampered with before it signed."""
    copy_sealed = sealed.copy_sealed

    def spoilt(events: Path, target: Path, since: int, until: int) -> dict[str, int]:
        counts = copy_sealed(events, target, since, until)
        lines = (target / segment.CHAIN).read_bytes().replace(b'"records": 1', b'"records": 2')
        (target / segment.CHAIN).unlink()
        (target / segment.CHAIN).write_bytes(lines)
        return counts

    monkeypatch.setattr(case, "copy_sealed", spoilt)
    export(host, tmp_path / "out", (0, 3))
    with pytest.raises(StoreError, match=r"chain\.jsonl: entry 1 was edited"):
        import_bundle(tmp_path / "out", tmp_path / "other", "x", host[2])


def test_a_tampered_segment_is_not_exported(host: Host, tmp_path: Path) -> None:
    lab, signer, _ = host
    shutil.copytree(lab.state, tmp_path / "state")
    edit(segment.segment_files(tmp_path / "state" / "events")[2])
    out, state = tmp_path / "out", tmp_path / "state"
    with pytest.raises(StoreError, match="changed after it was sealed"):
        export_case(None, state, out, since=0, until=1 << 60, title="", now_us=1, signer=signer)
    assert not out.exists()
    with pytest.raises(StoreError, match="no sealed segment"):
        export(host, tmp_path / "nothing", (50, 60))


def test_another_release_is_told(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(host, tmp_path / "out", (1, 2))
    monkeypatch.setattr("store.transfer.SEGMENT_VERSION", 99)
    with pytest.raises(StoreError, match="this release reads 99"):
        import_bundle(tmp_path / "out", tmp_path / "other", "x", None)


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "x" * 101, ".hidden", "a\n"])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        import_bundle(tmp_path, tmp_path, name, None)


def test_by_command(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab, _, _ = host
    here = ("--state", str(lab.state), "--run", str(lab.run), "store")
    elsewhere = ("--state", str(tmp_path / "other"), "--run", str(tmp_path / "run"), "store")
    out = tmp_path / "out"
    assert main([*here, "export", str(out), "--title", "all"]) == 0
    assert "4 flow records" in capsys.readouterr().out
    assert main([*elsewhere, "import", str(out)]) == 4
    assert "no root known here" in capsys.readouterr().err
    root = str(lab.state / "ca" / "root.crt")
    assert main([*elsewhere, "import", str(out), "--name", "b", "--root", root, "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["signer_known"]
    assert main(["--store", told["folder"], "store", "verify"]) == 0
    assert main([*elsewhere, "import", str(tmp_path)]) == 2
