"""The console in a browser: a page and a terminal for who has the token, 403 for everybody else, loopback alone."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from sectool.errors import UsageError
from tui.serve import ConsoleServer, listen

DEADLINE_S = 90.0


@pytest.mark.parametrize(
    "address", ["0.0.0.0:0", "10.0.0.1:80", "[::]:0", "example.org:80", "x", "1:2:3:4", ":99999"]
)
def test_elsewhere_is_refused(address: str) -> None:
    with pytest.raises(UsageError):
        listen(address)


def test_the_page_and_the_terminal_are_for_who_has_the_token(folder: Path) -> None:
    async def play() -> None:
        with listen("127.0.0.1:0") as sock:
            server = ConsoleServer(["top", "--store", str(folder)], sock)
            runner = web.AppRunner(await server._make_app(), access_log=None)
            await runner.setup()
            await web.SockSite(runner, sock).start()
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await look(server)
            finally:
                await runner.cleanup()
                gc.collect()  # textual-serve leaves its program's pipes to it, and they want the loop
                await asyncio.sleep(0)

    async def look(server: ConsoleServer) -> None:
        origin = server.public_url
        base = origin + server.gate.place.rstrip("/")
        ours = {"Origin": origin}
        async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as browser:
            for path in ("/", "/?token=", "/?token=guessed", "/ws", "/static/js/textual.js", "/download/x"):
                for where in (origin, base):
                    async with browser.get(where + path) as answer:
                        assert answer.status == 403, path
                        assert server.gate.place not in await answer.text()
            async with browser.get(server.address, headers={"Host": "evil.example"}) as answer:
                assert answer.status == 403
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await browser.ws_connect(f"{base}/ws", headers=ours)

            address = server.address
            async with browser.get(address) as answer:
                assert answer.status == 200
                assert "token" not in str(answer.url)
                assert not browser.cookie_jar.filter_cookies(
                    URL(origin)
                )  # other ports of this host never see it
                page = await answer.text()
                assert f'"ws://127.0.0.1:{server.port}{server.gate.place}ws"' in page
                assert "https://" not in page  # it asks nobody else
                assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
            async with aiohttp.ClientSession() as another, another.get(address) as answer:
                assert answer.status == 403
            for file in ("js/textual.js", "css/xterm.css"):
                async with browser.get(f"{base}/static/{file}") as answer:
                    assert answer.status == 200, file

            with pytest.raises(aiohttp.WSServerHandshakeError):
                await browser.ws_connect(f"{base}/ws", headers={"Origin": "http://evil.example"})
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await browser.ws_connect(f"{base}/ws")
            async with browser.ws_connect(f"{base}/ws?width=100&height=30", headers=ours) as terminal:
                seen = b""
                while b"stored files" not in seen:
                    message = await terminal.receive()
                    assert message.type in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT), message
                    seen += message.data if isinstance(message.data, bytes) else b""
                await terminal.send_json(["stdin", "q"])

    asyncio.run(play())


def test_the_command_prints_the_address_and_tells_the_token_to_nobody_else(folder: Path) -> None:
    command = [sys.executable, "-m", "sectool", "top", "--serve", "--store", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as served:
        try:
            assert served.stdout is not None
            address = served.stdout.readline().strip()
            token = address.partition("?token=")[2]
            assert address.startswith("http://127.0.0.1:")
            assert len(token) > 40
            for place in ("cmdline", "environ"):
                assert token.encode() not in Path(f"/proc/{served.pid}/{place}").read_bytes()
        finally:
            served.terminate()
            _, said = served.communicate(timeout=DEADLINE_S)
        assert token not in said
        assert "counts once" in said


def test_a_browser_cannot_be_sent_to_another_address(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sectool",
        "top",
        "--serve",
        "--listen",
        "0.0.0.0:0",
        "--store",
        str(folder),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"}, check=False
    )
    assert done.returncode == 2
    assert "ssh -L" in done.stderr
    assert not done.stdout
