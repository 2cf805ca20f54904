"""The initiator's proof, a TCP option: `check_proof`.

Only the options made under these keys prove anything, each of them its own suite.
"""

from __future__ import annotations

from functools import cache

from nfq.handshake import check_proof, is_proof, proof_option
from tests.fuzz.script import FLIP, Script, change
from tests.fuzz.world import shaken


@cache
def _genuine() -> tuple[bytes, ...]:
    return tuple(proof_option(shaken().keys, suite) for suite in range(4))


def one(data: bytes) -> None:
    """A first byte above 3: the rest is the option; else it says which genuine one the rest changes."""
    script = Script(data)
    which = script.below(256)
    proofs = _genuine()
    option = script.rest() if which > 3 else script.changed(proofs[which])
    option = option[:28].ljust(28, b"\0")  # what a record option is when it comes here
    suite = check_proof(shaken().keys, option)
    assert (suite is not None) == (option in proofs)
    if suite is not None:
        assert is_proof(option)
        assert proofs.index(option) == suite


def seeds() -> dict[str, bytes]:
    """Genuine options as they are, and changed."""
    proofs = _genuine()
    out = {f"raw-{n}": b"\x09" + proof for n, proof in enumerate(proofs)}
    out |= {f"genuine-{n}": bytes((n, 0)) for n in range(4)}
    out |= {f"flip-{at}": b"\1\1" + change(FLIP, at, 0, size=28) for at in (0, 1, 3, 7, 9, 11, 12, 27)}
    return out
