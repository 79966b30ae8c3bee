"""Output files specified by the user: checked before the work starts, and written atomically."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Collection
from pathlib import Path

from shards.errors import StorageFailed, UserError
from shards.files.durable import durable_write

# Errors of an invalid name or folder; all other errors may be transient.
_INVALID_NAME = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL,
    errno.ELOOP,
)  # fmt: skip


STANDARD_OUTPUT = Path("-")
MARK = "fat-pipeline"
"""Text at the beginning of files with a default name; it identifies files that this project created."""
_HEAD = 4096  # bytes in which the mark is searched


class OutputError(UserError):
    """An output file cannot be written at the specified location."""


def check_output(path: Path, option: str, suffixes: Collection[str] = (), *, default: Path | None = None) -> None:
    """Check that an output file can be written, before the work starts.

    Args:
        path: the file. - is standard output, if `suffixes` is empty.
        option: option that specifies the file, for the message.
        suffixes: allowed suffixes in lower case; empty: any.
        default: the option's default. The user has not named this file, so it is replaced only if it contains `MARK`.

    Raises:
        OutputError: the path is a folder, its parent folder is missing or not writable, its suffix is not allowed, or
            a file with the default name exists that this project did not create.
    """
    if is_standard_output(path) and not suffixes:
        return
    try:
        if path.is_dir():
            raise OutputError(f"{option} {path}: is a folder; specify a file in it")
        if suffixes and path.suffix.lower() not in suffixes:
            raise OutputError(f"{option} {path}: expected a file name that ends in {', '.join(sorted(suffixes))}")
        if not path.parent.is_dir():
            raise OutputError(f"{option} {path}: there is no folder {path.parent}; create it first")
        # A regular file is replaced by a rename in its folder; a device or pipe is written in place.
        if not os.access(path if _is_special(path) else path.parent, os.W_OK):
            raise OutputError(f"{option} {path}: no permission to write to it; specify another file")
        if path == default and path.is_file() and MARK.encode() not in _beginning(path):
            raise OutputError(
                f"{option} {path}: exists, and was not written by this command; move it away, or specify another file"
            )
    except (OSError, ValueError) as error:  # for example, the name is too long or contains a NUL byte
        raise _unwritable(path, option, error) from error


def check_output_folder(folder: Path, option: str, remedy: str) -> None:
    """Check that files can be created in a folder, before the work starts. It and its parents need not exist.

    Args:
        option: option that specifies the folder, for the message.
        remedy: what to do if files cannot be created.

    Raises:
        OutputError: the folder, or its nearest existing parent, is a file or not writable.
    """
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
        if not existing.is_dir():
            raise OutputError(f"{option} {folder}: {existing} is not a folder; {remedy}")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise OutputError(f"{option} {folder}: cannot be written (no write permission for {existing}); {remedy}")
    except (OSError, ValueError) as error:
        raise _unwritable(folder, option, error) from error


def write_output(path: Path, content: bytes, option: str) -> None:
    """Write an output file; an existing file is replaced only after the new one is on disk.

    Raises:
        OutputError: the file cannot be written.
        StorageFailed: the storage failed, for example because the disk is full.
    """
    if is_standard_output(path):
        sys.stdout.write(content.decode())
        sys.stdout.flush()
        return
    try:
        if _is_special(path):
            path.write_bytes(content)
        else:
            durable_write(path.resolve(), content)
    except OSError as error:
        raise _unwritable(path, option, error) from error


def is_standard_output(path: Path | None) -> bool:
    """Return whether a path is -, which stands for standard output."""
    return path == STANDARD_OUTPUT


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _unwritable(path: Path, option: str, error: Exception) -> UserError:
    fact = getattr(error, "strerror", None) or str(error)
    transient = isinstance(error, OSError) and error.errno not in _INVALID_NAME
    kind, remedy = (StorageFailed, "repair the storage") if transient else (OutputError, "specify another file")
    return kind(f"{option} {path}: cannot be written ({fact}); {remedy}")
