"""Which suite is chosen, and from what."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq.suites import (
    AES_256_GCM,
    ALL,
    CHACHA20_POLY1305,
    by_number,
    choose,
    has_aes_instructions,
    mask,
    preference,
)
from sectool.errors import SectoolError
from sectool.events import Cipher


def test_numbers_and_bits_are_the_wire_s() -> None:
    assert (AES_256_GCM.cipher, AES_256_GCM.bit) == (Cipher.AES_256_GCM, 1)
    assert (CHACHA20_POLY1305.cipher, CHACHA20_POLY1305.bit) == (Cipher.CHACHA20_POLY1305, 2)
    assert mask(ALL) == 3
    assert [by_number(n) for n in range(4)] == [None, AES_256_GCM, CHACHA20_POLY1305, None]


def test_the_processor_decides_without_a_setting() -> None:
    assert preference(aes=True) == (AES_256_GCM, CHACHA20_POLY1305)
    assert preference(aes=False) == (CHACHA20_POLY1305, AES_256_GCM)


def test_a_setting_names_suites_in_its_own_order() -> None:
    assert preference(["ChaCha20-Poly1305", "aes-256-gcm", "aes-256-gcm"], aes=True) == ALL[::-1]
    assert preference(["chacha20-poly1305"]) == (CHACHA20_POLY1305,)
    assert preference([]) == ()
    with pytest.raises(SectoolError, match="aes-128-gcm") as caught:
        preference(["aes-128-gcm"])
    assert caught.value.hint
    assert "chacha20-poly1305" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu vme aes avx\n", True),
        ("processor\t: 0\nflags\t\t: fpu vme avx vaes\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd aes pmull\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
        ("hart\t: 0\nisa\t: rv64imafdc\n", True),
    ],
)
def test_aes_instructions_are_read_from_cpuinfo(tmp_path: Path, text: str, expected: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)
    assert has_aes_instructions(cpuinfo) is expected


def test_an_unreadable_cpuinfo_counts_as_a_server(tmp_path: Path) -> None:
    assert has_aes_instructions(tmp_path / "none")


@given(st.integers(0, 255), st.permutations(ALL), st.integers(0, 2))
def test_the_choice_is_our_first_that_is_offered(offered: int, order: list[object], count: int) -> None:
    ours = [s for s in ALL if s in order[:count]]
    chosen = choose(offered, ours)
    common = [s for s in ours if s.bit & offered]
    assert chosen == (common[0] if common else None)
