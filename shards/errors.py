"""Errors with a one-line message that tells the user what to do, and with an exit status."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.open_files import how_to_raise_limit, limit
from shards.ownership import describe_obstacle, user_name
from shards.redact import one_line, printable

MAX_MESSAGE = 2000
"""Maximum length of a message in characters; names in damaged files may be much longer."""


class UserError(Exception):
    """Invalid input. The message states file, problem and remedy; commands print only the message and exit with 2."""

    exit_code = 2

    def __str__(self) -> str:
        message = one_line(super().__str__())
        if len(message) <= MAX_MESSAGE:
            return message
        half = MAX_MESSAGE // 2
        return f"{message[:half]} ... {message[-half:]}"  # keep the remedy, which is at the end


class ShardSetError(UserError):
    """A shard set is damaged, incomplete, or of another format version."""


class StorageFailed(ShardSetError):
    """A storage operation failed. The failure may be temporary, so a restart may succeed."""

    exit_code = 1


def storage_error(path: Path | str, error: OSError, remedy: str = "copy it again") -> ShardSetError:
    """Convert an `OSError` for a file of a set into an error for invalid input or for failed storage.

    Args:
        path: the file, for the message.
        remedy: what to do if the file is missing.

    Returns:
        A `ShardSetError` (exit status 2) if the file is missing or not a file, because a restart would fail in the same
        way; a `StorageFailed` (exit status 1) if the storage failed (I/O error, stale handle, no permission, too many
        open files), because a restart may succeed.
    """
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        fact = "missing" if isinstance(error, FileNotFoundError) else error.strerror or type(error).__name__
        return ShardSetError(f"{path}: {fact}; {remedy}")
    fact, action = describe_os_error(path, error)
    return StorageFailed(f"{path}: cannot be read ({fact}); {action or 'check the storage'}, then start again")


def describe_os_error(path: Path | str, error: OSError) -> tuple[str, str]:
    """Explain why the system could not open, read or write a file.

    Returns:
        The problem, and what to do about it; the second text is empty if there is no specific remedy.
    """
    fact = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.EMFILE:
        return f"{fact}, the limit is {limit()}", f"increase the limit ({how_to_raise_limit()})"
    if error.errno == errno.ENFILE:
        return fact, "close other programs, or increase fs.file-max"
    if error.errno in (errno.EACCES, errno.EPERM):
        found = describe_obstacle(path)
        return (
            f"{fact} for {user_name(os.geteuid())}{f': {found}' if found else ''}",
            "ask its owner for access (chmod, chgrp)",
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return fact, "free some space"
    return fact, ""


def open_files_error(error: BaseException) -> StorageFailed | None:
    """Return a `StorageFailed` if an error, or one of its causes, is that too many files are open; otherwise None."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in (errno.EMFILE, errno.ENFILE):
            break
        if os.strerror(errno.EMFILE) in str(found):  # for example, an ImportError or torch's RuntimeError
            found = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            break
        chained = isinstance(found, OSError | ImportError | RuntimeError) and not found.__suppress_context__
        found = found.__cause__ or (found.__context__ if chained else None)
    else:
        return None
    fact, action = describe_os_error("", found)
    return StorageFailed(f"{fact}; {action}, then start again")


class ConversionFailed(UserError):
    """A conversion with valid options could not be finished (too many rejects, disk full)."""

    exit_code = 1


@contextmanager
def explain_os_errors(path: Path, remedy: str = "then run the same command to resume") -> Iterator[None]:
    """Convert an `OSError` of the block into a one-line error.

    Args:
        path: named in the message if the `OSError` names no file, or if the disk is full.
        remedy: what to do after the cause is removed.

    Raises:
        ConversionFailed: an OSError was raised in the block.
    """
    try:
        yield
    except OSError as error:
        what = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else path
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fact, action = describe_os_error(what, error)
        raise ConversionFailed(f"{path if full else what}: {fact}; {action or 'correct this'}, {remedy}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert an `OSError` of the block, which reads `path`, with `storage_error`."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


def report(error: UserError, *, prefix: str = "") -> int:
    """Print an error as one line on standard error, and return its exit status."""
    print(f"{prefix}error: {printable(error)}", file=sys.stderr, flush=True)
    return error.exit_code


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's text; empty if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def reason_of(error: Exception) -> str:
    """Return an error's text on one line; that of an `OSError` without its number and file name."""
    fact = error.strerror if isinstance(error, OSError) else None
    return fact or first_line(error) or type(error).__name__


def about_file(path: Path, error: Exception) -> str:
    """Return an error's text, which begins with the path of the file that it is about."""
    text = reason_of(error)
    return text if text.startswith(str(path)) else f"{path}: {text}"
