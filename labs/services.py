"""The real programs of the lab: nginx, PostgreSQL, iperf3, dnsmasq. Each in its own cgroup and as its own user.

Nothing of the machine's own nginx or PostgreSQL is touched: configuration, data and logs live in the lab's
folder.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from labs.netns import path, run
from labs.place import Place, in_memory
from labs.topology import Host
from sectool.errors import SectoolError

HELLO = "hello from web"
BIG_FILE = 256 << 20  # bytes; sparse, for a download that is cut on its way
START_DEADLINE = 15.0
_FIRST_DATA = "sectool-lab-postgres"

NGINX = """\
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 256; }}
http {{
  access_log off;
  sendfile on;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen {port}; listen [::]:{port};
    root {folder}/www;
    location = / {{ return 200 "{hello}\\n"; }}
    location = /big {{ limit_rate 2m; sendfile_max_chunk 64k; }}
  }}
}}
"""

POSTGRES = """\
listen_addresses = '*'
unix_socket_directories = '{folder}'
dynamic_shared_memory_type = mmap
max_connections = 30
shared_buffers = 16MB
fsync = off
logging_collector = off
"""

SCHEMA = """\
create table orders (id int primary key, article text not null, amount int not null);
insert into orders select n, 'article ' || n % 7, n % 5 + 1 from generate_series(1, 1000) n;
create role shop login; grant select on orders to shop;
"""


@dataclass(frozen=True, slots=True)
class Service:
    """A started service. `ready` says whether it answers; `log` is what to show when it never does."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    ready: Callable[[], bool]

    def wait(self) -> None:
        """Return once the service answers; SectoolError with the end of its log when it does not in time."""
        end = time.monotonic() + START_DEADLINE
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > end:
                words = self.log.read_text(errors="replace").strip()[-800:]
                raise SectoolError(f"{self.name} did not start: {words or 'it said nothing'}")
            time.sleep(0.02)


def listening(netns: Path, port: int) -> bool:
    """Is anything listening on this TCP port in the namespace?"""
    return bool(run("ss", "-Hltn", f"sport = :{port}", netns=netns).strip())


def start(place: Place, command: list[str], log: Path, ready: Callable[[], bool]) -> Service:
    """Start `command` at `place`, its output going to `log`."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            place.argv(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=place.environment(),
            cwd="/",
            start_new_session=True,
        )
    return Service(place.group, process, log, ready)


def nginx(lab: str, host: Host, folder: Path, port: int = 80, hello: str = HELLO) -> Service:
    """nginx on all addresses of a host, wholly as www-data; `/` says hello, `/big` takes two minutes."""
    pages = folder / "www"
    pages.mkdir(parents=True)
    with (pages / "big").open("wb") as big:
        big.truncate(BIG_FILE)
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, port=port, hello=hello))
    _give(folder, "www-data")
    place = Place(lab, host.name, "nginx", user="www-data")
    command = ["nginx", "-e", f"{folder}/error.log", "-p", str(folder), "-c", str(config)]
    return start(place, command, folder / "out.log", lambda: listening(path(lab, host.name), port))


def dnsmasq(
    lab: str, host: Host, folder: Path, names: Mapping[str, str], addresses: Sequence[str] = ()
) -> Service:
    """dnsmasq that knows these names (and none else), on all addresses of a host or on some, over UDP and TCP."""
    folder.mkdir(parents=True)
    where = [f"--listen-address={address}" for address in addresses]
    command = [
        *("dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--pid-file=", "--bind-interfaces"),
        *("--conf-file=/dev/null", "--log-facility=-", "--user=root", "--local-ttl=30", "--local=/#/"),
        *where,
        *(f"--host-record={name},{address}" for name, address in names.items()),
    ]
    place = Place(lab, host.name, "dnsmasq")
    return start(place, command, folder / "out.log", lambda: listening(path(lab, host.name), 53))


def _postgres_program(name: str) -> str:
    """Debian keeps PostgreSQL's server programs outside PATH, a folder per version; the newest wins."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda p: float(p.parts[-3]))
    program = str(found[-1]) if found else shutil.which(name)
    if program is None:
        raise SectoolError(f"PostgreSQL's program `{name}` is not installed", "run: sudo ./dev setup")
    return program


def postgres(lab: str, host: Host, folder: Path, networks: Sequence[str]) -> Service:
    """PostgreSQL with data of its own. Whoever gets through the network may log in: policy alone decides."""
    folder.mkdir(parents=True)
    _give(folder, "postgres")
    data = folder / "data"
    place = Place(lab, host.name, "postgres", user="postgres", own_ipc=True)
    _once("copying PostgreSQL's first data", ["cp", "-a", str(_first_data()), str(data)])
    (data / "postgresql.auto.conf").write_text(POSTGRES.format(folder=folder))
    (data / "pg_hba.conf").write_text(
        "local all all trust\n" + "".join(f"host all all {network} trust\n" for network in networks)
    )
    ready = [_postgres_program("pg_isready"), "-q", "-h", str(folder)]
    return start(
        place,
        [_postgres_program("postgres"), "-D", str(data)],
        folder / "out.log",
        lambda: subprocess.run(ready, capture_output=True, check=False).returncode == 0,
    )


_making = threading.Lock()


@cache
def _made_first_data() -> Path:
    for left in in_memory().glob(f"{_FIRST_DATA}-*"):  # of processes that were killed
        if not Path("/proc", left.name.split("-")[-2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    base = Path(tempfile.mkdtemp(prefix=f"{_FIRST_DATA}-{os.getpid()}-", dir=in_memory()))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    shutil.chown(base, "postgres", "postgres")
    data = base / "data"
    user = ["unshare", "--ipc", "setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
    options = ["-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-locale", "--wal-segsize=1"]
    initdb = [_postgres_program("initdb"), "-D", str(data), *options, "--no-sync", "--no-instructions"]
    _once("initdb", [*user, *initdb])
    alone = [_postgres_program("postgres"), "--single", "-D", str(data), "-c", "fsync=off", "postgres"]
    _once("loading the table of orders", [*user, *alone], SCHEMA)
    return data


def _first_data() -> Path:
    """PostgreSQL's data with the table of orders, made once a process; it goes when the process ends."""
    with _making:
        return _made_first_data()


def _once(what: str, command: list[str], text: str | None = None) -> None:
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, env=environment, cwd="/", check=False
    )
    if done.returncode:
        raise SectoolError(f"{what} failed: {(done.stderr or done.stdout).strip()[-800:]}")


def _give(folder: Path, user: str) -> None:
    shutil.chown(folder, user, user)
    for parent, _, files in os.walk(folder):
        for name in (parent, *(str(Path(parent) / file) for file in files)):
            shutil.chown(name, user, user)
