"""The intruder's tools: what they keep, change and refuse. (That hosts refuse them: tests/kernel/test_attacks.py.)"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.packet import Raw
from typer.testing import CliRunner

from labs import attackcli, attacker
from sectool.errors import UsageError

SYN = bytes(
    IP(src="10.77.0.30", dst="10.77.0.10")
    / TCP(sport=4711, dport=80, flags="S", seq=7, options=[("MSS", 1400), (253, b"\x5e\xc7")])
    / Raw(bytes(range(200)))
)


def keep(packet: bytes) -> bytes:
    """A capture file as `record` writes it."""
    head = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 101)
    return head + struct.pack("<IIII", 1, 2, len(packet), len(packet)) + packet


def as_scapy_sees(one: attacker.Greeting) -> IP:
    """Its checksum as it stands, and whether it is right."""
    packet = IP(bytes(one))
    stands = packet[TCP].chksum
    del packet[TCP].chksum
    assert IP(bytes(packet))[TCP].chksum == stands
    return packet


def test_a_recorded_syn_is_sent_from_elsewhere_with_what_it_said() -> None:
    one = attacker.parse(keep(SYN), "x")
    assert (one.source, one.target, one.ports) == ("10.77.0.30", "10.77.0.10", (4711, 80))
    moved = as_scapy_sees(one.moved("10.77.0.99", 20_000))
    assert (moved.src, moved[TCP].sport, moved[TCP].seq) == ("10.77.0.99", 20_000, 7)
    assert bytes(moved[TCP].payload) == bytes(range(200))
    assert dict(moved[TCP].options)[253] == b"\x5e\xc7"


@given(at=st.integers(0, 199))
def test_a_forged_one_differs_in_one_bit_and_the_key_of_its_attempt(at: int) -> None:
    one = attacker.parse(keep(SYN), "x")
    changed = bytes(as_scapy_sees(one.forged(at))[TCP].payload)
    differ = {i for i in range(200) if changed[i] != i}
    assert differ - set(range(12, 44)) <= {at}
    assert len(differ & set(range(12, 44))) > 16, "another ephemeral key"
    if not 12 <= at < 44:
        assert changed[at] ^ at == 1


def test_what_is_no_hello_is_changed_in_one_bit_alone() -> None:
    resume = attacker.Greeting(SYN[:20], SYN[20:40], b"\x01\x04" + bytes(50))
    assert resume.forged(20).payload == b"\x01\x04" + bytes(18) + b"\x01" + bytes(31)


@pytest.mark.parametrize("at", [-1, 200])
def test_a_byte_that_is_not_there_cannot_be_changed(at: int) -> None:
    with pytest.raises(UsageError, match="there is no byte"):
        attacker.parse(keep(SYN), "x").forged(at)


@given(data=st.one_of(st.binary(max_size=300), st.binary(max_size=120).map(keep)))
@example(keep(SYN)[:60])
@example(keep(bytes(IP(dst="10.0.0.1") / TCP(flags="SA") / Raw(b"x"))))
@example(keep(bytes(IP(dst="10.0.0.1") / TCP(flags="S"))))
def test_any_file_is_a_recorded_syn_or_refused(data: bytes) -> None:
    try:
        one = attacker.parse(data, "file")
    except UsageError as error:
        assert "holds no recorded SYN" in error.message
        return
    assert one.payload
    assert bytes(one) in data


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        attacker.read(tmp_path / "none.pcap")
    assert CliRunner().invoke(attackcli.app, ["replay", "--help"]).exit_code == 0
