"""Which parts of a host's surroundings can make labels (setting `context`)."""

from __future__ import annotations

from typing import Final

KINDS: Final = ("cloud", "os")  # cloud, region, zone, instance; os, kernel
