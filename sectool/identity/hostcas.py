"""Where a CA keeps the host CAs it has issued: ca/hosts/<serial number>.crt (read by sectool.identity.register)."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.errors import SectoolError
from sectool.identity.files import write_atomic

HOSTS = "hosts"


def remember(ca_dir: Path, certificate: x509.Certificate) -> None:
    """Put a new host CA into the register, if the folder can be written to."""
    folder = ca_dir / HOSTS
    try:
        folder.mkdir(mode=0o755, exist_ok=True)
        write_atomic(folder / f"{certificate.serial_number:x}.crt", certificate.public_bytes(Encoding.PEM))
    except (OSError, SectoolError):  # a root on read-only media still enrols
        return
