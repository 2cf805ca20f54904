"""Which host names an address has, as this host was told: what `fqdn:` rules go by.

    query seen to leave ─► remembered by flow, id and question
    answer to it        ─► every name of its alias chain has the addresses, for as long as it says

Only answers to questions of this host count, only from the resolvers it is told to trust, and only once. A name lasts
its time to live, clamped to MIN_TTL_S and MAX_TTL_S, and GRACE_S more, so that who connects at the last moment is not
denied; connections that were judged keep the names they were judged by. Names in a file of the host (/etc/hosts) count
too, if a rule speaks of them.

Space is bounded, in three purses: names that rules spell out, names below a wildcard, all others. So whoever controls
some zone and makes this host ask for its names pushes out no name that a rule spells out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from enum import IntEnum
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from nfq.dns import DnsError, Question, bindings, parse
from nfq.namefile import LIMIT_NAME, Entry, NameFile
from sectool.clock import DAY, SECOND
from sectool.policy import Engine
from sectool.policy.selector import Fqdn

PORT: Final = (53).to_bytes(2, "big")
MIN_TTL_S: Final = 5
MAX_TTL_S: Final = DAY // SECOND
GRACE_S: Final = 30
ANSWER_US: Final = 30 * SECOND  # how long an answer is waited for

_ASKED_LIMIT: Final = 4096
_NAMES_LIMIT: Final = 64  # of one address, in one purse
_ADDRESSES_LIMIT: Final = 256  # of one name
_MAPPED: Final = bytes(10) + b"\xff\xff"
_NO_NAMES: Final[frozenset[str]] = frozenset()


class Purse(IntEnum):
    """Whose place a name takes."""

    EXACT = 0
    BELOW = 1
    OTHER = 2


SLOTS: Final = (4096, 2048, 2048)
TOTAL: Final = sum(SLOTS)


class Shelf:
    """Entries by slot number, found by address. One more view of the same slots is another worker's file."""

    def __init__(self, slots: int) -> None:
        self.slots: list[Entry | None] = [None] * slots
        self.by_address: dict[bytes, dict[str, int]] = {}

    def put(self, slot: int, entry: Entry | None) -> None:
        """Put an entry into a slot, or clear it."""
        before = self.slots[slot]
        if before is not None:
            names = self.by_address.get(before.address, {})
            if names.get(before.name) == slot:
                del names[before.name]
                if not names:
                    del self.by_address[before.address]
        self.slots[slot] = entry
        if entry is not None:
            self.by_address.setdefault(entry.address, {})[entry.name] = slot

    def find(self, address: bytes, now_us: int, out: set[str]) -> None:
        """Add the names of an address that have not expired."""
        for name, slot in self.by_address.get(address, {}).items():
            entry = self.slots[slot]
            if entry is not None and entry.expires_us > now_us:
                out.add(name)

    def __iter__(self) -> Iterator[Entry]:
        return (entry for entry in self.slots if entry is not None)


class Follower:
    """Another worker's names, as far as its file tells."""

    def __init__(self, file: NameFile) -> None:
        self.file = file
        self.shelf = Shelf(file.slots)
        self._seen = -1

    def refresh(self) -> None:
        """Read what has changed."""
        if self.file.changes == self._seen:
            return
        self._seen, slots = self.file.changed(self._seen)
        for slot in slots:
            self.shelf.put(slot, self.file.read(slot))


class _Room:
    """The slots of one purse: which are free, and which was refreshed longest ago."""

    def __init__(self, slots: range) -> None:
        self.free = list(reversed(slots))
        self.order: OrderedDict[int, None] = OrderedDict()


class NameTable:
    """Names by address. One per worker; `others` are the files of the other workers."""

    def __init__(self, file: NameFile | None = None) -> None:
        """`file` (of TOTAL slots) outlives this worker."""
        self._file = file
        self._trusted: list[tuple[bool, int, int]] | None = None
        self._shelf = Shelf(TOTAL)
        starts = (0, SLOTS[0], SLOTS[0] + SLOTS[1], TOTAL)
        self._rooms = [_Room(range(starts[p], starts[p + 1])) for p in Purse]
        self._exact: frozenset[str] = _NO_NAMES
        self._below: frozenset[str] = _NO_NAMES
        self._by_name: dict[str, OrderedDict[int, None]] = {}  # refreshed longest ago first
        self._asked: OrderedDict[tuple[bytes, int, Question], int] = OrderedDict()
        self._static: dict[bytes, frozenset[str]] = {}
        self.others: list[Follower] = []
        self.watched = 0  # how often policy has begun to speak of other names
        self.learnt = 0  # answers taken
        self.refused = 0  # answers that nobody asked for, or from a resolver that is not trusted
        if file is not None:
            self._restore(file)

    def _restore(self, file: NameFile) -> None:
        """Take back what the worker before knew; when it was told is forgotten, so what expires first goes first."""
        found = [(entry, slot) for slot in range(min(TOTAL, file.slots)) if (entry := file.read(slot))]
        for entry, slot in sorted(found, key=lambda one: one[0].expires_us):
            if entry.name not in self._shelf.by_address.get(entry.address, {}):
                self._shelf.put(slot, entry)
                self._by_name.setdefault(entry.name, OrderedDict())[slot] = None
                self._room(slot).order[slot] = None
        for room in self._rooms:
            room.free = [slot for slot in room.free if slot not in room.order]

    def _expiry(self, slot: int) -> int:
        entry = self._shelf.slots[slot]
        return 0 if entry is None else entry.expires_us

    # -- asking --------------------------------------------------------------------------------------------------

    def names_of(self, address: bytes, now_us: int) -> frozenset[str]:
        """The names that an address (4 or 16 bytes) has now."""
        out: set[str] = set()
        self._shelf.find(address, now_us, out)
        for other in self.others:
            other.refresh()
            other.shelf.find(address, now_us, out)
        out |= self._static.get(address, _NO_NAMES)
        return frozenset(out) if out else _NO_NAMES

    def remembered(self, address: bytes) -> frozenset[str]:
        """The names that an address has or had lately: for connections that were judged by a worker before."""
        return self.names_of(address, 0)

    def entries(self) -> Iterator[Entry]:
        """All that this worker was told itself, expired or not."""
        return iter(self._shelf)

    # -- learning ------------------------------------------------------------------------------------------------

    def datagram(self, payload: bytes, outbound: bool, flow_key: bytes, now_us: int) -> None:
        """Look at a UDP payload from or to port 53 of the remote side of a flow (`nfq.packet.Segment.key`).

        Anything that is not DNS, or no answer to a question of ours, is passed over. Never raises.
        """
        if flow_key[-2:] != PORT:
            return
        try:
            message = parse(payload)
        except DnsError:
            return
        name = (flow_key, message.id, message.question)
        if outbound:
            if not message.response:
                self._asked[name] = now_us
                self._asked.move_to_end(name)
                if len(self._asked) > _ASKED_LIMIT:
                    self._asked.popitem(last=False)
            return
        if not message.response:
            return
        size = (len(flow_key) - 4) // 2
        resolver = flow_key[size : 2 * size]
        asked = self._asked.pop(name, None)
        if asked is None or now_us - asked > ANSWER_US or not self._trusts(resolver):
            self.refused += 1
            return
        self.learnt += 1
        for binding in bindings(message):
            ttl = min(max(binding.ttl, MIN_TTL_S), MAX_TTL_S) + GRACE_S
            self._put(Entry(binding.name, binding.address, now_us + ttl * SECOND, resolver))

    def trust(self, resolvers: Iterable[IPv4Network | IPv6Network] | None) -> None:
        """Whose answers count; None: everybody's."""
        self._trusted = (
            None
            if resolvers is None
            else [(n.version == 6, int(n.netmask), int(n.network_address)) for n in resolvers]
        )

    def _trusts(self, resolver: bytes) -> bool:
        if self._trusted is None:
            return True
        value, v6 = int.from_bytes(resolver, "big"), len(resolver) == 16
        return any(six == v6 and value & mask == net for six, mask, net in self._trusted)

    def _put(self, entry: Entry) -> None:
        if len(entry.name) > LIMIT_NAME:
            return  # escapes made it longer than any name
        if entry.address.startswith(_MAPPED) and len(entry.address) == 16:
            entry = entry._replace(address=entry.address[12:])
        slot = self._shelf.by_address.get(entry.address, {}).get(entry.name)
        if slot is None:
            slot = self._take(entry)
        else:
            before = self._shelf.slots[slot]
            if before is not None and before.expires_us > entry.expires_us:
                entry = before  # somebody on this host still goes by the answer before
        self._set(slot, entry)

    def _take(self, entry: Entry) -> int:
        """A slot for a new entry; if need be that of one refreshed longest ago."""
        room = self._rooms[self.purse(entry.name)]
        addresses = [slot for slot in self._by_name.get(entry.name, ()) if slot in room.order]
        if len(addresses) >= _ADDRESSES_LIMIT:
            return addresses[0]
        names = self._shelf.by_address.get(entry.address, {}).values()
        mine = [slot for slot in names if slot in room.order]
        if len(mine) >= _NAMES_LIMIT:
            return min(mine, key=self._expiry)
        if room.free:
            return room.free.pop()
        return next(iter(room.order))

    def _room(self, slot: int) -> _Room:
        return self._rooms[(slot >= SLOTS[0]) + (slot >= SLOTS[0] + SLOTS[1])]

    def _set(self, slot: int, entry: Entry | None) -> None:
        """Fill a slot, as the one refreshed last, or free it."""
        before, room = self._shelf.slots[slot], self._room(slot)
        if before is not None:
            addresses = self._by_name[before.name]
            del addresses[slot]
            if not addresses:
                del self._by_name[before.name]
            room.order.pop(slot, None)
        self._shelf.put(slot, entry)
        if entry is None:
            room.free.append(slot)
        else:
            self._by_name.setdefault(entry.name, OrderedDict())[slot] = None
            room.order[slot] = None
        if self._file is not None and entry != before:
            self._file.write(slot, entry)

    # -- what policy speaks of -----------------------------------------------------------------------------------

    def purse(self, name: str) -> Purse:
        """Whose place a name takes."""
        if name in self._exact:
            return Purse.EXACT
        if self._below:
            rest = name
            while rest:
                _, _, rest = rest.partition(".")
                if rest in self._below:
                    return Purse.BELOW
        return Purse.OTHER

    def watch(self, engine: Engine) -> None:
        """Another policy: entries move to the purse where they belong now."""
        fqdns = [
            side
            for compiled in engine.compiled
            for side in (compiled.sentence.source, compiled.sentence.destination)
            if isinstance(side, Fqdn)
        ]
        exact = frozenset(f.name for f in fqdns if not f.wildcard)
        below = frozenset(f.name for f in fqdns if f.wildcard)
        if (exact, below) == (self._exact, self._below):
            return
        self._exact, self._below = exact, below
        self.watched += 1
        for slot, entry in enumerate(self._shelf.slots):
            if entry is None:
                continue
            room = self._room(slot)
            if self._rooms[self.purse(entry.name)] is not room:
                self._set(slot, None)
                self._put(entry)

    def close(self) -> None:
        """Let go of the files; they stay."""
        for one in ([self._file] if self._file is not None else []) + [other.file for other in self.others]:
            one.close()

    def known_by_file(self, hosts: Iterable[tuple[bytes, str]]) -> None:
        """What a file of this host says (/etc/hosts): address and name, as far as rules speak of the name."""
        static: dict[bytes, set[str]] = {}
        for address, name in hosts:
            if self.purse(name) is not Purse.OTHER:
                static.setdefault(address, set()).add(name)
        self._static = {address: frozenset(names) for address, names in static.items()}
