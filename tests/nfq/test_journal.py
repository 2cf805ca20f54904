"""What a worker finds again of the one before it, whatever moment that one died at."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nfq import journal as journal_module
from nfq import journalslot
from nfq.core import address
from nfq.flow import Flow, LocalWorkload, Owner, State
from nfq.journal import Journal
from nfq.journalnames import JournalNames, number_of, read
from nfq.journalslot import SIZE, STATE_AT
from nfq.noise import KeyPair
from nfq.packet import ACK
from nfq.record import LEAP, Records
from nfq.suites import AES_256_GCM, CHACHA20_POLY1305, Suite
from nfq.tmpfs import in_memory
from nfq.udpflow import UdpFlow
from nfq.udprecord import Datagrams
from sectool.errors import SectoolError
from sectool.events import Auth, AuthResult, DropReason, Point
from sectool.identity.verify import PeerIdentity
from sectool.labels import LabelSet
from sectool.policy import Party, Request
from tests.nfq import segments

HEADER = 64
SLOTS = 16
I2R, R2I = bytes(range(32)), bytes(range(32, 64))
KEY4 = bytes((10, 0, 0, 1, 10, 0, 0, 2)) + (40_000).to_bytes(2, "big") + (5432).to_bytes(2, "big")
KEY6 = bytes(15) + b"\1" + bytes(15) + b"\2" + KEY4[-4:]
KEYS = KeyPair.of(bytes(31) + b"\x41")
SUITES = pytest.mark.parametrize("suite", [AES_256_GCM, CHACHA20_POLY1305], ids=lambda s: s.name)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        yield Path(made)


def identity(number: int, **labels: str) -> PeerIdentity:
    return PeerIdentity(
        spiffe_id=f"spiffe://lab.example/host/a/{number}",
        trust_domain="lab.example",
        labels=LabelSet(labels),
        x25519=bytes(31) + bytes((number & 0xFF,)),
        not_before_us=1,
        not_after_us=2,
        fingerprint=bytes(32),
        serial=f"{number:x}",
        host="a",
        id=number,
    )


MINE, THEIRS = identity(11, app="db"), identity(22, app="web", env="prod")


def make(key: bytes = KEY4, suite: Suite | None = None, *, point: Point = Point.RESPONDER) -> Flow:
    """A flow as `Core.release` leaves it."""
    flow = Flow(key, len(key) == 36, point, State.AUTHORISED, 0xDEAD_BEEF, 1_790_000_000_000_000)
    return complete(flow, suite)


def complete(flow: Flow, suite: Suite | None = None) -> Flow:
    flow.peer_isn, flow.mss = 77, 1400
    flow.auth, flow.auth_result = Auth.NOISE_IX, AuthResult.PROVEN
    flow.event_id, flow.revision = os.urandom(16), 9
    flow.owner = Owner(1234, 33, 5678)
    flow.local, flow.peer = LocalWorkload(7, "db", KEYS, b"blob", MINE), THEIRS
    here = Party(MINE.labels, MINE.spiffe_id, address(flow.local_address))
    there = Party(THEIRS.labels, THEIRS.spiffe_id, address(flow.remote_address))
    ends = (there, here) if flow.point is Point.RESPONDER else (here, there)
    port = flow.local_port if flow.point is Point.RESPONDER else flow.remote_port
    flow.request = Request(*ends, flow.protocol, port, can_encrypt=suite is not None)
    if suite is not None:
        flow.suite = suite.cipher
        if isinstance(flow, UdpFlow):
            flow.sealed = Datagrams(suite, I2R, R2I, initiator=False)
        else:
            initiator = flow.point is Point.INITIATOR
            isns = (flow.isn, flow.peer_isn) if initiator else (flow.peer_isn, flow.isn)
            flow.records = Records(suite, I2R, R2I, initiator=initiator, isn_out=isns[0], isn_in=isns[1])
    return flow


def enter(journal: Journal, flow: Flow) -> Flow:
    """As KernelPorts and Core do."""
    journal.add(flow)
    state = journal.state(flow)
    assert state is not None
    if flow.records is not None:
        flow.records.attach(state)
    if isinstance(flow, UdpFlow) and flow.sealed is not None:
        flow.sealed.attach(state)
    return flow


def facts(flow: Flow) -> dict[str, object]:
    """Everything that a restart must not change."""
    names = (
        "key v6 point protocol state isn peer_isn suite mss event_id local_port remote_port start_us owner auth"
        " auth_result revision peer request adopted"
    )
    out: dict[str, object] = {name: getattr(flow, name) for name in names.split()}
    out["local"] = flow.local and (flow.local.id, flow.local.identity)
    out["peer_local"] = flow.peer_local and (flow.peer_local.id, flow.peer_local.identity)
    return out


def restored(path: Path, slots: int = SLOTS) -> list[Flow]:
    with closing(Journal(path, slots)) as journal:
        return list(journal.restore())


def raw(journal: Journal) -> bytes:
    return journal.path.read_bytes()


@pytest.mark.parametrize("key", [KEY4, KEY6], ids=["v4", "v6"])
@pytest.mark.parametrize("point", [Point.INITIATOR, Point.RESPONDER])
@pytest.mark.parametrize("suite", [None, AES_256_GCM], ids=["plain", "encrypted"])
def test_a_flow_is_the_same_after_a_restart(
    folder: Path, key: bytes, point: Point, suite: Suite | None
) -> None:
    with closing(Journal(folder / "flows", SLOTS)) as journal:
        flow = enter(journal, make(key, suite, point=point))
        before = facts(flow)
    (after,) = restored(folder / "flows")
    assert facts(after) == before
    assert after.recorded, "its VERDICT was written by the worker before"
    assert (after.records is not None) == (suite is not None)


def test_loopback_adopted_and_named_flows_too(folder: Path) -> None:
    local, adopted, named = make(), make(KEY6), make(KEY4[:-1] + b"\0")
    local.peer, local.peer_local = None, LocalWorkload(8, "", KEYS, b"", THEIRS)
    adopted.adopted, adopted.request, adopted.peer, adopted.auth = True, None, None, Auth.NONE
    adopted.local, adopted.auth_result = None, AuthResult.NONE
    named.point, named.auth, named.peer, named.auth_result = Point.INITIATOR, Auth.NONE, None, AuthResult.NONE
    here = Party(MINE.labels, MINE.spiffe_id, address(named.local_address))
    there = Party(None, None, address(named.remote_address), frozenset({"db.example", "pg.example"}))
    named.request = Request(here, there, 6, named.remote_port)
    with closing(Journal(folder / "flows", SLOTS)) as journal:
        before = [facts(enter(journal, flow)) for flow in (local, adopted, named)]
    assert sorted(map(str, map(facts, restored(folder / "flows")))) == sorted(map(str, before))


@SUITES
def test_a_datagram_flow_goes_on(folder: Path, suite: Suite) -> None:
    sender = Datagrams(suite, I2R, R2I, initiator=True)
    seen = [sender.seal(b"one"), sender.seal(b"two")]
    with closing(Journal(folder / "flows", SLOTS)) as journal:
        flow = UdpFlow(KEY4, False, Point.RESPONDER, State.AUTHORISED, 5)
        flow.socket, flow.group = 0xFEED_0000_0000_0001, True
        enter(journal, complete(flow, suite))
        before = facts(flow)
        assert flow.sealed is not None
        assert flow.sealed.open(seen[0]) == b"one"
        answered = flow.sealed.seal(b"answer")
    (after,) = restored(folder / "flows")
    assert isinstance(after, UdpFlow)
    assert facts(after) == before
    assert (after.socket, after.group) == (flow.socket, True)
    assert after.sealed is not None
    assert after.sealed.open(seen[0]) is DropReason.RECORD_REPLAYED
    assert after.sealed.open(seen[1]) == b"two"
    assert after.sealed.sent > 1, "the counter has leapt"
    assert sender.open(after.sealed.seal(b"answer")) == b"answer"
    assert after.sealed.seal(b"answer") != answered


@SUITES
def test_records_go_on_and_no_counter_comes_again(folder: Path, suite: Suite) -> None:
    """Killed three times in a row: what was accepted is a replay, what is sent has counters never used."""
    path = folder / "flows"
    other = Records(suite, I2R, R2I, initiator=True, isn_out=0xDEAD_BEEF, isn_in=77)
    journal = Journal(path, SLOTS)
    flow = enter(journal, make(suite=suite))
    used: set[int] = set()
    for life in range(3):
        assert flow.records is not None
        up = segments.segment(0xDEAD_BEEF + 1 + 100 * life, bytes(100), ACK)
        sealed = bytes(other.seal(up.data, 20, up.data_off, False).packet)
        assert flow.records.open(sealed, 20, up.data_off + 28, False, 0).packet is not None
        for part in range(2):
            down = segments.segment(78 + 20 * life + 10 * part, b"x" * 10, ACK)
            packet = bytes(flow.records.seal(down.data, 20, down.data_off, False).packet)
            counter = int.from_bytes(packet[down.data_off + 4 : down.data_off + 8], "big")
            assert counter not in used
            used.add(counter)
            assert other.open(packet, 20, down.data_off + 28, False, 0).packet is not None
        journal.close()
        journal = Journal(path, SLOTS)
        (flow,) = journal.restore()
        assert flow.records is not None
        assert flow.records.open(sealed, 20, 80, False, 0).reason is DropReason.RECORD_REPLAYED
        assert flow.records.sent >= max(used) + LEAP
    journal.close()


def test_an_initiator_that_was_proving_keeps_proving(folder: Path) -> None:
    flow, done = make(point=Point.INITIATOR), make(KEY6, point=Point.INITIATOR)
    for each in (flow, done):
        each.state, each.proof = State.PROVING, bytes(range(28))
    with closing(Journal(folder / "flows", SLOTS)) as journal:
        enter(journal, flow)
        enter(journal, done)
        done.state = State.AUTHORISED
        journal.add(done)
        assert bytes(range(28)) in raw(journal)
    after = {found.key: found for found in restored(folder / "flows")}
    assert (after[KEY4].state, after[KEY4].proof) == (State.PROVING, bytes(range(28)))
    assert (after[KEY6].state, after[KEY6].proof) == (State.AUTHORISED, b"")


def test_keys_do_not_outlive_their_flow(folder: Path) -> None:
    with closing(Journal(folder / "flows", SLOTS)) as journal:
        empty = raw(journal)
        flow = enter(journal, make(suite=AES_256_GCM))
        assert flow.records is not None
        assert raw(journal) != empty
        journal.remove(flow)
        assert raw(journal) == empty
        journal.remove(flow)  # once more does nothing
        assert len({enter(journal, make()).journal_slot for _ in range(SLOTS)}) == SLOTS


def test_a_full_journal_is_counted_and_its_flow_goes_without(folder: Path) -> None:
    with closing(Journal(folder / "flows", 2)) as journal:
        for _ in range(2):
            enter(journal, make())
        late = make(suite=AES_256_GCM)
        journal.add(late)
        assert journal.state(late) is None
        assert (late.journal_slot, journal.skipped) == (-1, 1)
        journal.remove(late)
    assert len(restored(folder / "flows", 2)) == 2


# -- a worker that dies at any moment ----------------------------------------------------------------------------------


def test_a_slot_torn_while_it_was_made_is_free_and_its_keys_are_gone(folder: Path) -> None:
    path = folder / "flows"
    with closing(Journal(path, SLOTS)) as journal:
        empty = raw(journal)
        enter(journal, make(suite=AES_256_GCM))
    data = bytearray(path.read_bytes())
    used = next(at for at in range(HEADER, len(data), SIZE) if data[at])
    data[used] = 0
    path.write_bytes(data)
    with closing(Journal(path, SLOTS)) as journal:
        assert raw(journal)[used + STATE_AT : used + SIZE] == bytes(SIZE - STATE_AT)
        assert list(journal.restore()) == []
        assert len(raw(journal)) == len(empty)


def test_an_encrypted_flow_without_its_keys_is_over_and_never_plain(folder: Path) -> None:
    path = folder / "flows"
    with closing(Journal(path, SLOTS)) as journal:
        journal.add(make(suite=AES_256_GCM))  # died before its state was written
        enter(journal, make(KEY6))
    with closing(Journal(path, SLOTS)) as journal:
        assert [flow.key for flow in journal.restore()] == [KEY6]
        assert journal.forgotten == 1


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_slots_hold_a_worker_starts_with_sound_flows(folder: Path, data: st.DataObject) -> None:
    """Invariant: no bytes in slots, and no torn identities, make restoring fail; what comes back is consistent."""
    path = folder / "flows"
    for file in (path, folder / "flows.identities"):
        file.unlink(missing_ok=True)
    with closing(Journal(path, 4)) as journal:
        for flow in (make(), make(KEY6, AES_256_GCM), make(KEY4[:-1] + b"\0", point=Point.INITIATOR)):
            enter(journal, flow)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 30))):
        at = data.draw(st.integers(HEADER, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    names = (folder / "flows.identities").read_bytes()
    (folder / "flows.identities").write_bytes(names[: data.draw(st.integers(0, len(names)))])
    with closing(Journal(path, 4)) as journal:
        flows = list(journal.restore())
        for flow in flows:
            assert len(flow.key) in (12, 36)
            assert flow.v6 == (len(flow.key) == 36)
            encrypted = flow.records or (isinstance(flow, UdpFlow) and flow.sealed)
            assert bool(flow.suite) == bool(encrypted) or flow.adopted
        assert len(flows) + len(journal._free) == 4
        for _ in journal._free.copy():
            enter(journal, make())


# -- several workers ---------------------------------------------------------------------------------------------------


def odd(key: bytes) -> bool:
    return key[-1] % 2 == 1


def even(key: bytes) -> bool:
    return key[-1] % 2 == 0


def several(count: int, suite: Suite | None = None) -> list[Flow]:
    return [make(KEY4[:-1] + bytes((n,)), suite) for n in range(count)]


def test_flows_go_to_the_workers_whose_they_are(folder: Path) -> None:
    """From one worker to two, while the first goes on, and back again."""
    paths = [folder / "flows-0", folder / "flows-1"]
    with closing(Journal(paths[0], SLOTS)) as journal:
        before = {flow.key: facts(enter(journal, flow)) for flow in several(9, AES_256_GCM)}
    with closing(Journal(paths[0], SLOTS)) as first:
        kept = list(first.restore(even, paths))
        assert {flow.key for flow in kept} == {key for key in before if even(key)}
        with closing(Journal(paths[1], SLOTS)) as second:
            moved = list(second.restore(odd, paths))
            assert {flow.key: facts(flow) for flow in moved + kept} == before
            for flow in moved + kept:
                assert flow.records is not None
                segment = segments.segment(78, b"x", ACK)
                flow.records.seal(segment.data, 20, segment.data_off, False)
        with closing(Journal(paths[1], SLOTS)) as second:
            assert {flow.key for flow in second.restore(odd, paths)} == {flow.key for flow in moved}
    with closing(Journal(paths[0], SLOTS)) as first:
        alone = {flow.key: facts(flow) for flow in first.restore(others=paths)}
        assert alone == before
    assert restored(paths[1]) == []


def test_names_of_a_peer_move_along(folder: Path) -> None:
    flow = make(point=Point.INITIATOR)
    flow.peer, flow.auth, flow.auth_result = None, Auth.NONE, AuthResult.NONE
    there = Party(None, None, address(flow.remote_address), frozenset({"api.example"}))
    flow.request = Request(Party(MINE.labels, MINE.spiffe_id, address(flow.local_address)), there, 6, 443)
    with closing(Journal(folder / "a", SLOTS)) as journal:
        enter(journal, flow)
    with closing(Journal(folder / "b", SLOTS)) as journal:
        (moved,) = journal.restore(others=[folder / "a"])
        assert moved.request is not None
        assert moved.request.destination.names == {"api.example"}
    (again,) = restored(folder / "b")
    assert again.request is not None
    assert again.request.destination.names == {"api.example"}


class KilledError(Exception):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("stores", range(4))
def test_a_move_interrupted_never_leaves_two(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stores: int
) -> None:
    """Two workers that go on with the same counters would use a nonce twice: better no flow than that."""
    paths = [folder / "flows-0", folder / "flows-1"]
    with closing(Journal(paths[0], SLOTS)) as journal:
        enter(journal, make(suite=AES_256_GCM))
    steps = iter(range(100))
    original = journal_module._clear

    def dying(slot: memoryview) -> None:
        if next(steps) == stores:
            raise KilledError
        slot[0] = 0
        if next(steps) == stores:
            raise KilledError
        original(slot)

    monkeypatch.setattr(journal_module, "_clear", dying)
    second = Journal(paths[1], SLOTS)
    try:
        list(second.restore(others=paths))
    except KilledError:
        pass
    finally:
        second.close()
    monkeypatch.setattr(journal_module, "_clear", original)
    found = [flow for path in paths for flow in restored(path)]
    assert len(found) <= 1
    assert len(found) == 1 or stores == 1


@pytest.mark.parametrize("content", [b"", b"x", b"sectool flows 2\n", bytes(200), b"sectool flows 9\n" * 9])
def test_another_journal_that_is_none_is_passed_over(folder: Path, content: bytes) -> None:
    (folder / "odd").write_bytes(content)
    with closing(Journal(folder / "flows", SLOTS)) as journal:
        assert list(journal.restore(others=[folder / "odd", folder / "missing"])) == []


# -- formats -----------------------------------------------------------------------------------------------------------


def of_format_1(path: Path, flows: list[Flow]) -> None:
    """As version 0.1 wrote it."""
    slot = struct.Struct("<BBBB36sIIIIxxxxQ16sqqqqq")
    size, slots = 160, 65_536
    out = bytearray(64 + slots * size)
    out[:16] = b"sectool flows 1\n"
    names = JournalNames(path.with_name(path.name + ".identities"), set)
    for number, flow in enumerate(flows):
        assert flow.local is not None
        slot.pack_into(
            out,
            64 + 3 * number * size,
            *(1, flow.point, flow.auth, len(flow.key), flow.key, flow.isn, flow.revision),
            *(flow.owner.pid, flow.owner.uid, flow.owner.cgroup, flow.event_id, flow.start_us),
            *(flow.local.id, names.identity(flow.local.identity), 0, names.identity(flow.peer)),
        )
    names.close()
    path.write_bytes(out)


def test_plain_flows_of_the_first_format_survive(folder: Path) -> None:
    path = folder / "flows"
    flows = [make(), make(KEY6, point=Point.INITIATOR)]
    of_format_1(path, flows)
    for flow in flows:
        flow.peer_isn = flow.mss = 0  # was not kept
    for _ in range(2):
        with closing(Journal(path)) as journal:
            assert not journal.foreign
            found = {flow.key: facts(flow) for flow in journal.restore()}
        assert found == {flow.key: facts(flow) for flow in flows}


def test_a_format_of_the_future_is_told_and_begun_anew(folder: Path) -> None:
    path = folder / "flows"
    path.write_bytes(b"sectool flows 3\n" + os.urandom(5000))
    with closing(Journal(path, SLOTS)) as journal:
        assert journal.foreign
        assert list(journal.restore()) == []
        enter(journal, make())
    with closing(Journal(path, SLOTS)) as journal:
        assert not journal.foreign
        assert len(list(journal.restore())) == 1


@pytest.mark.parametrize("cut", [1, 20, 64, 100])
def test_a_file_cut_short_is_begun_anew(folder: Path, cut: int) -> None:
    path = folder / "flows"
    with closing(Journal(path, SLOTS)) as journal:
        enter(journal, make())
    os.truncate(path, cut)
    assert restored(path) == []


# -- whose file, and where ---------------------------------------------------------------------------------------------


def test_the_file_is_roots_alone_and_one_workers(folder: Path) -> None:
    path = folder / "flows"
    path.touch(mode=0o644)
    with closing(Journal(path, SLOTS)):
        assert path.stat().st_mode & 0o777 == 0o600
        assert (folder / "flows.identities").stat().st_mode & 0o777 == 0o600
        with pytest.raises(SectoolError, match="in use"):
            Journal(path, SLOTS)
    Journal(path, SLOTS).close()


def test_on_a_disk_it_is_refused(tmp_path: Path) -> None:
    if in_memory(tmp_path):  # then the project's own folder serves as a place on a disk
        tmp_path = Path(__file__).parent
    path = tmp_path / "flows-on-disk"
    try:
        with pytest.raises(SectoolError, match="disk") as caught:
            Journal(path, SLOTS)
    finally:
        path.unlink(missing_ok=True)
    assert caught.value.hint


def test_a_link_is_not_followed(folder: Path) -> None:
    target = folder / "precious"
    target.write_bytes(b"content")
    (folder / "flows").symlink_to(target)
    with pytest.raises(SectoolError):
        Journal(folder / "flows", SLOTS)
    assert target.read_bytes() == b"content"


def test_its_pages_are_kept_from_swap(folder: Path) -> None:
    with closing(Journal(folder / "flows", SLOTS)) as journal:
        assert journal.locked
        maps = Path("/proc/self/smaps").read_text().split(str(folder / "flows"))[1]
        locked = next(line for line in maps.splitlines() if line.startswith("Locked:"))
        assert int(locked.split()[1]) * 1024 >= SLOTS * SIZE


# -- identities --------------------------------------------------------------------------------------------------------


def test_identities_that_nobody_needs_are_left_out(folder: Path) -> None:
    needed = {5, number_of(frozenset({"kept.example"}))}
    names = JournalNames(folder / "names", lambda: needed, limit=40)
    names.names(frozenset({"kept.example"}))
    sizes = []
    for number in range(1, 500):
        assert names.identity(identity(number, app="web")) == number
        names.identity(identity(5))
        sizes.append((folder / "names").stat().st_size)
    names.close()
    memory = read(folder / "names")
    assert memory.identities[5] == identity(5)
    assert memory.identities[499] == identity(499, app="web")
    assert memory.names == {number_of(frozenset({"kept.example"})): frozenset({"kept.example"})}
    assert len(memory.identities) <= 41
    assert max(sizes) < 50 * 400


def test_a_restart_leaves_out_whom_no_flow_refers_to(folder: Path) -> None:
    path = folder / "flows"
    with closing(Journal(path, SLOTS)) as journal:
        gone = make(KEY6)
        gone.peer = identity(33, app="gone")
        enter(journal, gone)
        enter(journal, make())
        journal.remove(gone)
    assert 33 in read(folder / "flows.identities").identities
    assert len(restored(path)) == 1
    assert read(folder / "flows.identities").identities.keys() == {MINE.id, THEIRS.id}


def test_what_is_noted_lands_in_its_field() -> None:
    slot = bytearray(SIZE)
    flow = make()
    flow.state, flow.proof = State.PROVING, bytes(range(28))
    journalslot.write(flow, 0, memoryview(slot))
    flow.state = State.AUTHORISED
    journalslot.note_state(flow, memoryview(slot))
    fields = journalslot.Fields(*journalslot._SLOT.unpack_from(slot))
    assert fields.state == State.AUTHORISED
    assert fields.proof == bytes(28)
