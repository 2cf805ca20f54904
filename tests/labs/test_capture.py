"""The judgement on a capture: identity in SYN and SYN-ACK, and nowhere else."""

from __future__ import annotations

import secrets

from hypothesis import given
from hypothesis import strategies as st

from labs.capture import WINDOW, examine, windows

SYN, SYN_ACK, ACK = 0x02, 0x12, 0x10
HELLO = secrets.token_bytes(900)
ANSWER = secrets.token_bytes(800)


def test_a_clean_handshake_has_no_leak() -> None:
    finding = examine([(SYN, HELLO), (SYN_ACK, ANSWER), (ACK, b""), (ACK, b"select 1"), (ACK, b"1")])
    assert (finding.syn, finding.syn_ack, finding.bare, finding.with_data) == (1, 1, 0, 2)
    assert finding.leaks == ()


def test_a_spiffe_id_in_data_is_a_leak() -> None:
    finding = examine([(SYN, HELLO), (ACK, b"... spiffe://lab.example/web ...")])
    assert len(finding.leaks) == 1
    assert "packet 2" in finding.leaks[0]


def test_a_piece_of_the_credential_in_data_is_a_leak() -> None:
    piece = HELLO[100 : 100 + 2 * WINDOW]
    assert len(examine([(SYN, HELLO), (ACK, b"x" * 7 + piece + b"y")]).leaks) == 1


def test_a_bare_syn_is_counted_as_such() -> None:
    finding = examine([(SYN, b""), (SYN_ACK, b"")])
    assert (finding.syn, finding.syn_ack, finding.bare) == (0, 0, 2)


def test_monotonous_bytes_are_no_mark_of_identity() -> None:
    assert windows(bytes(400)) == set()
    assert examine([(SYN, bytes(400)), (ACK, bytes(100))]).leaks == ()


@given(at=st.integers(0, 900 - 2 * WINDOW), before=st.binary(max_size=50), after=st.binary(max_size=50))
def test_any_two_windows_of_a_credential_are_found_wherever_they_are(
    at: int, before: bytes, after: bytes
) -> None:
    packets = [(SYN, HELLO), (ACK, before + HELLO[at : at + 2 * WINDOW] + after)]
    assert len(examine(packets).leaks) == 1
