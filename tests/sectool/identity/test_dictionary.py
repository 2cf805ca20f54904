from __future__ import annotations

import hashlib

from sectool.identity.dictionary import DICTIONARY


def test_the_dictionary_of_wire_version_1_never_changes() -> None:
    assert (
        hashlib.sha256(DICTIONARY).hexdigest()
        == "17e3cf634da8d12dc29cd947d69bd6e6d5d00c8ae16acbb1ffb8aaa5486eee2f"
    )
    assert len(DICTIONARY) < 32 * 1024  # deflate's window
