"""Result files named by the user: checked before the work begins, written completely or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from pathlib import Path

from shards.errors import StorageFailed, UserError
from shards.files.durable import durable_write

# The name or the folder is wrong; other errors may be transient.
_OF_THE_NAME = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL,
    errno.ELOOP,
)  # fmt: skip


class OutputError(UserError):
    """A result that cannot be written to the named file."""


def check_output(path: Path, option: str, suffixes: Collection[str] = ()) -> None:
    """Check before the work that a result file can be written.

    Args:
        option: option that names the file, for the message.
        suffixes: allowed suffixes in lower case; empty = any.

    Raises:
        OutputError: the path is a folder, its folder is missing or cannot be written, or its suffix is unknown.
    """
    try:
        if path.is_dir():
            raise OutputError(f"{option} {path}: is a folder; name a file in it")
        if suffixes and path.suffix.lower() not in suffixes:
            raise OutputError(f"{option} {path}: a file name that ends in {', '.join(sorted(suffixes))} expected")
        if not path.parent.is_dir():
            raise OutputError(f"{option} {path}: there is no folder {path.parent}; make it first")
        # An existing file is replaced, unless it is a device or a pipe.
        if not os.access(path if _is_special(path) else path.parent, os.W_OK):
            raise OutputError(f"{option} {path}: no permission to write there; name another file")
    except (OSError, ValueError) as error:  # the name is too long, or holds a zero byte
        raise _unwritable(path, option, error) from error


def check_output_folder(folder: Path, option: str, remedy: str) -> None:
    """Check before the work that files can be made in a folder, which need not exist yet, nor its parents.

    Args:
        option: what names the folder, for the message.
        remedy: what to do otherwise.

    Raises:
        OutputError: the folder, or the nearest of its parents that exists, is a file or cannot be written.
    """
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise OutputError(f"{option} {folder}: {there} is no folder; {remedy}")
        if not os.access(there, os.W_OK | os.X_OK):
            raise OutputError(f"{option} {folder}: cannot be written ({there} is read-only, or not yours); {remedy}")
    except (OSError, ValueError) as error:
        raise _unwritable(folder, option, error) from error


def write_output(path: Path, content: bytes, option: str) -> None:
    """Write a result; an existing file is replaced only when the new one is on disk.

    Raises:
        OutputError: it cannot be written.
        StorageFailed: the storage failed, for example because the disk is full.
    """
    try:
        if _is_special(path):
            path.write_bytes(content)
        else:
            durable_write(path.resolve(), content)
    except OSError as error:
        raise _unwritable(path, option, error) from error


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _unwritable(path: Path, option: str, error: Exception) -> UserError:
    fact = getattr(error, "strerror", None) or str(error)
    transient = isinstance(error, OSError) and error.errno not in _OF_THE_NAME
    kind, remedy = (StorageFailed, "repair the storage") if transient else (OutputError, "name another file")
    return kind(f"{option} {path}: cannot be written ({fact}); {remedy}")
