"""Large pages: what is asked for, and that nothing else happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nfq.hugepages import collapse

_CHILD = """
import re
from pathlib import Path
from nfq.hugepages import collapse
kept = [bytes((i % 251,)) * 1000 for i in range(30_000)]
done = collapse()
assert all(set(b) == {i % 251} for i, b in enumerate(kept)), "nothing has changed"
print(done, re.search(r"AnonHugePages:\\s+(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1])
"""


def test_the_heap_is_in_large_pages_afterwards() -> None:
    """Where the kernel does not know how, none are, and the program goes on all the same."""
    done = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True)
    asked, large = (int(n) for n in done.stdout.split())
    assert asked % (2 << 20) == 0
    assert large * 1024 >= asked


def test_what_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    assert collapse(tmp_path / "nothing") == 0
    odd = tmp_path / "maps"
    odd.write_text(
        "garbage\n00400000-00401000 rw-p 00000000 00:00 0 \n00600000-00c00000 r--p 00000000 00:00 0\n"
    )
    assert collapse(odd) == 0
