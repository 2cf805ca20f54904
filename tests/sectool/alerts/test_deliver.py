"""Alerts arrive: at a real HTTP server, a real datagram socket and a real program; or are tried again and counted."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from sectool.alerts.deliver import MOST, TRIES, Delivery, DeliveryError, Message, deliver
from sectool.alerts.rules import How, Target

MESSAGE: Message = {"alert": "burst", "text": "app=web was denied", "state": "raised", "owners": ["a", "b"]}


class Hook(BaseHTTPRequestHandler):
    """Remembers what was posted, and answers with the status the server is told to."""

    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.got.append((self.path, json.loads(body)))
        self.send_response(server.statuses.pop(0) if server.statuses else 204)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Silence."""


@pytest.fixture
def hook() -> Iterator[Any]:
    server: Any = HTTPServer(("127.0.0.1", 0), Hook)
    server.got, server.statuses = [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def webhook(server: Any) -> Target:
    return Target("ops", How.WEBHOOK, (f"http://127.0.0.1:{server.server_address[1]}/a?b=c",))


def test_webhook(hook: Any) -> None:
    asyncio.run(deliver(webhook(hook), MESSAGE))
    ((path, body),) = hook.got
    assert path == "/a?b=c"
    assert body == {"schema": "sectool.alert/1", **MESSAGE}


@pytest.mark.parametrize("status", [302, 400, 503])
def test_anything_but_success_is_a_failure_and_nothing_is_followed(hook: Any, status: int) -> None:
    hook.statuses = [status]
    with pytest.raises(DeliveryError, match=str(status)):
        asyncio.run(deliver(webhook(hook), MESSAGE))
    assert len(hook.got) == 1


def test_nobody_there() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with pytest.raises(DeliveryError):
        asyncio.run(deliver(Target("x", How.WEBHOOK, (f"http://127.0.0.1:{port}/",)), MESSAGE))


def test_syslog_is_one_printable_datagram() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(10)
        target = Target("log", How.SYSLOG, (f"udp://127.0.0.1:{sock.getsockname()[1]}",))
        asyncio.run(deliver(target, {**MESSAGE, "text": "evil\n<0>fake\x1b[2J" + "x" * 5000}))
        data = sock.recv(65536)
    assert data.startswith(b"<84>sectool[")
    assert b"raised: burst: evil?<0>fake?[2J" in data
    assert b"\n" not in data
    assert len(data) <= 2000


def test_command_gets_the_message_on_standard_input(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"
    asyncio.run(deliver(Target("p", How.COMMAND, (sys.executable, "-c", script, str(out))), MESSAGE))
    assert json.loads(out.read_text())["alert"] == "burst"
    for argv in ((sys.executable, "-c", "import sys; sys.exit(3)"), ("/no/such/program",)):
        with pytest.raises(DeliveryError):
            asyncio.run(deliver(Target("p", How.COMMAND, argv), MESSAGE))


async def _drained(delivery: Delivery, condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)
    await delivery.close()


def test_what_fails_is_tried_again_and_told_when_it_works(hook: Any) -> None:
    hook.statuses = [500, 500]
    heard: list[str] = []

    async def go() -> None:
        delivery = Delivery(webhook(hook), heard.append, first_wait_s=0.001)
        delivery.put(MESSAGE)
        await _drained(delivery, lambda: "" in heard)

    asyncio.run(go())
    assert len(hook.got) == 3
    assert [bool(why) for why in heard] == [True, True, False]


def test_what_is_given_up_is_counted_and_told_with_the_next() -> None:
    tried: list[Message] = []

    async def send(target: Target, message: Message) -> None:
        tried.append(message)
        if len(tried) <= TRIES:
            raise DeliveryError("down")

    async def go() -> None:
        delivery = Delivery(
            Target("x", How.SYSLOG, ("local",)), lambda why: None, send=send, first_wait_s=0.0001
        )
        delivery.put({"n": 1})
        delivery.put({"n": 2})
        await _drained(delivery, lambda: len(tried) == TRIES + 1)
        assert delivery.lost == 0

    asyncio.run(go())
    assert tried[-1] == {"n": 2, "not_sent": 1}


def test_a_storm_is_bounded_and_says_so() -> None:
    sent: list[Message] = []

    async def send(target: Target, message: Message) -> None:
        sent.append(message)

    async def go() -> None:
        delivery = Delivery(Target("x", How.SYSLOG, ("local",)), lambda why: None, send=send)
        for number in range(MOST + 20):
            delivery.put({"n": number})
        await _drained(delivery, lambda: delivery.lost == 20)

    asyncio.run(go())
    assert len(sent) == MOST
    assert "more" in sent[-1]
    assert all("more" not in message for message in sent[:-1])
