"""An intruder's hands, for practice: keep the first packet of somebody's connection, and send it again or changed.

Only what anybody on the wire can do: nothing here knows a key. IPv4 and TCP. A packet is kept as a capture file
(pcap, raw IP), which tcpdump and `sectool capture show` read, too.
"""

from __future__ import annotations

import secrets
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sectool.errors import SectoolError, UsageError

_ALL = 3  # ETH_P_ALL
_IPV4 = 0x0800
_SYN, _ACK = 0x02, 0x10
_PCAP = struct.Struct("<IHHiIII")
_PACKET = struct.Struct("<IIII")
_MAGIC, _RAW_IP, _SNAP = 0xA1B2C3D4, 101, 65535
# Where fields of a Hello begin (docs/protocol.md); its second byte is its type.
_HELLO = b"\x01"
_EPHEMERAL, _STATIC, _CREDENTIAL = 12, 44, 76
MAX_FILE = 1 << 20  # bytes of a capture that is read


@dataclass(frozen=True, slots=True)
class Greeting:
    """A SYN with a payload: IPv4 header, TCP header and what is behind it."""

    ip: bytes
    tcp: bytes
    payload: bytes

    @property
    def source(self) -> str:
        return socket.inet_ntoa(self.ip[12:16])

    @property
    def target(self) -> str:
        return socket.inet_ntoa(self.ip[16:20])

    @property
    def ports(self) -> tuple[int, int]:
        first, second = struct.unpack(">HH", self.tcp[:4])
        return first, second

    def __bytes__(self) -> bytes:
        return self.ip + self.tcp + self.payload

    def __str__(self) -> str:
        here, there = self.ports
        return f"{self.source}:{here} -> {self.target}:{there}, {len(self.payload)} bytes behind the SYN"

    def moved(self, source: str, port: int) -> Greeting:
        """The same from another address and port, with the checksum that belongs to it."""
        ip = self.ip[:12] + socket.inet_aton(source) + self.ip[16:]
        return _summed(Greeting(ip, port.to_bytes(2, "big") + self.tcp[2:], self.payload))

    def forged(self, at: int) -> Greeting:
        """The same with one bit of payload byte `at` changed; UsageError when there is no such byte.

        A Hello gets another ephemeral key, too: who sees one twice looks no further.
        """
        if not 0 <= at < len(self.payload):
            raise UsageError(
                f"there is no byte {at} behind this SYN", f"it has bytes 0 to {len(self.payload) - 1}"
            )
        payload = bytearray(self.payload)
        if payload[1:2] == _HELLO and len(payload) > _CREDENTIAL:
            payload[_EPHEMERAL:_STATIC] = secrets.token_bytes(_STATIC - _EPHEMERAL)
        payload[at] ^= 1
        return _summed(Greeting(self.ip, self.tcp, bytes(payload)))


def greeting(packet: bytes) -> Greeting | None:
    """The packet, if it is a whole IPv4 SYN (no answer to one) that carries something."""
    if len(packet) < 40 or packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
        return None
    head = (packet[0] & 15) * 4
    end = int.from_bytes(packet[2:4], "big")
    if head < 20 or not head + 20 <= end <= len(packet) or int.from_bytes(packet[6:8], "big") & 0x3FFF:
        return None
    offset = (packet[head + 12] >> 4) * 4
    if offset < 20 or head + offset >= end or packet[head + 13] & (_SYN | _ACK) != _SYN:
        return None
    return Greeting(packet[:head], packet[head : head + offset], packet[head + offset : end])


def _summed(one: Greeting) -> Greeting:
    """With TCP's checksum as it has to be; the kernel fills in that of the IP header."""
    tcp = one.tcp[:16] + bytes(2) + one.tcp[18:]
    pseudo = one.ip[12:20] + struct.pack(">BBH", 0, socket.IPPROTO_TCP, len(tcp) + len(one.payload))
    data = pseudo + tcp + one.payload
    total = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return Greeting(one.ip, tcp[:16] + struct.pack(">H", total ^ 0xFFFF) + tcp[18:], one.payload)


def record(file: Path, port: int, command: Sequence[str], patience_s: float = 10.0) -> Greeting:
    """Listen on every interface while `command` runs, and keep the first SYN to `port` that carries something.

    SectoolError when none goes by, UsageError when there is no such command.
    """
    try:
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ALL))
    except PermissionError:
        raise SectoolError("listening to the wire needs root", "run it with sudo") from None
    with tap:
        try:
            process = subprocess.Popen(list(command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        except OSError as error:
            raise UsageError(f"cannot run {command[0]}: {error.strerror}", "give its path") from None
        end = time.monotonic() + patience_s
        try:
            while (left := end - time.monotonic()) > 0:
                tap.settimeout(left)
                try:
                    data, where = tap.recvfrom(1 << 16)
                except TimeoutError:
                    break
                found = greeting(data) if where[1] == _IPV4 else None
                if found is not None and found.ports[1] == port:
                    whole = _summed(found)  # a kernel may have left the checksum to the network card
                    file.write_bytes(_capture(bytes(whole)))
                    return whole
        finally:
            try:
                process.wait(timeout=patience_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    raise SectoolError(
        f"no SYN with a payload to port {port} went by",
        "between enforcers the first connection carries a whole handshake; is the port right?",
    )


def _capture(packet: bytes) -> bytes:
    seconds, rest = divmod(time.time_ns() // 1000, 1_000_000)
    head = _PCAP.pack(_MAGIC, 2, 4, 0, 0, _SNAP, _RAW_IP)
    return head + _PACKET.pack(seconds, rest, len(packet), len(packet)) + packet


def read(file: Path) -> Greeting:
    """What `record` kept. UsageError for any other file."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    return parse(data, str(file))


def parse(data: bytes, name: str) -> Greeting:
    """The packet in a capture's bytes; any that hold none give UsageError."""
    start = _PCAP.size + _PACKET.size
    found = None
    if len(data) > start and _PCAP.unpack_from(data)[0::6] == (_MAGIC, _RAW_IP):
        size = _PACKET.unpack_from(data, _PCAP.size)[2]
        found = greeting(data[start : start + size])
    if found is None:
        raise UsageError(f"{name} holds no recorded SYN", "make one: sectool lab attack record FILE …")
    return found


def send(one: Greeting) -> None:
    """Put it on the wire as it is, whatever source address it has. SectoolError when that is not possible."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as out:
            out.sendto(bytes(one), (one.target, 0))
    except PermissionError:
        raise SectoolError("sending packets by hand needs root", "run it with sudo") from None
    except OSError as error:
        raise SectoolError(f"cannot send to {one.target}: {error.strerror}") from None


def here(one: Greeting) -> Greeting:
    """As if this host sent it: its own address, a port of chance. SectoolError without a way to the target."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ask:
        try:
            ask.connect((one.target, 9))
        except OSError as error:
            raise SectoolError(f"there is no way to {one.target} from here: {error.strerror}") from None
        return one.moved(ask.getsockname()[0], 20_000 + secrets.randbelow(12_000))
