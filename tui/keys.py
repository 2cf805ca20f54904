"""`python -m tui.keys` prints docs/keys.md."""

from __future__ import annotations

import sys

from tui.actions import reference

if __name__ == "__main__":
    sys.stdout.write(reference())
