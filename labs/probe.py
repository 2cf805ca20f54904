"""Does NFQUEUE really work here? Queue one packet in a namespace of our own and see it arrive.

`./dev` runs this inside `unshare --net` before anything that needs the enforcer, so that a kernel without
nfnetlink_queue is named as such instead of showing up later as a lab in which nothing connects.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time

QUEUE = 7
PORT = 9
DEADLINE = 5.0


def _prepare() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    rule = [
        "-t",
        "mangle",
        "-A",
        "OUTPUT",
        "-p",
        "tcp",
        "--dport",
        str(PORT),
        "-j",
        "NFQUEUE",
        "--queue-num",
        str(QUEUE),
    ]
    subprocess.run(["iptables", "-w", "5", *rule], check=True)


def queued_packets() -> int:
    """Send one SYN over loopback through an NFQUEUE rule; the number of packets that reached this process."""
    from netfilterqueue import NetfilterQueue, Packet

    seen: list[int] = []

    def got(packet: Packet) -> None:
        seen.append(packet.get_payload_len())
        packet.drop()

    _prepare()
    queue = NetfilterQueue()
    queue.bind(QUEUE, got)
    listener = socket.fromfd(queue.get_fd(), socket.AF_NETLINK, socket.SOCK_RAW)
    listener.settimeout(0.2)
    client = socket.socket()
    client.setblocking(False)
    client.connect_ex(("127.0.0.1", PORT))
    end = time.monotonic() + DEADLINE
    try:
        while not seen and time.monotonic() < end:
            try:
                queue.run_socket(listener)
            except TimeoutError:
                continue
    finally:
        queue.unbind()
        client.close()
        listener.close()
    return len(seen)


def main() -> int:
    """Exit 0 when a packet came through; otherwise say on stderr, in one line, what is wrong."""
    if sys.argv[1:] != ["--inside"]:
        return subprocess.run(
            ["unshare", "--net", "--", sys.executable, "-m", "labs.probe", "--inside"], check=False
        ).returncode
    try:
        if queued_packets():
            return 0
        print(
            "NFQUEUE takes packets but hands none to a program: is another queue listener in the way?",
            file=sys.stderr,
        )
    except OSError as error:
        print(f"NFQUEUE cannot be opened ({error}): the kernel lacks nfnetlink_queue", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"this command failed: {' '.join(error.cmd)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
