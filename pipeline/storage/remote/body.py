"""Streams of a remote file's bytes. Every response of a server is checked before its bytes are used."""

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
"""Minimum bytes per `STALL_SECONDS` (1 KiB/s); a slower transfer has stalled."""
HAND_OVER_SECONDS = 5.0
"""Seconds after which an incomplete piece is returned, so that processes waiting for the file see it grow."""
OBJECT_RATE = 128 << 10
"""Rate in bytes/s. Without progress reports, a request may take `STALL_SECONDS` plus size / rate."""
_READ = 256 << 10  # maximum bytes per read from a connection
_PAGE = re.compile(rb"\s*<(!doctype|html|head|body|\?xml|error)", re.IGNORECASE)


@dataclass
class ServerFacts:
    """Properties of a server, determined from its responses."""

    url: str
    """URL of the set's folder."""
    sends_ranges: bool | None = None
    """Whether the server supports range requests; None: not known yet."""


class Body(abc.ABC):
    """A stream of the bytes [start, stop) of one file; `stop` None: to the end of the file."""

    received = 0
    """Number of bytes received so far."""

    def __init__(self, stop: int | None) -> None:
        self.stop = stop

    @abc.abstractmethod
    def start(self, size: int) -> concurrent.futures.Future[bytes]:
        """Start to read the next `size` bytes; fewer if the response ends or is interrupted before."""

    def extra_seconds(self, size: int) -> float:
        """Return the seconds, beyond `STALL_SECONDS`, that `size` bytes may take without an update of `received`."""
        return 0.0

    def close(self) -> None:  # noqa: B027 - by default there is nothing to release
        """Release the connection."""


class WebBody(Body):
    """The response of a web server to one request in fsspec's session.

    Args:
        last: if the server ignores the range and sends the complete file, read it up to this offset and skip the bytes
            before `start`. None: accept a complete file only if `start` is 0.
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
        self._head = b""  # first bytes of the body, read by `_check_whole`

    def start(self, size: int) -> concurrent.futures.Future[bytes]:
        return asyncio.run_coroutine_threadsafe(self._read(size), self._fs.loop)

    def close(self) -> None:
        if self._response is not None:
            # aiohttp keeps the connection for other requests if the body was read to its end, else closes it.
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
                raise  # otherwise return the part of the piece that was received
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
        """Check status and headers, and skip bytes that were not requested.

        Raises:
            BadAnswer: another request may succeed.
            RemoteError, OSError: another request would fail too.
        """
        hops = [each.url.scheme for each in (*response.history, response)]
        if hops[0] == "https" and set(hops) != {"https"}:
            raise RemoteError(
                f"{redact(self._url)}: the server redirects from https:// to http://, which is not secure; correct the "
                "URL or the redirect"
            )
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
                found = response.headers.get("Content-Range", "none")
                raise BadAnswer(f"requested bytes from {self._start:,}, got Content-Range: {found[:60]}")
            self._facts.sends_ranges = True
        elif status == 200:
            await self._check_whole(response)
        elif 400 <= status < 500 and status not in (408, 416, 425, 429):
            raise RemoteError(
                f"{redact(self._url)}: the server answered with status {status} {response.reason}; check the URL and "
                "the configuration of the server"
            )
        else:
            raise BadAnswer(f"status {status} {response.reason}")

    async def _check_whole(self, response: aiohttp.ClientResponse) -> None:
        self._head = await response.content.read(1024)
        self.received += len(self._head)
        if _PAGE.match(self._head):
            raise BadAnswer("got a web page instead of the file (maintenance or login page?)")
        if self.stop is None:
            return
        # Content-Length of a compressed response is not the length of the file.
        length = None if "Content-Encoding" in response.headers else response.content_length
        expected = max(self.stop, self._last or 0)
        if length is not None and length < expected:
            raise BadAnswer(f"got a file of {length:,} bytes, but the manifest requires at least {expected:,}")
        # Status 200 is also a valid answer of a server with range support if all bytes of the file were requested.
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
                raise BadAnswer(f"the response ends before byte {self._start:,}, the first one requested")
            left -= len(some)


class ObjectBody(Body):
    """A file of an fsspec file system other than the web's (s3://, gs://, ...), read by one range request per piece."""

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
            content = b""  # s3fs reports an unsatisfiable range as EINVAL
        if len(content) < size:
            found = await self._size()
            if found < self.stop:
                raise RemoteError(too_short(self._fs.unstrip_protocol(self._path), self.stop, found))
            raise BadAnswer(f"requested {size:,} bytes from {self._at:,}, got {len(content):,}")
        content = bytes(content[:size])
        self._at += size
        self.received += size
        return content

    async def _size(self) -> int:
        size = (await self._call("info", self._path)).get("size")
        if size is None:
            raise RemoteError(
                f"{redact(self._path)}: this file system of fsspec does not report file sizes and is not supported"
            )
        return int(size)

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the file system. Blocks unless the file system is asynchronous."""
        if self._is_async:
            return await getattr(self._fs, f"_{method}")(*args, **kwargs)
        return getattr(self._fs, method)(*args, **kwargs)


def _in_thread(work: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Run a call that may block forever in a daemon thread, which does not delay the exit of the process."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # prevents cancellation, after which set_result would raise

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="remote-read").start()
    return future
