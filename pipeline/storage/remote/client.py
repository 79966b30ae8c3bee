"""Read the files of a folder on a web server or in an object store through fsspec.

Every response is checked before its bytes are used, and only requested bytes are read. Requests that fail temporarily
(server restart, interrupted or stalled transfer, maintenance page) are repeated for `RETRY_SECONDS`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

from pipeline.storage.files import Interrupted
from pipeline.storage.remote.body import STALL_BYTES, STALL_SECONDS, Body, ObjectBody, ServerFacts, WebBody
from pipeline.storage.remote.errors import BadAnswer, NoRanges, RemoteError, ServerFailed, describe, permanent_failure
from pipeline.storage.remote.url import check_url
from shards.errors import UserError
from shards.files.retry import WarningThrottle
from shards.files.waiting import SILENT_SECONDS
from shards.redact import redact

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
"""Seconds without progress after which requests are no longer repeated."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds between two requests; doubled after each failure
PIECE = 8 << 20  # maximum bytes per request and per yielded piece
_POLL_SECONDS = 0.1


class Remote:
    """A folder at a URL that fsspec supports (s3://bucket/set, https://host/set, gs://, ...). Thread-safe.

    Args:
        facts: properties of the server, shared by all instances for the same URL.

    Raises:
        UserError: the URL contains credentials, its protocol is unknown, or a package for it is not installed.
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
            raise UserError(
                f"{self.url}: {error}; expected a URL that fsspec supports, such as https://host/set or s3://bucket/set"
            ) from error
        self._is_web = _is_web(self._fs)
        self._interrupted = threading.Event()
        self._retrying, self._waiting = WarningThrottle(), WarningThrottle()
        self.facts = facts or ServerFacts(self.url)
        if not self._is_web:
            self.facts.sends_ranges = True
        self._probing = threading.Lock()

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of a file.

        Raises:
            NoRanges: the server does not support range requests, and `start` is not 0.
            RemoteError: the file does not exist, is too short, or may not be read.
            ServerFailed: the server failed for `RETRY_SECONDS`.
            Interrupted: `interrupt` was called.
        """
        return b"".join(self.pieces(name, start, stop))

    def pieces(self, name: str, start: int, stop: int, *, whole: bool = False) -> Iterator[bytes]:
        """Yield bytes [start, stop) of a file in consecutive pieces of at most `PIECE` bytes.

        An interrupted transfer is resumed after the last piece.

        Args:
            whole: if the server does not support range requests, read the complete file and skip the bytes before
                `start`.

        Raises:
            The errors of `read`.
        """
        retries, at = Retries(self, name), start
        body: Body | None = None
        try:
            while at < stop:
                try:
                    if body is None:
                        body = self._body(name, at, min(at + PIECE, stop), last=stop if whole else None)
                    assert body.stop is not None
                    piece = self._run(body, min(PIECE, body.stop - at), name)
                    if not piece:
                        raise BadAnswer(f"the response ends at byte {at:,} of {body.stop:,}")
                except Exception as error:
                    if body is not None:
                        body.close()
                    body = None
                    retries.failed(error)
                    continue
                retries.progress()
                at += len(piece)
                if at == body.stop:
                    body.close()
                    body = None
                yield piece
        finally:
            if body is not None:
                body.close()

    def read_all(self, name: str, limit: int) -> bytes:
        """Return a complete file of at most `limit` bytes.

        Raises:
            RemoteError: the file is larger; also the errors of `read`.
        """
        retries = Retries(self, name)
        while True:
            body = self._body(name, 0, None)
            content = bytearray()
            try:
                while len(content) <= limit and (piece := self._run(body, min(PIECE, limit + 1 - len(content)), name)):
                    content += piece
                break
            except Exception as error:
                retries.failed(error)
            finally:
                body.close()
        if len(content) > limit:
            raise RemoteError(
                f"{redact(self.url)}/{name}: larger than the {limit:,} bytes that are allowed for this file; "
                "check the URL"
            )
        return bytes(content)

    def has_ranges(self, name: str) -> bool:
        """Return whether the server supports range requests. If that is not known yet, request one byte of a file."""
        if self.facts.sends_ranges is None:
            with self._probing:  # several threads share one request
                if self.facts.sends_ranges is None:
                    with contextlib.suppress(NoRanges):
                        self.read(name, 1, 2)
        return self.facts.sends_ranges is not False

    def interrupt(self) -> None:
        """Make current and later calls raise `Interrupted`."""
        self._interrupted.set()

    def _body(self, name: str, start: int, stop: int | None, *, last: int | None = None) -> Body:
        path = f"{self._root}/{name}"
        if self._is_web:
            return WebBody(self.facts, self._fs, path, start, stop, last=last)
        return ObjectBody(self._fs, path, start, stop)

    def _run(self, body: Body, size: int, name: str) -> bytes:
        """Read from a body; raise `BadAnswer` if it makes no progress."""
        if self._interrupted.is_set():
            raise Interrupted
        begun = moved = time.monotonic()
        before = received = body.received
        task = body.start(size)
        limit = STALL_SECONDS + body.extra_seconds(size)
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
                if now - moved > limit:
                    raise BadAnswer(f"transfer stalled: {body.received - received:,} bytes in {now - moved:.0f} s")
                if now - begun > SILENT_SECONDS and self._waiting.due():
                    log.warning(
                        "%s/%s: slow transfer: %s of %s bytes after %.0f s; it will be repeated if fewer than %s bytes "
                        "arrive in %.0f s",
                        redact(self.url),
                        name,
                        f"{body.received - before:,}",
                        f"{size:,}",
                        now - begun,
                        f"{STALL_BYTES:,}",
                        limit,
                    )
        finally:
            task.cancel()


class Retries:
    """Decides whether, when and for how long failed requests for a file are repeated."""

    def __init__(self, remote: Remote, name: str) -> None:
        self._remote, self._where = remote, f"{redact(remote.url)}/{name}"
        self.progress()

    def progress(self) -> None:
        """Reset the time limit and the pause, because bytes have arrived."""
        self._since, self._failures, self._pause = time.monotonic(), 0, FIRST_PAUSE

    def failed(self, error: Exception) -> None:
        """Sleep before the next request, or raise.

        Raises:
            RemoteError: the error is permanent.
            ServerFailed: no progress for `RETRY_SECONDS`.
            Interrupted: see `Remote.interrupt`.
        """
        if isinstance(error, Interrupted | RemoteError):
            raise error
        if permanent := permanent_failure(error):
            raise RemoteError(f"{self._where}: {permanent}") from error
        self._failures += 1
        reason = describe(error)
        spent = time.monotonic() - self._since
        if spent >= RETRY_SECONDS:
            raise ServerFailed(
                f"{self._where}: the request failed {self._failures} times in {spent:.0f} s, last error: {reason}; "
                "check the server, then run the same command again (downloaded data is kept)"
            ) from error
        level = logging.WARNING if self._remote._retrying.due() else logging.INFO
        log.log(level, "%s: %s; retrying for up to %.0f s", self._where, reason, RETRY_SECONDS - spent)
        # Randomized, so that the ranks of a job do not all repeat their requests at the same time.
        pause = min(self._pause * random.uniform(0.5, 1.0), RETRY_SECONDS - spent)
        if self._remote._interrupted.wait(pause):
            raise Interrupted from error
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


def _is_web(fs: Any) -> bool:
    try:
        from fsspec.implementations.http import HTTPFileSystem
    except ImportError:  # aiohttp is not installed, so no HTTPFileSystem can exist
        return False
    return isinstance(fs, HTTPFileSystem)


def _web_options(url: str) -> dict[str, Any]:
    """Return options for fsspec's web file system: use ~/.netrc and the proxies of the environment, if they exist."""
    import fsspec

    # The variable NETRC is not an option of this project: curl, requests and aiohttp read it too.
    netrc = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if urlsplit(url).scheme not in ("http", "https") or not (netrc.exists() or getproxies_environment()):
        return {}
    configured = {**fsspec.config.conf.get("http", {}), **fsspec.config.conf.get("https", {})}.get("client_kwargs", {})
    return {"client_kwargs": {"trust_env": True, **configured}}
