"""Errors that a person can act on: one clear line, and an exit status that means it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Bad input. The message names the file, the fact and the remedy; command lines print it alone and exit with 2."""

    exit_code = 2


class ShardSetError(UserError):
    """A shard set that does not fit its manifest, or whose manifest does not fit this version."""


class StorageFailed(ShardSetError):
    """Storage that did not do what it was asked; nothing says that it will not the next time."""

    exit_code = 1


class ConversionFailed(UserError):
    """The input was understood, but the job could not be finished as asked (too many rejects, disk full)."""

    exit_code = 1


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the system refuses becomes one line on the file it refused, else on `path`.

    Raises:
        ConversionFailed: an OSError was raised in the block.
    """
    try:
        yield
    except OSError as error:
        what = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else path
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "mend that"
        raise ConversionFailed(
            f"{path if full else what}: {error.strerror or error}; {remedy}, then run the same command: it resumes"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something; empty where none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
