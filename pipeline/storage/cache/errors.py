"""Errors of the cache."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

from shards.errors import StorageFailed, UserError
from shards.files.private_folder import NotPrivate

# EFBIG: the limit of the file size (ulimit -f) was reached.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CacheFull(UserError):
    """The file does not fit: all cached files are in use, or it is larger than the cache's limit."""


class DiskFull(CacheFull):
    """The disk of the cache is full, although the cache is below its limit."""

    exit_code = 1

    @classmethod
    def of(cls, folder: Path, reason: str) -> DiskFull:
        return cls(f"--cache {folder}: {reason}; free disk space, or specify another folder with --cache")


class ForeignFile(UserError):
    """A file that the cache did not create has the name of a file of the cache."""


class PartRemoved(StorageFailed):
    """A partial file, or its folder, was removed by another program."""


@contextlib.contextmanager
def cache_errors(folder: Path, when_full: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Convert errors of the file system that occur inside the block to errors of the cache.

    Args:
        folder: the folder that `--cache` names.
        when_full: called before `DiskFull` is raised.
    """
    try:
        yield
    except NotPrivate as error:
        raise ForeignFile(str(error)) from error
    except OSError as error:
        if error.errno in _FULL:
            with contextlib.suppress(UserError):
                when_full()
        raise storage_failed(folder, error) from error


def storage_failed(folder: Path, error: OSError) -> UserError:
    """Return the error for a full disk (`DiskFull`) or another failure of it (`StorageFailed`)."""
    if error.errno in _FULL:
        return DiskFull.of(folder, str(error.strerror))
    return StorageFailed(
        f"--cache {folder}: reading or writing the cache failed: {error.strerror or error}; check the disk, or specify "
        "another folder with --cache"
    )
