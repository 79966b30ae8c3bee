"""Errors that a person can act on: one clear line, and an exit status that means it."""

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
"""Maximum characters of a message; names in damaged files may have thousands."""


class UserError(Exception):
    """Bad input. The message names the file, the fact and the remedy; command lines print it alone and exit with 2."""

    exit_code = 2

    def __str__(self) -> str:
        message = one_line(super().__str__())
        if len(message) <= MAX_MESSAGE:
            return message
        half = MAX_MESSAGE // 2
        return f"{message[:half]} ... {message[-half:]}"  # the remedy stands at the end


class ShardSetError(UserError):
    """A shard set that does not fit its manifest, or whose manifest does not fit this version."""


class StorageFailed(ShardSetError):
    """Storage that did not do what it was asked; nothing says that it will not the next time."""

    exit_code = 1


def storage_error(path: Path | str, error: OSError, remedy: str = "copy it again") -> ShardSetError:
    """Judge what the system said about a file of a set: the one place that decides between bad input and bad storage.

    Args:
        path: the file, for people.
        remedy: what to do about a file that is not there.

    Returns:
        A `ShardSetError` (exit status 2) where the file is missing or of another kind, so that another start would meet
        the same; a `StorageFailed` (exit status 1) where storage failed (I/O error, stale handle, no permission, too
        many open files), which may have passed by the next start: nothing is said about the file's content.
    """
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        fact = "missing" if isinstance(error, FileNotFoundError) else error.strerror or type(error).__name__
        return ShardSetError(f"{path}: {fact}; {remedy}")
    fact, action = describe_os_error(path, error)
    return StorageFailed(f"{path}: cannot be read ({fact}); {action or 'check the storage'}, then start again")


def describe_os_error(path: Path | str, error: OSError) -> tuple[str, str]:
    """Explain what kept the system from opening, reading or writing a file.

    Returns:
        The fact, and what to do about it; empty where there is nothing more to say than the fact.
    """
    fact = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.EMFILE:
        return f"{fact}, the limit is {limit()}", f"raise the limit ({how_to_raise_limit()})"
    if error.errno == errno.ENFILE:
        return fact, "close other programs, or raise fs.file-max"
    if error.errno in (errno.EACCES, errno.EPERM):
        found = describe_obstacle(path)
        return (
            f"{fact} for {user_name(os.geteuid())}{f': {found}' if found else ''}",
            "have its owner give you access (chmod, chgrp)",
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return fact, "free some space"
    return fact, ""


def open_files_error(error: BaseException) -> StorageFailed | None:
    """Return what to tell a person where an error, or one that led to it, says that no more files can be opened."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in (errno.EMFILE, errno.ENFILE):
            break
        if os.strerror(errno.EMFILE) in str(found):  # ImportError of a shared library, RuntimeError of torch
            found = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            break
        chained = isinstance(found, OSError | ImportError | RuntimeError) and not found.__suppress_context__
        found = found.__cause__ or (found.__context__ if chained else None)
    else:
        return None
    fact, action = describe_os_error("", found)
    return StorageFailed(f"{fact}; {action}, then start again")


class ConversionFailed(UserError):
    """The input was understood, but the job could not be finished as asked (too many rejects, disk full)."""

    exit_code = 1


@contextmanager
def explain_os_errors(path: Path, remedy: str = "then run the same command: it resumes") -> Iterator[None]:
    """Convert an `OSError` into a one-line error that names its file, else `path`.

    Args:
        remedy: what to do when the cause is gone.

    Raises:
        ConversionFailed: an OSError was raised in the block.
    """
    try:
        yield
    except OSError as error:
        what = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else path
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fact, action = describe_os_error(what, error)
        raise ConversionFailed(f"{path if full else what}: {fact}; {action or 'correct that'}, {remedy}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert an `OSError` in the block, which reads `path`, with `storage_error`."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


def report(error: UserError, *, prefix: str = "") -> int:
    """Print an error as one line on standard error; return its exit status."""
    print(f"{prefix}error: {printable(error)}", file=sys.stderr, flush=True)
    return error.exit_code


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something; empty where none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
