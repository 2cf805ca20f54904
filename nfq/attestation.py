"""The facts of a socket's owner: what its executable holds, what its user and cgroup are called.

Reading and hashing a file and asking for an account's name take as long as they take, so the packet path has them done
in the background (`later`). Executables larger than HASH_LIMIT are not hashed: their `sha256` is '', which no rule that
asks for a hash matches.

The path of an executable is the process's own: whoever has a mount namespace (any user can make one) can put any file
at any path in it. So a path is believed when it leads to the same file here, or when the file lies on one of our mounts
(it may have been deleted or replaced since). Otherwise FOREIGN_ROOT stands before it, and no pattern of a path matches.
"""
# A Path costs as much as the system call.
# ruff: noqa: PTH115, PTH116, PTH123

from __future__ import annotations

import hashlib
import io
import os
import pwd
import stat
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Final, NamedTuple, TypeAlias

from nfq.background import Background, Steps
from nfq.cgroup import Cgroups
from sectool.identity.workload import Facts, systemd_unit

Executable: TypeAlias = tuple[int, int, int]  # device, inode, ctime in ns
AMBIGUOUS: Final[Executable] = (0, 0, 0)
Key: TypeAlias = tuple[int, int, int, int, int]  # cgroup id, uid, executable

FOREIGN_ROOT: Final = "foreign-root:"
HASH_LIMIT: Final = 1 << 30  # bytes
SYNC_LIMIT: Final = 64 << 20  # bytes
_READ: Final = 1 << 20
_STEP: Final = 4 << 20
_CACHE: Final = 4096

_Stamp: TypeAlias = tuple[int, int, int, int, int]
Done: TypeAlias = Callable[[Facts | None], None]


class Attributed(NamedTuple):
    """A socket's owner. `pid` is 0 where several processes of one executable may be it; uid is the socket's."""

    key: Key
    pid: int
    uid: int
    cgroup_id: int
    witness: int  # a process that runs the executable, 0 when ambiguous
    compute: Callable[[Attributed], Facts | None]

    @property
    def executable(self) -> Executable:
        """AMBIGUOUS when no single executable can be named."""
        return self.key[2:]

    @property
    def ambiguous(self) -> bool:
        """Whether no single executable can be named."""
        return self.executable == AMBIGUOUS

    def attest(self) -> Facts | None:
        """All facts; None when the witness or the cgroup has gone or changed since: ask again for the socket.

        Takes as long as hashing the executable takes, which is left out above SYNC_LIMIT. The packet path uses
        Attributor.facts_later.
        """
        return self.compute(self)

    def facts(self) -> dict[str, Any] | None:
        """The facts as plain values, for the agent."""
        found = self.attest()
        return None if found is None else found.attested()


class Attestor:
    """Facts, at once or later. Bounded caches; for one thread."""

    def __init__(self, cgroups: Cgroups, proc: str) -> None:
        self._cgroups, self._proc = cgroups, proc
        self.background: Background[str] = Background()
        self._known: OrderedDict[Hashable, str] = OrderedDict()  # hashes by stamp, names by ("user", uid)
        self._waiting: dict[Hashable, list[Callable[[str | None], None]]] = {}

    def close(self) -> None:
        """Give up what is under way."""
        self.background.close()
        self._waiting.clear()

    def now(self, what: Attributed) -> Facts | None:
        """See Attributed.attest."""
        path = self._cgroups.path(what.cgroup_id)
        if path is None:
            return None
        name = user_name(what.uid)
        if what.ambiguous:
            return _facts(what, path, "", "", name)
        try:
            found = self._open(what.witness, what.executable)
            if found is None:
                return None
            image, executable, stamp = found
            with image:
                digest = self._known.get(stamp)
                if digest is None and stamp[4] <= SYNC_LIMIT:
                    digest = _run(_digest(image, stamp))
                    self._keep(stamp, digest)
            return _facts(what, path, executable, digest or "", name)
        except OSError:
            return None

    def later(self, what: Attributed, done: Done) -> None:
        """As `now`, without the waiting: `done` is called at once if all is known, else by `background.completed`.

        None, too, when more is asked for than can be done; the packet that comes again asks again.
        """
        path = self._cgroups.path(what.cgroup_id)
        if path is None:
            done(None)
        elif what.ambiguous:
            self._with_name(what, path, "", "", done)
        else:
            self._with_digest(what, path, done)

    def _with_digest(self, what: Attributed, path: str, done: Done) -> None:
        try:
            found = self._open(what.witness, what.executable)
        except OSError:
            found = None
        if found is None:
            done(None)
            return
        image, executable, stamp = found
        if stamp[4] > HASH_LIMIT:
            image.close()
            self._with_name(what, path, executable, "", done)
            return

        def then(digest: str | None) -> None:
            if digest is None:
                done(None)
            else:
                self._with_name(what, path, executable, digest, done)

        if not self._obtain(stamp, stamp[4], lambda: _digest(image, stamp), then):
            image.close()

    def _with_name(self, what: Attributed, path: str, executable: str, digest: str, done: Done) -> None:
        def then(name: str | None) -> None:
            done(_facts(what, path, executable, digest, name or ""))

        self._obtain(("user", what.uid), 0, lambda: _name(what.uid), then)

    def _obtain(
        self, key: Hashable, size: int, make: Callable[[], Steps[str]], then: Callable[[str | None], None]
    ) -> bool:
        """Call `then` with what is known under a key, or once it is. True: work was begun, for all who wait for it."""
        known = self._known.get(key)
        if known is not None:
            then(known)
            return False
        waiting = self._waiting.get(key)
        if waiting is not None:
            waiting.append(then)
            return False
        self._waiting[key] = [then]

        def done(result: str | None) -> None:
            if result:  # an account without a name may get one
                self._keep(key, result)
            for each in self._waiting.pop(key, ()):
                each(result)

        begun = self.background.start(size, make(), done)
        if not begun:
            done(None)
        return begun

    def _keep(self, key: Hashable, value: str) -> None:
        self._known[key] = value
        if len(self._known) > _CACHE:
            self._known.popitem(last=False)

    def _open(self, pid: int, expected: Executable) -> tuple[io.FileIO, str, _Stamp] | None:
        """The running image, its path as the process sees it, its stamp; None if it is not the expected one."""
        link = f"{self._proc}/{pid}/exe"
        image = io.FileIO(link)
        st = os.fstat(image.fileno())
        if (st.st_dev, st.st_ino, st.st_ctime_ns) != expected or not stat.S_ISREG(st.st_mode):
            image.close()
            return None
        path = os.readlink(link)
        prefix = "" if _ours(path, image.fileno(), st) else FOREIGN_ROOT
        return image, prefix + _text(path), _stamp(st)


def _ours(path: str, image: int, st: os.stat_result) -> bool:
    """Whether a path that another process sees means this open file to us, too."""
    try:
        here = os.stat(path)
    except (OSError, ValueError):
        pass
    else:
        if (here.st_dev, here.st_ino) == (st.st_dev, st.st_ino):
            return True
    try:
        with open(f"/proc/thread-self/fdinfo/{image}", "rb") as info:
            mount = next((line.split()[1] for line in info if line.startswith(b"mnt_id:")), b"")
        with open("/proc/thread-self/mountinfo", "rb") as mounts:
            return any(line.split(b" ", 1)[0] == mount for line in mounts)
    except OSError:
        return False


def _stamp(st: os.stat_result) -> _Stamp:
    return st.st_dev, st.st_ino, st.st_mtime_ns, st.st_ctime_ns, st.st_size


def _digest(image: io.FileIO, stamp: _Stamp) -> Steps[str]:
    """SHA-256 of a file that must not change meanwhile (OSError); yields the bytes that are left."""
    with image:
        digest, left, step = hashlib.sha256(), stamp[4], _STEP
        while data := image.read(_READ):
            digest.update(data)
            left -= len(data)
            step -= len(data)
            if left < 0:
                break
            if step <= 0:
                step = _STEP
                yield left
        if left or _stamp(os.fstat(image.fileno())) != stamp:
            raise OSError("the executable changed under our eyes")
        return digest.hexdigest()


def _name(uid: int) -> Steps[str]:
    yield from ()
    return user_name(uid)


def _run(steps: Steps[str]) -> str:
    while True:
        try:
            next(steps)
        except StopIteration as e:
            return str(e.value)


def _facts(what: Attributed, path: str, executable: str, digest: str, name: str) -> Facts:
    return Facts(
        uid=what.uid,
        user=name,
        executable=executable,
        sha256=digest,
        cgroup=path,
        unit=systemd_unit(path),
        pid=what.pid or what.witness,
    )


def _text(path: str) -> str:
    """File names are bytes; what is not UTF-8 is shown as backslash escapes, so that it can be stored and sent."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def user_name(uid: int) -> str:
    """The account's name, '' if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError, OSError):
        return ""
