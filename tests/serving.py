"""A web server for one folder, with ranges, a log of what was asked for, and faults on demand."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Site:
    """What is served, and how."""

    folder: Path
    url: str = ""
    log: list[tuple[str, int, int]] = field(default_factory=list)
    """(file, start, stop) of every answered GET."""
    knows_ranges: bool = True
    before: Callable[[str, int, int], None] = lambda name, start, stop: None
    """Called before an answer; may wait."""
    damage: Counter[str] = field(default_factory=Counter)
    """File -> how many of the next answers have a flipped bit."""
    failures: Counter[str] = field(default_factory=Counter)
    """File -> how many of the next answers are status 503."""

    def whole_reads(self) -> Counter[str]:
        """How often each file was read from its start to its end, in one request."""
        return Counter(
            name for name, start, stop in self.log if start == 0 and stop == (self.folder / name).stat().st_size
        )

    def bytes_read(self, name: str) -> int:
        return sum(stop - start for file, start, stop in self.log if file == name)


@contextmanager
def serve(folder: Path, **options: Any) -> Iterator[Site]:
    """Serve a folder at `site.url` while the block runs."""
    site = Site(folder, **options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.lstrip("/").partition("/")[2]
            path = site.folder / name
            if not path.is_file():
                return self._answer(404, b"", {})
            if site.failures[name] > 0:
                site.failures[name] -= 1
                return self._answer(503, b"", {})
            content = path.read_bytes()
            status, start, stop, headers = 200, 0, len(content), {}
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and site.knows_ranges:
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
            try:
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}/the-set"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
