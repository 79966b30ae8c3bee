"""A folder on a web server or in an object store, by fsspec: ranges of its files, read with patience."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from pipeline.files import Interrupted
from shards.errors import UserError

log = logging.getLogger(__name__)

ATTEMPTS = 7
FIRST_PAUSE = 0.5  # seconds; doubled every time: about half a minute in all
WORTH_A_WARNING = 4  # servers stumble all the time
REQUEST_SECONDS = 60.0  # a range that takes longer is asked for again
_POLL_SECONDS = 0.1
_PERMANENT = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)


class RemoteError(UserError):
    """A server that cannot be reached, or does not have what a set needs."""


class ServerFailed(RemoteError):
    """A server that was asked again and again; another time it may answer."""

    exit_code = 1


def is_remote(location: object) -> bool:
    """Whether a set's location is a URL."""
    return "://" in str(location)


class Remote:
    """A folder behind a URL that fsspec knows (s3://bucket/set, https://host/set, gs://, ...). Thread-safe.

    Raises:
        UserError: the protocol is unknown, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise UserError(f"{url}: {error}; install it with: pip install 'fat-pipeline[remote]'") from error
        except ValueError as error:
            raise UserError(f"{url}: {error}; s3://, https:// and others that fsspec knows are read") from error
        self._interrupted = threading.Event()

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file; fewer where it ends before.

        Raises:
            RemoteError: the file is not there, or the server failed `ATTEMPTS` times.
            Interrupted: `interrupt` was called.
        """
        data = self._patiently(name, start=start, end=stop)
        # A server that knows no ranges sends all of it.
        return data if len(data) <= stop - start else data[start:stop]

    def read_all(self, name: str) -> bytes:
        """A whole (small) file."""
        return self._patiently(name)

    def interrupt(self) -> None:
        """Break off what is under way, and whatever comes."""
        self._interrupted.set()

    def _patiently(self, name: str, **limits: int) -> bytes:
        pause = FIRST_PAUSE
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._ask(f"{self._root}/{name}", **limits)
            except Interrupted:
                raise
            except _PERMANENT as error:
                raise RemoteError(
                    f"{self.url}/{name}: not there, or not readable ({error or type(error).__name__}); "
                    "check the URL and your access to it"
                ) from error
            except Exception as error:  # each file system has its own
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
                if attempt == ATTEMPTS:
                    raise ServerFailed(
                        f"{self.url}/{name}: failed {ATTEMPTS} times, at last with {reason}; check the server, and run "
                        "the same command again: what was fetched is kept"
                    ) from error
                level = logging.INFO if attempt < WORTH_A_WARNING else logging.WARNING
                log.log(level, "%s/%s: %s; trying again", self.url, name, reason)
                # Spread out, so that the ranks of a job do not all come back at once.
                if self._interrupted.wait(pause * random.uniform(0.5, 1.0)):
                    raise Interrupted from error
                pause *= 2
        raise AssertionError

    def _ask(self, path: str, **limits: int) -> bytes:
        if self._interrupted.is_set():
            raise Interrupted
        if not getattr(self._fs, "async_impl", False):
            return bytes(self._fs.cat_file(path, **limits))
        return self._wait_for(lambda: self._fs._cat_file(path, **limits))

    def _wait_for(self, make: Callable[[], Coroutine[Any, Any, bytes]]) -> bytes:
        """Run a coroutine on fsspec's own loop, so that it can be given up: interrupted, or when it takes too long."""
        task = asyncio.run_coroutine_threadsafe(make(), self._fs.loop)
        end = time.monotonic() + REQUEST_SECONDS
        try:
            while True:
                concurrent.futures.wait([task], timeout=_POLL_SECONDS)
                if task.done():
                    return task.result()
                if self._interrupted.is_set():
                    raise Interrupted
                if time.monotonic() > end:
                    raise TimeoutError(f"no answer in {REQUEST_SECONDS:.0f} s")
        finally:
            task.cancel()
