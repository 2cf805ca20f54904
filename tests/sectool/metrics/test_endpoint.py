"""The endpoint, asked by well-meaning and by other clients on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from sectool.errors import SectoolError, UsageError
from sectool.metrics import endpoint
from sectool.metrics.endpoint import DEFAULT_PORT, Endpoint, parse_address
from sectool.metrics.exposition import CONTENT_TYPE

PATIENCE_S = 30.0


@contextlib.asynccontextmanager
async def serving(
    metrics: Callable[[], str] = lambda: "x 1\n", *, local: bool = True
) -> AsyncIterator[Callable[[bytes], Awaitable[bytes]]]:
    """An endpoint on a free port; what it gives sends bytes on a connection of their own and returns the answer."""
    async with await Endpoint(metrics, local=local).listen(("127.0.0.1", 0)) as server:
        port = server.sockets[0].getsockname()[1]

        async def ask(data: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
            writer.close()
            return answer

        yield ask


def get(path: str = "/metrics", host: str = "127.0.0.1:9464", method: str = "GET") -> bytes:
    """A request."""
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nAccept: */*\r\n\r\n".encode()


def test_a_scrape() -> None:
    async def scenario() -> None:
        async with serving() as ask:
            answer = await ask(get())
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert CONTENT_TYPE.encode() in head
            assert body == b"x 1\n"
            assert (await ask(get("/metrics?collect=all", "localhost"))).startswith(b"HTTP/1.1 200 ")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get("/"), b"404"),
        (get("/metrics/../secret"), b"404"),
        (get(method="POST"), b"405"),
        (get(method="DELETE"), b"405"),
        (get(host="evil.example"), b"421"),
        (get(host="127.0.0.1.evil.example"), b"421"),
        (get(host="10.0.0.1:9464"), b"421"),
        (get(host=""), b"421"),
        (b"GET /metrics HTTP/1.0\r\n\r\n", b"421"),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"400"),
        (b"GET /" + b"x" * 20_000, b"4"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_nothing_else_is_given(request_: bytes, status: bytes) -> None:
    async def scenario() -> None:
        async with serving() as ask:
            answer = await ask(request_)
            assert answer.split(b" ")[1].startswith(status)
            assert b"x 1" not in answer
            assert (await ask(get())).endswith(b"x 1\n")

    asyncio.run(scenario())


def test_beyond_loopback_it_may_have_any_name() -> None:
    async def scenario() -> None:
        async with serving(local=False) as ask:
            assert (await ask(get(host="web-1.example:9464"))).endswith(b"x 1\n")

    asyncio.run(scenario())


def test_a_failure_is_told_and_over_with_its_cause() -> None:
    failing = [True]

    def metrics() -> str:
        if failing:
            raise SectoolError("no permission")
        return "x 1\n"

    async def scenario() -> None:
        async with serving(metrics) as ask:
            assert (await ask(get())).startswith(b"HTTP/1.1 503 ")
            failing.clear()
            assert (await ask(get())).startswith(b"HTTP/1.1 200 ")

    asyncio.run(scenario())


def test_a_crowd_that_says_nothing_is_bounded_and_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "TIMEOUT_S", 0.5)

    async def scenario() -> None:
        async with await Endpoint(lambda: "x 1\n", local=True).listen(("127.0.0.1", 0)) as server:
            port = server.sockets[0].getsockname()[1]
            crowd = [
                await asyncio.open_connection("127.0.0.1", port) for _ in range(2 * endpoint.MAX_CONNECTIONS)
            ]
            for reader, _ in crowd:  # those beyond the bound at once, the others at the end of their time
                assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(get())
            assert (await asyncio.wait_for(reader.read(), PATIENCE_S)).endswith(b"x 1\n")
            for _, each in (*crowd, (reader, writer)):
                each.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1", ("127.0.0.1", DEFAULT_PORT)),
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("localhost:80", ("127.0.0.1", 80)),
        ("[::1]:80", ("::1", 80)),
        ("[::1]", ("::1", DEFAULT_PORT)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text, remote=False) == address


@pytest.mark.parametrize(
    "text", ["", ":80", "::1", "host", "127.0.0.1:65536", "127.0.0.1:x", "localhosts", "1.2.3"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="not an address"):
        parse_address(text, remote=True)


@pytest.mark.parametrize("text", ["0.0.0.0", "10.0.0.1:9464", "[::]:9464", "[::ffff:10.0.0.1]"])
def test_other_hosts_only_when_told(text: str) -> None:
    with pytest.raises(UsageError, match="other hosts"):
        parse_address(text, remote=False)
    assert parse_address(text, remote=True)
