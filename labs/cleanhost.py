"""Install, enforce a first connection, uninstall: on a system made from nothing, compared before and after.

    python -m labs.cleanhost bookworm|trixie|noble [--from tree|sdist|wheel|deb] [--keep]

debootstrap makes the smallest Debian (or Ubuntu) there is, in a folder; install.sh runs in it by chroot (or apt-get,
with a package that was built in another such folder and looked at by lintian). Two network namespaces are two hosts of
a trust domain that both run the installed program. Then it is uninstalled, and every file, package, kernel rule and
cgroup is compared with what was there before. Needs root, the system's package mirror, and the keys its packages are
signed with: debian-archive-keyring or ubuntu-keyring, which Debian has from 13 on.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from labs import place

ROOT = Path(__file__).resolve().parent.parent
DEBIAN = ("http://deb.debian.org/debian", "main", "/usr/share/keyrings/debian-archive-keyring.gpg")
UBUNTU = (
    "http://archive.ubuntu.com/ubuntu",
    "main,universe",
    "/usr/share/keyrings/ubuntu-archive-keyring.gpg",
)
SUITES = {"bookworm": "Debian 12", "trixie": "Debian 13", "noble": "Ubuntu 24.04"}
MIRRORS = {"bookworm": DEBIAN, "trixie": DEBIAN, "noble": UBUNTU}
AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
SHOWN = 40  # differences told; their number is told in any case
CACHE = ROOT / ".dev" / "roots"
TREE = (
    "install.sh",
    "MANIFEST.in",
    "CHANGELOG.md",
    "requirements.lock",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "packaging",
    "sectool",
    "nfq",
)
TREE_REST = ("store", "tui", "labs", "docs")
APT = ("apt-get", "-y", "-q", "--no-install-recommends")
# What package management keeps for itself, whatever is installed and removed again (netbase leaves /etc/hosts).
PASSING = re.compile(
    r"^/(var/log|var/cache|var/lib/apt|var/lib/dpkg|var/lib/systemd|proc|sys|dev|tmp|run|root/\.cache|srv/tree)(/|$)"
    r"|^/etc/(hosts|ld\.so\.cache|\.pwd\.lock|(passwd|group|shadow|gshadow)-)$"
)
POLICY = """kind: Policy
name: first
owner: shop
rules:
  - allow app=web to call app=db on tcp/8000
"""
FETCH = "import urllib.request as u; print(u.urlopen('http://10.9.8.2:8000/', timeout=5).status)"


class FailedError(Exception):
    """A step did not do what it should."""


def run(*command: str, check: bool = True, inside: Path | None = None, netns: str = "") -> str:
    """A command, in a root and a network namespace if named; its output. FailedError with its words if it fails."""
    argv = [*command] if inside is None else ["chroot", str(inside), *command]
    if netns:
        argv = ["nsenter", f"--net=/run/netns/{netns}", *argv]
    inner = dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), "/srv/tree/authorities.crt")
    env = {
        **os.environ,
        **(inner if inside is not None else {}),
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
    }
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    if check and done.returncode:
        raise FailedError(
            f"{' '.join(command)}: exit {done.returncode}\n{(done.stdout + done.stderr).strip()[-3000:]}"
        )
    return done.stdout + done.stderr


def base(suite: str) -> Path:
    """An archive of the system as debootstrap makes it; kept for the next time."""
    archive = CACHE / f"{suite}.tar"
    if not archive.exists():
        mirror, components, keyring = MIRRORS[suite]
        if not Path(keyring).is_file():
            package = "ubuntu-keyring" if suite == "noble" else "debian-archive-keyring"
            raise FailedError(f"there is no {keyring} to check packages with: apt-get install {package}")
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            say(f"debootstrap {suite}")
            how = (
                "--variant=minbase",
                f"--components={components}",
                f"--keyring={keyring}",
                "--force-check-gpg",
            )
            # How Ubuntu is made; the releases that came after a debootstrap have no script of their own name in it.
            script = ("/usr/share/debootstrap/scripts/gutsy",) if suite == "noble" else ()
            run("debootstrap", *how, suite, f"{folder}/root", mirror, *script)
            run("tar", "-C", f"{folder}/root", "-cf", f"{folder}/new.tar", "--numeric-owner", ".")
            Path(f"{folder}/new.tar").replace(archive)
    return archive


def say(text: str) -> None:
    """Progress, on stderr."""
    sys.stderr.write(f">> {text}\n")


@contextmanager
def system(suite: str, keep: bool) -> Iterator[Path]:
    """A fresh system with its kernel file systems; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="sectool-cleanhost-", dir="/var/tmp"))
    root = folder / "root"
    with ExitStack() as stack:
        root.mkdir()
        run("tar", "-C", str(root), "-xf", str(base(suite)))
        if not keep:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for name in ("proc", "sys", "dev"):
            run("mount", "--rbind", f"/{name}", str(root / name))
            run("mount", "--make-rslave", str(root / name))
            stack.callback(run, "umount", "-R", "-l", str(root / name), check=False)
        for file, to in (("/etc/resolv.conf", "etc/resolv.conf"), (AUTHORITIES, "srv/tree/authorities.crt")):
            if Path(file).is_file():  # how this machine reaches mirrors
                (root / to).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, root / to)
        copy_tree(root / "srv" / "tree")
        run("apt-get", "update", "-q", inside=root)
        yield root


def copy_tree(to: Path) -> None:
    """What of this checkout a user gets."""
    to.mkdir(parents=True, exist_ok=True)
    for name in (*TREE, *TREE_REST):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, to / name)


def built(kind: str, to: Path) -> Path:
    """A source archive or a wheel, made of a copy of this checkout; its path below `to`."""
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sectool-build-") as folder:
        copy_tree(Path(folder) / "tree")
        run(sys.executable, "-m", "venv", f"{folder}/venv")
        run(f"{folder}/venv/bin/python", "-m", "pip", "install", "-q", "setuptools>=77")
        code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(to)!r}))"
        done = subprocess.run(
            [f"{folder}/venv/bin/python", "-c", code],
            cwd=f"{folder}/tree",
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise FailedError(f"building a {kind}: {done.stderr[-3000:]}")
    return to / done.stdout.splitlines()[-1]


def package(suite: str) -> Path:
    """A Debian package of this checkout, built in a system of its own and looked at by lintian."""
    out = Path(tempfile.mkdtemp(prefix="sectool-deb-", dir="/var/tmp"))
    say(f"building a package on {SUITES[suite]}")
    with system(suite, keep=False) as root:
        needed = re.search(r"NEEDED=\(([^)]*)\)", (ROOT / "packaging/build-deb.sh").read_text())
        run(*APT, "install", *(needed[1].split() if needed else ()), "lintian", inside=root)
        made = run("/srv/tree/packaging/build-deb.sh", "--out", "/srv/out", inside=root).splitlines()[-1]
        said = run(
            "lintian",
            "--fail-on",
            "error,warning",
            "--allow-root",
            "--tag-display-limit",
            "0",
            made,
            inside=root,
        )
        say(f"lintian: {said.strip() or 'nothing to say'}")
        name = Path(made).name
        shutil.copyfile(root / made.lstrip("/"), out / name)
    say(f"{name}: {(out / name).stat().st_size >> 20} MiB")
    return out / name


def files(root: Path) -> dict[str, str]:
    """Every file of a system: kind, mode, owner, and a digest of what is in it."""
    found = {}
    for at, folders, names in os.walk(root):
        inside = "/" + str(Path(at).relative_to(root)) if at != str(root) else ""
        folders[:] = [f for f in folders if not PASSING.match(f"{inside}/{f}")]
        for name in (*folders, *names):
            path, shown = Path(at) / name, f"{inside}/{name}"
            if PASSING.match(shown):
                continue
            about = path.lstat()
            what = f"{about.st_mode:o} {about.st_uid}:{about.st_gid}"
            if path.is_symlink():
                what += f" -> {path.readlink()}"
            elif path.is_file():
                what += " " + hashlib.sha256(path.read_bytes()).hexdigest()
            found[shown] = what
    return found


def surroundings(root: Path) -> dict[str, str]:
    """What else could be left: packages, kernel rules, cgroups, namespaces, shared memory."""
    own = _cgroup()
    return {
        "packages": run("dpkg-query", "-W", inside=root),
        "iptables": run("iptables-save", check=False),
        "nftables": run("nft", "list", "ruleset", check=False),
        "cgroups": "\n".join(sorted(str(p.relative_to(own)) for p in own.rglob("*") if p.is_dir())),
        "shared memory": "\n".join(
            sorted(p.name for p in Path("/dev/shm").glob("sectool-*") if _of(root, p))
        ),
    }


def _cgroup() -> Path:
    """This process's own cgroup: what is made on its behalf lies below."""
    line = next(one for one in Path("/proc/self/cgroup").read_text().splitlines() if one.startswith("0::"))
    return place.cgroup_mount() / line.removeprefix("0::/")


@contextmanager
def group() -> Iterator[None]:
    """This process and all it starts in a cgroup of their own."""
    before = _cgroup()
    own = place.cgroup_mount() / f"sectool-cleanhost-{secrets.token_hex(4)}"
    own.mkdir()
    (own / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (before / "cgroup.procs").write_text(str(os.getpid()))
        for folder in sorted((own, *own.rglob("*")), reverse=True):
            if folder.is_dir():
                folder.rmdir()


def _of(root: Path, folder: Path) -> bool:
    try:
        return (folder / "run-folder").read_text().startswith(("/run/sectool", "/srv/b"))
    except OSError:
        return False


@contextmanager
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them."""
    token = secrets.token_hex(3)
    names = (f"st-{token}-a", f"st-{token}-b")
    with ExitStack() as stack:
        for name in names:
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "del", name, check=False)
        run(
            "ip",
            "-n",
            names[0],
            "link",
            "add",
            "eth0",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            names[1],
        )
        for number, name in enumerate(names, 1):
            run("ip", "-n", name, "address", "add", f"10.9.8.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                run("ip", "-n", name, "link", "set", device, "up")
        yield names


def first_connection(root: Path) -> str:
    """Enrol two hosts, enforce, make one allowed and one denied connection; what the record says of them."""
    (root / "srv" / "first.yaml").write_text(POLICY)
    b = ("--state", "/srv/b/state", "--run", "/srv/b/run")
    where: tuple[tuple[str, ...], ...] = ((), b)
    with hosts() as names, ExitStack() as stack:
        run("sectool", "ca", "init", "--trust-domain", "first.example", inside=root)
        for name, options in zip(("web", "db"), where, strict=True):
            ca = ("--ca", "/var/lib/sectool/ca")
            run("sectool", *options, "host", "enroll", "--name", name, *ca, inside=root)
        for netns, options in zip(names, where, strict=True):
            run(
                "sectool",
                *options,
                "up",
                "--background",
                "--policy",
                "/srv/first.yaml",
                inside=root,
                netns=netns,
            )
            stack.callback(run, "sectool", *options, "down", inside=root, netns=netns, check=False)
        server = subprocess.Popen(
            [
                *("nsenter", f"--net=/run/netns/{names[1]}", "chroot", str(root), "sectool", *b, "run"),
                *("--label", "app=db", "--", "python3", "-m", "http.server", "8000", "--directory", "/srv"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(server.wait)
        stack.callback(server.kill)
        fetch = ("python3", "-c", FETCH)
        deadline = time.monotonic() + 20
        while "200" not in (
            said := run(
                "sectool", "run", "-l", "app=web", "--", *fetch, inside=root, netns=names[0], check=False
            )
        ):
            if time.monotonic() > deadline:
                raise FailedError(f"the allowed connection did not come through: {said}")
        denied = run(
            "sectool", "run", "-l", "app=batch", "--", *fetch, inside=root, netns=names[0], check=False
        )
        if "200" in denied:
            raise FailedError("a connection that no rule allows came through")
        flows = ""
        deadline = time.monotonic() + 20
        while not ("allow" in flows and "deny" in flows):
            flows = run("sectool", "flows", "-o", "csv", inside=root, netns=names[0])
            if time.monotonic() > deadline:
                raise FailedError(f"the record does not show both connections:\n{flows}")
        return flows


def by_script(root: Path, how: str) -> None:
    """Install with install.sh, connect, upgrade, uninstall."""
    script: tuple[str, ...] = ("/srv/tree/install.sh",)
    if how == "sdist":
        archive = built("sdist", root / "srv" / "made")
        run("tar", "-C", str(archive.parent), "-xzf", str(archive))
        script = (f"/srv/made/{archive.name.removesuffix('.tar.gz')}/install.sh",)
        shutil.rmtree(root / "srv" / "tree" / "sectool")  # nothing but the archive may be needed
    elif how == "wheel":
        script = (*script, "--from", f"/srv/made/{built('wheel', root / 'srv' / 'made').name}")
    run(*script, inside=root)
    say("first connection")
    first_connection(root)
    say("upgrading in place, then uninstalling")
    run(*script, inside=root)
    run("/opt/sectool/install.sh", "--uninstall", "--purge", inside=root)


def by_package(root: Path, deb: Path) -> None:
    """Install the Debian package, connect, install it once more, purge."""
    shutil.copyfile(deb, root / "srv" / deb.name)
    run(*APT, "install", f"/srv/{deb.name}", inside=root)
    say("first connection")
    first_connection(root)
    say("upgrading in place, then purging")
    run(*APT, "install", "--reinstall", f"/srv/{deb.name}", inside=root)
    run(*APT, "purge", "sectool", inside=root)
    run(*APT, "autoremove", "--purge", "-o", "APT::AutoRemove::RecommendsImportant=false", inside=root)
    (root / "srv" / deb.name).unlink()


def differences(root: Path, work: Callable[[], None]) -> list[str]:
    """What of the system is not as it was before the work."""
    before, around = files(root), surroundings(root)
    work()
    for left in ("b", "first.yaml", "made"):
        shutil.rmtree(root / "srv" / left, ignore_errors=True)
        (root / "srv" / left).unlink(missing_ok=True)
    after = files(root)
    return [
        *(f"left behind: {name}" for name in sorted(after.keys() - before.keys())),
        *(f"gone: {name}" for name in sorted(before.keys() - after.keys())),
        *(f"changed: {name}" for name in sorted(before.keys() & after.keys()) if before[name] != after[name]),
        *(f"changed: {what}" for what, now in surroundings(root).items() if now != around[what]),
    ]


def main(arguments: list[str]) -> int:
    """Entry point; 0 when nothing differs."""
    parser = argparse.ArgumentParser(
        prog="cleanhost", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("--from", dest="how", choices=("tree", "sdist", "wheel", "deb"), default="tree")
    parser.add_argument("--keep", action="store_true", help="leave the system's folder")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    try:
        deb = package(options.suite) if options.how == "deb" else None
        with group(), system(options.suite, options.keep) as root:
            say(f"installing on {SUITES[options.suite]}, from {options.how}")
            different = differences(
                root, lambda: by_package(root, deb) if deb is not None else by_script(root, options.how)
            )
    except FailedError as error:
        say(f"FAILED: {error}")
        return 1
    for line in different[:SHOWN]:
        print(line)
    say(
        f"{SUITES[options.suite]}, from {options.how}: {len(different)} differences, {time.monotonic() - begun:.0f} s"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
