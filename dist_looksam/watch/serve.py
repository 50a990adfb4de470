"""The server of the page: only for this machine, only for who has its address, and read-only."""

import json
import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..errors import ConfigError
from .board import Board, page

HOST = "127.0.0.1"
FIRST_PORT, _TRIED = 8765, 20
_LOCAL = {"127.0.0.1", "localhost", "::1"}  # with ssh -L, any port of these
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the rest stands in the page
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Server(ThreadingHTTPServer):
    """Serves a board at `address`, whose path is a secret: all users of a machine share its
    loopback. ConfigError where the port is taken; without `port`, the first free one is."""

    daemon_threads = True

    def __init__(self, board: Board, port: int | None) -> None:
        self.board = board
        self.key = secrets.token_urlsafe(16)
        ports = range(FIRST_PORT, FIRST_PORT + _TRIED) if port is None else [port]
        for tried in ports:
            try:
                super().__init__((HOST, tried), _Handler)
                break
            except OSError as error:
                reason = error.strerror
        else:
            raise ConfigError(
                f"port must be free, got {ports[0]} ({reason}); name another with --port."
            )

    @property
    def address(self) -> str:
        """Of the page."""
        return f"http://{HOST}:{self.server_port}/{self.key}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 20
    server_version, sys_version = "dist-looksam", ""

    def do_GET(self) -> None:
        # A page of another site, whose name was made to mean 127.0.0.1, would ask under that name.
        if _host_name(self.headers.get("Host", "")) not in _LOCAL:
            return self._send(403, "text/plain", "Ask for 127.0.0.1 or localhost.\n")
        asked = urlsplit(self.path)
        _, key, name, *more = [*asked.path.split("/"), "", ""]
        if not secrets.compare_digest(key.encode(), self.server.key.encode()) or any(more):
            return self._send(404, "text/plain", "Not the address that the command printed.\n")
        if name == "":
            return self._send(200, "text/html", page(self.server.board.answer() | {"live": True}))
        if name == "data":
            query = {n: v[-1] for n, v in parse_qs(asked.query).items()}
            answer = self.server.board.answer(query.get("version", ""), query.get("shape", ""))
            return self._send(200, "application/json", json.dumps(answer, allow_nan=False))
        return self._send(404, "text/plain", "No such page.\n")

    def _send(self, code: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: the terminal shows the address."""


def _host_name(header: str) -> str | None:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None
