"""`sectool top --serve`: the same console in a browser on this host, run by textual-serve, behind our own gate."""

from __future__ import annotations

import html
import ipaddress
import shlex
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web
from textual_serve.server import Server

from sectool.errors import SectoolError, UsageError
from tui.gate import COOKIE, Entry, Gate

MAX_TERMINALS = 8  # each is a program of its own
TITLE = "sectool top"
FONT = 15
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self'; connect-src 'self' ws:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
# textual-serve's own page asks a font of somebody else's server. This one asks nobody.
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<link rel="stylesheet" href="static/css/xterm.css">
<style>html, body {{ margin: 0; height: 100%; background: #0c181f; color: #cdd; font: 16px monospace; }}
.textual-terminal {{ width: 100vw; height: 100vh; }}
.over {{ display: none; padding: 2em; }} body.-closed .over {{ display: block; }}
body.-closed .textual-terminal {{ display: none; }}</style>
<script src="static/js/textual.js"></script></head>
<body><p class="over">The console has ended. <a style="color: inherit" href="./">Open it again</a></p>
<div id="terminal" class="textual-terminal" data-session-websocket-url="{socket}" data-font-size="{size}"></div>
</body></html>
"""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def listen(address: str) -> socket.socket:
    """A socket that listens at `HOST:PORT` or `PORT` (0: any that is free). UsageError unless it is this host alone."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    try:
        where = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
        number = int(port)
    except ValueError:
        raise UsageError(
            f"{address!r} is no address to listen at", "write 127.0.0.1:8000, [::1]:8000 or 8000"
        ) from None
    if not where.is_loopback:
        raise UsageError(
            f"the console is not served at {where}: whoever reaches it could change policy",
            "from elsewhere: ssh -L 8000:127.0.0.1:8000 HOST, and --listen 8000 there",
        )
    if not 0 <= number <= 65535:
        raise UsageError(f"{number} is no port", "0 takes any that is free")
    out = socket.socket(socket.AF_INET6 if where.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        out.bind((str(where), number))
        out.listen(16)
    except OSError as error:
        out.close()
        raise SectoolError(
            f"cannot listen at {where}:{number}: {error.strerror or error}", "--listen 0"
        ) from None
    return out


class ConsoleServer(Server):
    """Serves `sectool ARGS` (a console) to whom the gate admits."""

    def __init__(self, args: Sequence[str], sock: socket.socket) -> None:
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        command = shlex.join([sys.executable, "-m", "sectool", *args])
        super().__init__(command, host=shown, port=port, title=TITLE)
        self.gate = Gate(frozenset({f"{shown}:{port}", f"localhost:{port}"}))
        self.sock = sock
        self._terminals = 0

    @property
    def address(self) -> str:
        """What is opened in the browser, with the token."""
        return f"{self.public_url}/?token={self.gate.token}"

    async def _make_app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=1 << 16)
        app.add_routes(
            [
                web.get(self.gate.place, self.handle_index, name="index"),
                web.get(f"{self.gate.place}ws", self.handle_websocket, name="websocket"),
                web.static(f"{self.gate.place}static", self.statics_path, name="static"),
            ]
        )
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        entry = self.gate.enter(request.path, request.query, request.cookies, request.headers)
        if entry is Entry.REFUSED:
            text = "403: open the address that `sectool top --serve` has printed; its token counts once\n"
            return web.Response(status=403, text=text, headers=_HEADERS)
        if entry is Entry.ADMITTED:
            welcome = web.Response(status=303, headers={**_HEADERS, "Location": self.gate.place})
            welcome.set_cookie(
                COOKIE, self.gate.session, httponly=True, samesite="Strict", path=self.gate.place
            )
            return welcome
        return await handler(request)

    async def handle_index(self, request: web.Request) -> web.Response:
        """The page with the terminal."""
        socket_url = f"ws://{request.host}{self.gate.place}ws"
        page = _PAGE.format(title=html.escape(TITLE), socket=html.escape(socket_url), size=FONT)
        return web.Response(text=page, content_type="text/html", headers=_HEADERS)

    async def handle_websocket(self, request: web.Request) -> web.WebSocketResponse:
        """One terminal: a console of its own, which ends with it."""
        if request.headers.get("Origin") is None or self._terminals >= MAX_TERMINALS:
            raise web.HTTPForbidden(text="a terminal is opened by our own page, and not too many of them\n")
        self._terminals += 1
        try:
            return await super().handle_websocket(request)
        finally:
            self._terminals -= 1

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM. No request is logged: its line would tell the token."""
        web.run_app(self._make_app(), sock=self.sock, access_log=None, print=None)


def serve(args: Sequence[str], address: str) -> None:
    """Print where to look, and serve the console `sectool ARGS` there until Ctrl-C. Raises UsageError."""
    server = ConsoleServer(args, listen(address))
    sys.stderr.write(
        "Open this address in a browser on this host; it counts once. Ctrl-C ends the console.\n"
    )
    sys.stdout.write(f"{server.address}\n")
    sys.stdout.flush()
    server.run()
