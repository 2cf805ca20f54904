"""A new root in place of the old one, with an overlap in which hosts trust both.

    begin    ca/next    a new root; hosts are given both (sectool ca bundle)         still issued by the old one
    switch   ca, ca/old the new root issues from now on, revocations come along      hosts renew their CAs
    finish              the old root's key is destroyed, its certificate handed out no more

Each step can be repeated after a crash. Between steps every host's CA is by a root that all others trust, so no
connection is refused, provided that the bundle has reached them all before `switch`, and that all have renewed before
`finish` (which looks into the register of host CAs and refuses).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.errors import CredentialError, UsageError
from sectool.identity.authority import DEFAULT_ROOT_YEARS, Passphrase, RootAuthority
from sectool.identity.files import read_file, write_atomic
from sectool.identity.profile import Profile, read_profile
from sectool.identity.register import Registered, current_list, registered, revoke
from sectool.identity.revocation import Entries
from sectool.identity.trust import TrustBundle

NEXT, OLD = "next", "old"
_FILES = ("root.key", "root.crt", "trust-domain")


@dataclass(frozen=True, slots=True)
class Rollover:
    """How far a rollover is.

    `step`: none, begun, switched; `behind`: host CAs of the old root, neither expired nor revoked.
    """

    step: str
    roots: tuple[Profile, ...]  # the current one first
    behind: tuple[Registered, ...]


def _root(folder: Path) -> Profile:
    pem = read_file(folder / "root.crt", "there is no root CA here", "sectool ca init --trust-domain NAME")
    return read_profile(x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER), "root")


def status(ca_dir: Path, now_us: int) -> Rollover:
    """Where the rollover stands; UsageError without a CA."""
    current = _root(ca_dir)
    if (ca_dir / NEXT).exists():
        return Rollover("begun", (current, _root(ca_dir / NEXT)), ())
    if not (ca_dir / OLD).exists():
        return Rollover("none", (current,), ())
    old = _root(ca_dir / OLD)
    newest: dict[str, Registered] = {}
    for each in registered(ca_dir):  # oldest first
        newest[each.name] = each
    listed = current_list(ca_dir, current.certificate, current.spiffe_id().trust_domain, now_us)
    revoked = listed.entries.serials if listed else frozenset()
    behind = tuple(
        each
        for each in newest.values()
        if each.not_after_us >= now_us and each.serial not in revoked and _by(each.profile, old)
    )
    return Rollover("switched", (current, old), behind)


def _by(profile: Profile, root: Profile) -> bool:
    try:
        profile.issued_by(root)
    except CredentialError:
        return False
    return True


def bundle(ca_dir: Path) -> TrustBundle:
    """Every root that hosts have to trust now."""
    made = TrustBundle()
    for folder in (ca_dir, ca_dir / NEXT, ca_dir / OLD):
        if folder == ca_dir or folder.exists():
            root = _root(folder)
            pem = root.certificate.public_bytes(Encoding.PEM).decode("ascii")
            made = made.with_root(root.spiffe_id().trust_domain, pem)
    return made


def begin(
    ca_dir: Path, now_us: int, *, years: int = DEFAULT_ROOT_YEARS, passphrase: bytes = b""
) -> RootAuthority:
    """Make the next root; UsageError if a rollover is under way."""
    if status(ca_dir, now_us).step != "none":
        raise UsageError("a rollover is under way", "sectool ca rollover status")
    domain = _root(ca_dir).spiffe_id().trust_domain
    return RootAuthority.create(ca_dir / NEXT, domain, now_us, years, passphrase=passphrase)


def switch(ca_dir: Path, now_us: int, passphrase: Passphrase = bytes) -> RootAuthority:
    """Issue from the next root from now on; what is revoked stays so."""
    if not (ca_dir / NEXT).exists():
        raise UsageError("there is no next root to switch to", "sectool ca rollover begin")
    fresh = RootAuthority.load(ca_dir / NEXT, passphrase)
    new = _root(ca_dir / NEXT)
    if _root(ca_dir).fingerprint != new.fingerprint:
        old = ca_dir / OLD
        old.mkdir(mode=0o700, exist_ok=True)
        for name in (*_FILES, "revoked.pem"):
            if (ca_dir / name).exists() and not (old / name).exists():  # repeated: the key may be the new one
                data = read_file(ca_dir / name, "a file of the root is missing", "restore it from a backup")
                write_atomic(old / name, data, 0o600 if name == "root.key" else 0o644)
        for name in _FILES:  # the certificate after the key: interrupted here, the step is repeated
            data = read_file(ca_dir / NEXT / name, "a file of the next root is missing", "restore it")
            write_atomic(ca_dir / name, data, 0o600 if name == "root.key" else 0o644)
    listed = ca_dir / "revoked.pem"
    if (ca_dir / OLD / "revoked.pem").exists():
        before = _root(ca_dir / OLD)
        known = current_list(ca_dir / OLD, before.certificate, fresh.trust_domain, now_us)
        listed.unlink(missing_ok=True)
        revoke(ca_dir, fresh, known.entries if known else Entries(), now_us)
    shutil.rmtree(ca_dir / NEXT)
    return fresh


def finish(ca_dir: Path, now_us: int, *, force: bool = False) -> Profile:
    """Destroy the old root's key and hand out its certificate no more; the old root.

    UsageError while valid host CAs are by the old root (unless `force`): nobody would trust them.
    """
    found = status(ca_dir, now_us)
    if found.step != "switched":
        raise UsageError("there is no old root to drop", "sectool ca rollover status")
    if found.behind and not force:
        names = ", ".join(each.name for each in found.behind[:8])
        raise UsageError(
            f"these hosts still have a CA by the old root: {names}",
            "renew them (sectool host request --renew, or the CA service does it); --force cuts them off",
        )
    old = ca_dir / OLD
    retired = ca_dir / "retired"
    retired.mkdir(mode=0o755, exist_ok=True)
    root = _root(old)
    write_atomic(retired / f"{root.fingerprint.hex()[:16]}.crt", root.certificate.public_bytes(Encoding.PEM))
    key = old / "root.key"
    if key.exists():
        key.write_bytes(bytes(key.stat().st_size))  # copies a file system keeps are beyond us
    shutil.rmtree(old)
    return root
