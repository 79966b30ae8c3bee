"""Files of a folder on a web server or in an object store, by fsspec.

Every answer is checked before its bytes are used, and no more is read than was asked for. What may pass (a server that
restarts, a transfer that breaks off or stalls, a maintenance page) is repeated for `RETRY_SECONDS`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import ipaddress
import logging
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

from pipeline.storage.files import Interrupted
from shards.errors import UserError, first_line
from shards.files.retry import WarningThrottle
from shards.files.waiting import SILENT_SECONDS
from shards.redact import redact

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = 60.0
"""How long requests are repeated without progress."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds between two requests; doubled every time
STALL_SECONDS = 30.0
STALL_BYTES = 30 << 10
"""A transfer that brings less than this in `STALL_SECONDS` (1 KiB/s) has stalled."""
HAND_OVER_SECONDS = 5.0
"""A piece of a slow transfer is handed over before it is full, so that others see the file grow."""
OBJECT_RATE = 128 << 10
"""Bytes/s. File systems that do not say how far a transfer is have `STALL_SECONDS` and this rate for each request."""
PIECE = 8 << 20  # bytes asked for, and handed over, at once
_READ = 256 << 10  # bytes taken from a connection at once
_POLL_SECONDS = 0.1
_PAGE = re.compile(rb"\s*<(!doctype|html|head|body|\?xml|error)", re.IGNORECASE)
_CREDENTIAL_HELP = (
    "credentials come from the environment (AWS_* for s3://), the configuration of fsspec (~/.config/fsspec/) or, for "
    "http(s)://, ~/.netrc"
)
# Names of botocore's errors for missing credentials, so that botocore need not be imported.
_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "NoAuthTokenError",
    "TokenRetrievalError",
    "SSOTokenLoadError",
    "UnauthorizedSSOTokenError",
    "ProfileNotFound",
)


class RemoteError(UserError):
    """A server that cannot be used, or lacks a file of the set."""


class ServerFailed(RemoteError):
    """A server that failed for `RETRY_SECONDS`; a later start may succeed."""

    exit_code = 1


class NoRanges(RemoteError):
    """A server that answers a request for a part of a file with the whole file."""


class _BadAnswer(Exception):
    """An answer without the bytes that were asked for; the next one may have them."""


def is_remote(location: object) -> bool:
    """Whether a set's location is a URL."""
    return "://" in str(location)


def check_url(url: str) -> None:
    """Reject a URL that carries credentials: it would end up in recipe.json, in logs and in lists of processes.

    Raises:
        UserError: a password, a user of a web server (often a token), or a query (such as a signature).
    """
    for part in url.split("::"):
        try:
            split = urlsplit(part)
            secret = split.password is not None or (split.scheme in ("http", "https") and split.username is not None)
        except ValueError as error:
            raise UserError(f"{redact(url)}: not a URL ({redact(str(error))})") from None
        if secret:
            raise UserError(f"{redact(url)}: credentials in the URL; give it without them: {_CREDENTIAL_HELP}")
        if split.query or split.fragment:
            raise UserError(
                f"{redact(part.partition('#')[0])}: a query (?...) or fragment (#...) in the URL of a folder; "
                f"give it without: {_CREDENTIAL_HELP}; a digest is pinned by #xxh3=HEX or #sha256=HEX"
            )


def warn_without_tls(url: str) -> None:
    """Log a warning if others on the network can read and change the data."""
    split = urlsplit(url.rpartition("::")[2])
    if split.scheme == "http" and not _is_this_machine(split.hostname or ""):
        log.warning(
            "%s: http without TLS: others on the network can read and change what is sent; hashes notice damage, not "
            "an attacker; use https://",
            redact(url),
        )


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@dataclass
class ServerFacts:
    """Properties of a server, as its answers show them."""

    sends_ranges: bool | None = None
    """Whether it sends parts of files; None = not known yet."""


class Remote:
    """A folder behind a URL that fsspec knows (s3://bucket/set, https://host/set, gs://, ...). Thread-safe.

    Args:
        facts: shared with others of the same URL.

    Raises:
        UserError: the URL carries credentials, its protocol is unknown, or a package for it is not installed.
    """

    def __init__(self, url: str, facts: ServerFacts | None = None) -> None:
        import fsspec

        check_url(url)
        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **_web_options(self.url))
        except ImportError as error:
            raise UserError(f"{self.url}: {error}; install it with: pip install 'fat-pipeline[remote]'") from error
        except ValueError as error:
            raise UserError(f"{self.url}: {error}; s3://, https:// and others that fsspec knows are read") from error
        self._is_web = _is_web(self._fs)
        self._interrupted = threading.Event()
        self._retrying, self._waiting = WarningThrottle(), WarningThrottle()
        self.facts = facts or ServerFacts()
        if not self._is_web:
            self.facts.sends_ranges = True
        self._asking = threading.Lock()

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of a file that has them.

        Raises:
            NoRanges: the server sends whole files only, and this is not the beginning of one.
            RemoteError: the file is not there, ends before, or may not be read.
            ServerFailed: the server failed for `RETRY_SECONDS`.
            Interrupted: `interrupt` was called.
        """
        return b"".join(self.pieces(name, start, stop))

    def pieces(self, name: str, start: int, stop: int, *, whole: bool = False) -> Iterator[bytes]:
        """Yield bytes [start, stop) of a file in consecutive pieces of at most `PIECE` bytes.

        A transfer that breaks off is resumed behind the last piece.

        Args:
            whole: of a server that sends whole files only, take one, and skip what is before `start`.

        Raises:
            What `read` raises.
        """
        patience, at = _Patience(self, name), start
        body: _Body | None = None
        try:
            while at < stop:
                try:
                    if body is None:
                        body = self._body(name, at, min(at + PIECE, stop), last=stop if whole else None)
                    assert body.stop is not None
                    piece = self._run(body, min(PIECE, body.stop - at), name)
                    if not piece:
                        raise _BadAnswer(f"the answer ends at byte {at:,} of {body.stop:,}")
                except Exception as error:
                    if body is not None:
                        body.close()
                    body = None
                    patience.failed(error)
                    continue
                patience.progress()
                at += len(piece)
                if at == body.stop:
                    body.close()
                    body = None
                yield piece
        finally:
            if body is not None:
                body.close()

    def read_all(self, name: str, limit: int) -> bytes:
        """Return a whole file of at most `limit` bytes.

        Raises:
            RemoteError: it has more; otherwise what `read` raises.
        """
        patience = _Patience(self, name)
        while True:
            body = self._body(name, 0, None)
            content = bytearray()
            try:
                while len(content) <= limit and (piece := self._run(body, min(PIECE, limit + 1 - len(content)), name)):
                    content += piece
                break
            except Exception as error:
                patience.failed(error)
            finally:
                body.close()
        if len(content) > limit:
            raise RemoteError(
                f"{redact(self.url)}/{name}: more than {limit:,} bytes, the limit of such a file; check the URL"
            )
        return bytes(content)

    def has_ranges(self, name: str) -> bool:
        """Return whether the server sends parts of files; asks for a byte of a file where that is not known yet."""
        if self.facts.sends_ranges is None:
            with self._asking:  # one request, even from several threads
                if self.facts.sends_ranges is None:
                    with contextlib.suppress(NoRanges):
                        self.read(name, 1, 2)
        return self.facts.sends_ranges is not False

    def interrupt(self) -> None:
        """Make current and later calls raise `Interrupted`."""
        self._interrupted.set()

    def _body(self, name: str, start: int, stop: int | None, *, last: int | None = None) -> _Body:
        path = f"{self._root}/{name}"
        if self._is_web:
            return _WebBody(self, self._fs, path, start, stop, last=last)
        return _Object(self._fs, path, start, stop)

    def _run(self, body: _Body, size: int, name: str) -> bytes:
        """Read from a body, and stop waiting when it makes no progress."""
        if self._interrupted.is_set():
            raise Interrupted
        begun = moved = time.monotonic()
        before = received = body.received
        task = body.start(size)
        patience = STALL_SECONDS + body.extra_seconds(size)
        try:
            while True:
                concurrent.futures.wait([task], timeout=_POLL_SECONDS)
                if task.done():
                    return task.result()
                if self._interrupted.is_set():
                    raise Interrupted
                now = time.monotonic()
                if body.received - received >= STALL_BYTES:
                    moved, received = now, body.received
                if now - moved > patience:
                    raise _BadAnswer(f"stalled: {body.received - received:,} bytes in {now - moved:.0f} s")
                if now - begun > SILENT_SECONDS and self._waiting.due():
                    log.warning(
                        "%s/%s: %s of %s bytes after %.0f s; a transfer of less than %s bytes in %.0f s is repeated",
                        redact(self.url),
                        name,
                        f"{body.received - before:,}",
                        f"{size:,}",
                        now - begun,
                        f"{STALL_BYTES:,}",
                        patience,
                    )
        finally:
            task.cancel()


class _Patience:
    """Decides whether a failed request for a file is repeated, and for how long."""

    def __init__(self, remote: Remote, name: str) -> None:
        self._remote, self._where = remote, f"{redact(remote.url)}/{name}"
        self.progress()

    def progress(self) -> None:
        """Note that bytes have arrived."""
        self._since, self._failures, self._pause = time.monotonic(), 0, FIRST_PAUSE

    def failed(self, error: Exception) -> None:
        """Sleep before the next request, or raise.

        Raises:
            RemoteError: another request would meet the same.
            ServerFailed: no progress for `RETRY_SECONDS`.
            Interrupted: see `Remote.interrupt`.
        """
        if isinstance(error, Interrupted | RemoteError):
            raise error
        if final := _final(error):
            raise RemoteError(f"{self._where}: {final}") from error
        self._failures += 1
        reason = _reason(error)
        spent = time.monotonic() - self._since
        if spent >= RETRY_SECONDS:
            raise ServerFailed(
                f"{self._where}: failed {self._failures} times in {spent:.0f} s, the last time with {reason}; "
                "check the server, and run the same command again: what was fetched is kept"
            ) from error
        level = logging.WARNING if self._remote._retrying.due() else logging.INFO
        log.log(level, "%s: %s; asking again for at most %.0f s", self._where, reason, RETRY_SECONDS - spent)
        # Random, so that the ranks of a job do not all repeat their requests at once.
        pause = min(self._pause * random.uniform(0.5, 1.0), RETRY_SECONDS - spent)
        if self._remote._interrupted.wait(pause):
            raise Interrupted from error
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


class _Body:
    """The bytes [start, stop) of one file, as they arrive; `stop` None = to its end."""

    received = 0
    """Bytes so far."""

    def __init__(self, stop: int | None) -> None:
        self.stop = stop

    def start(self, size: int) -> concurrent.futures.Future[bytes]:
        """Begin to read the next bytes: `size`, or fewer where the answer ends or breaks off."""
        raise NotImplementedError

    def extra_seconds(self, size: int) -> float:
        """Seconds that `size` bytes may take beyond `STALL_SECONDS` where `received` says nothing meanwhile."""
        return 0.0

    def close(self) -> None:
        """Release the connection."""


class _WebBody(_Body):
    """An answer of a web server, from one request by fsspec's own session.

    Args:
        last: if the server sends the whole file instead of a part, take it up to here, and skip what is before `start`.
            None = take it only from its beginning.
    """

    def __init__(
        self, remote: Remote, fs: Any, url: str, start: int, stop: int | None, *, last: int | None = None
    ) -> None:
        super().__init__(stop)
        self._remote, self._fs, self._url, self._start, self._last = remote, fs, url, start, last
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
            _BadAnswer: another request may be answered.
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
            raise RemoteError(_too_short(self._url, self.stop, int(span[3])))
        if status == 206 and self.stop is not None:
            if span is None or span[1] is None or int(span[1]) != self._start:
                said = response.headers.get("Content-Range", "no range")
                raise _BadAnswer(f"{said[:60]} where byte {self._start:,} and those after it were asked for")
            self._remote.facts.sends_ranges = True
        elif status == 200:
            await self._check_whole(response)
        elif 400 <= status < 500 and status not in (408, 416, 425, 429):
            raise RemoteError(f"{redact(self._url)}: status {status} {response.reason}; check the URL and the server")
        else:
            raise _BadAnswer(f"status {status} {response.reason}")

    async def _check_whole(self, response: aiohttp.ClientResponse) -> None:
        self._head = await response.content.read(1024)
        self.received += len(self._head)
        if _PAGE.match(self._head):
            raise _BadAnswer("a web page in place of the file (maintenance, or a login?)")
        if self.stop is None:
            return
        # Of a compressed answer, which was not asked for, the length says nothing.
        length = None if "Content-Encoding" in response.headers else response.content_length
        expected = max(self.stop, self._last or 0)
        if length is not None and length < expected:
            raise _BadAnswer(f"a file of {length:,} bytes where the manifest says {expected:,} or more")
        # A server that knows ranges may answer a request for all bytes of a file in this way too.
        if self._start > 0 or (length is not None and length > self.stop):
            self._remote.facts.sends_ranges = False
        if self._last is not None:
            self.stop = self._last
        elif self._start > 0:
            raise NoRanges(no_ranges(self._remote.url))
        left = self._start
        while left:
            some = await self._some(response, left)
            if not some:
                raise _BadAnswer(f"the file ends before byte {self._start:,}")
            left -= len(some)


class _Object(_Body):
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
                raise RemoteError(_too_short(self._fs.unstrip_protocol(self._path), self.stop, found))
            raise _BadAnswer(f"{len(content):,} bytes from byte {self._at:,} on; more were asked for")
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


def no_ranges(url: str) -> str:
    """Return the message for a server that sends whole files where parts are needed."""
    return (
        f"{redact(url)}: this server ignores Range requests and sends whole files; give a cache with room for them "
        "(--cache DIR, --cache-size GIB), or serve the set by another server, such as nginx"
    )


def _too_short(url: str, expected: int, found: int) -> str:
    return (
        f"{redact(url)}: {expected:,} bytes or more expected by the manifest, {found:,} there: truncated; "
        "copy it there again"
    )


def _final(error: BaseException) -> str | None:
    """Return a message for a permanent error, or None for a transient one. No other code classifies these errors."""
    for cause in _chain(error):
        fact = getattr(cause, "verify_message", None)  # aiohttp's own error of this kind has none, but its cause has
        if isinstance(cause, ssl.SSLCertVerificationError) and fact:
            return (
                f"its certificate is not trusted ({fact}); name the authority "
                "that signed it in SSL_CERT_FILE (for s3:// in AWS_CA_BUNDLE)"
            )
        if type(cause).__name__ in _NO_CREDENTIALS:
            return f"{_reason(cause)}; {_CREDENTIAL_HELP}"
    if isinstance(error, PermissionError):
        return f"access denied ({_reason(error)}); {_CREDENTIAL_HELP}"
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return f"not there ({_reason(error)}); check the URL"
    kind = {each.__name__ for each in type(error).__mro__}
    if "RedirectClientError" in kind:
        return f"redirects to another kind of address ({_reason(error)}); refused"
    return f"not a URL ({_reason(error)})" if kind & {"InvalidURL", "NonHttpUrlClientError"} else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    text = redact(first_line(error))
    return text if isinstance(error, _BadAnswer) else f"{type(error).__name__}: {text}".rstrip(": ")


def _is_web(fs: Any) -> bool:
    try:
        from fsspec.implementations.http import HTTPFileSystem
    except ImportError:  # without aiohttp no file system is one
        return False
    return isinstance(fs, HTTPFileSystem)


def _web_options(url: str) -> dict[str, Any]:
    """Options for fsspec's web file system: use ~/.netrc and the proxies of the environment, if there are any."""
    import fsspec

    netrc = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if urlsplit(url).scheme not in ("http", "https") or not (netrc.exists() or getproxies_environment()):
        return {}
    configured = {**fsspec.config.conf.get("http", {}), **fsspec.config.conf.get("https", {})}.get("client_kwargs", {})
    return {"client_kwargs": {"trust_env": True, **configured}}


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
