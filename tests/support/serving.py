"""A web server for one folder, with range requests, a log of requests, and injected faults."""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Site:
    """Configuration and log of the server."""

    folder: Path
    url: str = ""
    log: list[tuple[str, int, int]] = field(default_factory=list)
    """(file, start, stop) of every answered GET."""
    supports_ranges: bool = True
    before: Callable[[str, int, int], None] = lambda name, start, stop: None
    """Called before a response is sent; may block."""
    damage: Counter[str] = field(default_factory=Counter)
    """File -> number of responses in which a bit will be flipped."""
    failures: Counter[str] = field(default_factory=Counter)
    """File -> number of requests that will be answered with status 503."""
    instead: Callable[[BaseHTTPRequestHandler, str, bytes], bool] = lambda handler, name, content: False
    """Called with the handler, the file and its content; returns whether it has answered the request."""
    tls: ssl.SSLContext | None = None
    """Serve https:// with this context."""
    sent: int = 0
    """Bytes of all bodies that were written to the network."""

    def whole_reads(self) -> Counter[str]:
        """Return how often each file was read completely by one request."""
        return Counter(
            name for name, start, stop in self.log if start == 0 and stop == (self.folder / name).stat().st_size
        )

    def bytes_read(self, name: str) -> int:
        return sum(stop - start for file, start, stop in self.log if file == name)


@contextmanager
def serve(folder: Path, *, address: str = "127.0.0.1", **options: Any) -> Iterator[Site]:
    """Serve a folder at `site.url` while the block runs."""
    site = Site(folder, **options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client may close the connection
                super().handle()

        def do_GET(self) -> None:
            # A small buffer, so that bytes that the client does not read are not counted as sent.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            name = self.path.lstrip("/").partition("/")[2]
            path = site.folder / name
            if not path.is_file():
                return self._answer(404, b"", {})
            if site.failures[name] > 0:
                site.failures[name] -= 1
                return self._answer(503, b"", {})
            content = path.read_bytes()
            if site.instead(self, name, content):
                return None
            status, start, stop, headers = 200, 0, len(content), {}
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and site.supports_ranges:
                status, start, stop = 206, int(asked[1]), min(int(asked[2]) + 1, len(content))
                headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            site.before(name, start, stop)
            site.log.append((name, start, stop))
            body = bytearray(content[start:stop])
            if site.damage[name] > 0:
                site.damage[name] -= 1
                body[len(body) // 2] ^= 1
            self._answer(status, bytes(body), headers)

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), "Accept-Ranges": "bytes", **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            send(self, body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    def send(handler: Handler, body: bytes) -> None:
        try:
            for at in range(0, len(body), 1 << 16):
                site.sent += handler.wfile.write(body[at : at + (1 << 16)])
        except OSError:
            handler.close_connection = True

    server = ThreadingHTTPServer((address, 0), Handler)
    server.daemon_threads = True
    if site.tls is not None:
        server.socket = site.tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    site.url = f"http{'s' if site.tls else ''}://{address}:{server.server_address[1]}/the-set"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
