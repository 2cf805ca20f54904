"""The operating system and kernel of this host, as labels."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from sectool.identity.workload import label_value

OS_RELEASE: Final = (Path("/etc/os-release"), Path("/usr/lib/os-release"))  # os-release(5)
_VERSION: Final = re.compile(r"([0-9]+\.[0-9]+)")


def labels(files: tuple[Path, ...] = OS_RELEASE, release: str = "") -> dict[str, str]:
    """`os` (debian-12) and `kernel` (6.18); what cannot be told is left out."""
    fields: dict[str, str] = {}
    for path in files:
        try:
            fields = release_fields(path.read_text(encoding="utf-8", errors="replace"))
            break
        except OSError:
            continue
    name = "-".join(filter(None, (fields.get("ID", ""), fields.get("VERSION_ID", ""))))
    kernel = _VERSION.match(release or os.uname().release)
    found = {"os": label_value(name), "kernel": kernel[1] if kernel else ""}
    return {key: value for key, value in found.items() if value}


def release_fields(text: str) -> dict[str, str]:
    """The assignments of an os-release file; lines of another form are left out."""
    out: dict[str, str] = {}
    for line in text.splitlines():
        key, equals, value = line.strip().partition("=")
        if equals and key.isidentifier():
            out[key] = value.strip().strip("\"'")
    return out
