"""Why a file cannot be put into the cache, or read from it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

from shards.errors import StorageFailed, UserError
from shards.files.private_folder import NotPrivate

# EFBIG is what a limit on the size of files says.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CacheFull(UserError):
    """All of the cache's room is in use, or too small altogether."""


class DiskFull(CacheFull):
    """The disk that the cache is on is full, whatever the cache may hold."""

    exit_code = 1

    @classmethod
    def of(cls, folder: Path, reason: str) -> DiskFull:
        return cls(f"--cache {folder}: {reason}; free some space there, or give another folder")


class ForeignFile(UserError):
    """A file that the cache did not create has the name of one of its files."""


class PartRemoved(StorageFailed):
    """A partial file, or its folder, was removed by something other than the cache."""


@contextlib.contextmanager
def cache_errors(place: Path, when_full: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Raise errors of the file system inside the block as errors of the cache.

    Args:
        place: the folder that `--cache` names.
        when_full: called first where the disk is full.
    """
    try:
        yield
    except NotPrivate as error:
        raise ForeignFile(str(error)) from error
    except OSError as error:
        if error.errno in _FULL:
            with contextlib.suppress(UserError):
                when_full()
        raise storage_failed(place, error) from error


def storage_failed(folder: Path, error: OSError) -> UserError:
    """Return the error of a cache whose disk is full (`DiskFull`) or failed (`StorageFailed`)."""
    if error.errno in _FULL:
        return DiskFull.of(folder, str(error.strerror))
    return StorageFailed(f"--cache {folder}: {error.strerror or error}; correct that, or give another folder")
