"""The bytes of a file as they arrive from a server: every answer is checked before its bytes are used."""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import errno
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.storage.remote.errors import BadAnswer, NoRanges, RemoteError, no_ranges, too_short
from shards.redact import redact

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

STALL_SECONDS = 30.0
STALL_BYTES = 30 << 10
"""A transfer that brings less than this in `STALL_SECONDS` (1 KiB/s) has stalled."""
HAND_OVER_SECONDS = 5.0
"""A piece of a slow transfer is handed over before it is full, so that others see the file grow."""
OBJECT_RATE = 128 << 10
"""Bytes/s. File systems that do not say how far a transfer is have `STALL_SECONDS` and this rate for each request."""
_READ = 256 << 10  # bytes taken from a connection at once
_PAGE = re.compile(rb"\s*<(!doctype|html|head|body|\?xml|error)", re.IGNORECASE)


@dataclass
class ServerFacts:
    """Properties of a server, as its answers show them."""

    url: str
    """Of the set's folder."""
    sends_ranges: bool | None = None
    """Whether it sends parts of files; None = not known yet."""


class Body(abc.ABC):
    """The bytes [start, stop) of one file, as they arrive; `stop` None = to its end."""

    received = 0
    """Bytes so far."""

    def __init__(self, stop: int | None) -> None:
        self.stop = stop

    @abc.abstractmethod
    def start(self, size: int) -> concurrent.futures.Future[bytes]:
        """Begin to read the next bytes: `size`, or fewer where the answer ends or breaks off."""

    def extra_seconds(self, size: int) -> float:
        """Seconds that `size` bytes may take beyond `STALL_SECONDS` where `received` says nothing meanwhile."""
        return 0.0

    def close(self) -> None:  # noqa: B027 - by default there is nothing to release
        """Release the connection."""


class WebBody(Body):
    """An answer of a web server, from one request by fsspec's own session.

    Args:
        last: if the server sends the whole file instead of a part, take it up to here, and skip what is before `start`.
            None = take it only from its beginning.
    """

    def __init__(
        self,
        facts: ServerFacts,
        fs: Any,
        url: str,
        start: int,
        stop: int | None,
        *,
        last: int | None = None,
    ) -> None:
        super().__init__(stop)
        self._facts, self._fs, self._url = facts, fs, url
        self._start, self._last = start, last
        self._response: aiohttp.ClientResponse | None = None
        self._head = b""  # of the body, read already

    def start(self, size: int) -> concurrent.futures.Future[bytes]:
        return asyncio.run_coroutine_threadsafe(self._read(size), self._fs.loop)

    def close(self) -> None:
        if self._response is not None:
            # A connection whose body was read to its end is kept for other requests; any other one is closed.
            self._fs.loop.call_soon_threadsafe(self._response.close)

    async def _read(self, size: int) -> bytes:
        content = bytearray()
        try:
            response = self._response or await self._open()
            hand_over = time.monotonic() + HAND_OVER_SECONDS
            while len(content) < size and (some := await self._some(response, size - len(content))):
                content += some
                if len(content) >= STALL_BYTES and time.monotonic() > hand_over:
                    break
        except Exception:
            if self.stop is None or len(content) < STALL_BYTES:
                raise  # what has come of a piece is worth keeping, but not a few bytes at a time
        return bytes(content)

    async def _some(self, response: aiohttp.ClientResponse, size: int) -> bytes:
        if self._head:
            some, self._head = self._head[:size], self._head[size:]
            return some
        some = await response.content.read(min(size, _READ))
        self.received += len(some)
        return some

    async def _open(self) -> aiohttp.ClientResponse:
        import aiohttp

        options = dict(self._fs.kwargs)
        headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
        if self.stop is not None:
            headers["Range"] = f"bytes={self._start}-{self.stop - 1}"
        options.setdefault("timeout", aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS))
        session = await self._fs.set_session()
        self._response = await session.get(self._fs.encode_url(self._url), headers=headers, **options)
        await self._check(self._response)
        return self._response

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        """Check status and headers, and skip what was not asked for.

        Raises:
            BadAnswer: another request may be answered.
            RemoteError, OSError: none will be.
        """
        hops = [each.url.scheme for each in (*response.history, response)]
        if hops[0] == "https" and set(hops) != {"https"}:
            raise RemoteError(f"{redact(self._url)}: redirects from https:// to http://; refused: not the same server")
        status = response.status
        if status in (404, 410):
            raise FileNotFoundError(f"status {status}")
        if status in (401, 403, 407):
            raise PermissionError(f"status {status} {response.reason}")
        span = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if status in (206, 416) and span and span[3] != "*" and self.stop is not None and int(span[3]) < self.stop:
            raise RemoteError(too_short(self._url, self.stop, int(span[3])))
        if status == 206 and self.stop is not None:
            if span is None or span[1] is None or int(span[1]) != self._start:
                said = response.headers.get("Content-Range", "no range")
                raise BadAnswer(f"{said[:60]} where byte {self._start:,} and those after it were asked for")
            self._facts.sends_ranges = True
        elif status == 200:
            await self._check_whole(response)
        elif 400 <= status < 500 and status not in (408, 416, 425, 429):
            raise RemoteError(f"{redact(self._url)}: status {status} {response.reason}; check the URL and the server")
        else:
            raise BadAnswer(f"status {status} {response.reason}")

    async def _check_whole(self, response: aiohttp.ClientResponse) -> None:
        self._head = await response.content.read(1024)
        self.received += len(self._head)
        if _PAGE.match(self._head):
            raise BadAnswer("a web page in place of the file (maintenance, or a login?)")
        if self.stop is None:
            return
        # Of a compressed answer, which was not asked for, the length says nothing.
        length = None if "Content-Encoding" in response.headers else response.content_length
        expected = max(self.stop, self._last or 0)
        if length is not None and length < expected:
            raise BadAnswer(f"a file of {length:,} bytes where the manifest says {expected:,} or more")
        # A server that knows ranges may answer a request for all bytes of a file in this way too.
        if self._start > 0 or (length is not None and length > self.stop):
            self._facts.sends_ranges = False
        if self._last is not None:
            self.stop = self._last
        elif self._start > 0:
            raise NoRanges(no_ranges(self._facts.url))
        left = self._start
        while left:
            some = await self._some(response, left)
            if not some:
                raise BadAnswer(f"the file ends before byte {self._start:,}")
            left -= len(some)


class ObjectBody(Body):
    """A file of another file system of fsspec, read range by range."""

    def __init__(self, fs: Any, path: str, start: int, stop: int | None) -> None:
        super().__init__(stop)
        self._fs, self._path, self._at = fs, path, start
        self._is_async = getattr(fs, "async_impl", False)

    def start(self, size: int) -> concurrent.futures.Future[bytes]:
        if self._is_async:
            return asyncio.run_coroutine_threadsafe(self._read(size), self._fs.loop)
        return _in_thread(lambda: asyncio.run(self._read(size)))

    def extra_seconds(self, size: int) -> float:
        return size / OBJECT_RATE

    async def _read(self, size: int) -> bytes:
        if self.stop is None:
            self.stop = await self._size()
        size = min(size, self.stop - self._at)
        if size <= 0:
            return b""
        try:
            content = await self._call("cat_file", self._path, start=self._at, end=self._at + size)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            content = b""  # as s3fs says that a range is not satisfiable
        if len(content) < size:
            found = await self._size()
            if found < self.stop:
                raise RemoteError(too_short(self._fs.unstrip_protocol(self._path), self.stop, found))
            raise BadAnswer(f"{len(content):,} bytes from byte {self._at:,} on; more were asked for")
        content = bytes(content[:size])
        self._at += size
        self.received += size
        return content

    async def _size(self) -> int:
        size = (await self._call("info", self._path)).get("size")
        if size is None:
            raise RemoteError(f"{redact(self._path)}: this file system does not tell the size of a file")
        return int(size)

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the file system, which blocks unless the file system is asynchronous."""
        if self._is_async:
            return await getattr(self._fs, f"_{method}")(*args, **kwargs)
        return getattr(self._fs, method)(*args, **kwargs)


def _in_thread(work: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Run a call that may block forever in a daemon thread, which does not delay the exit."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # cannot be cancelled any more: its result may be set at any time

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="remote-read").start()
    return future
