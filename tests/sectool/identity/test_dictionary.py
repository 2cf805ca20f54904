from __future__ import annotations

import hashlib

from sectool.identity.dictionary import DICTIONARY


def test_the_dictionary_of_wire_version_1_never_changes() -> None:
    assert (
        hashlib.sha256(DICTIONARY).hexdigest()
        == "8b99f7029a6a82844bb44a8c3c4347cb10e0296a94cf26193966b08a170e0490"
    )
    assert len(DICTIONARY) < 32 * 1024  # deflate's window
