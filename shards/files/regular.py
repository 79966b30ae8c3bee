"""Open and read regular files only (no FIFO, device or socket), with a limit on their size."""

from __future__ import annotations

import contextlib
import os
import stat
from io import FileIO
from pathlib import Path

from shards.errors import ShardSetError, UserError, storage_error
from shards.redact import one_line

MAX_LIST = 2**26
"""Maximum size of a text file with classes or labels, in bytes."""

_KINDS = {
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
}


class NotRegular(ShardSetError):
    """The path is not a regular file; `kind` says what it is instead."""

    def __init__(self, path: Path | bytes | str, kind: str) -> None:
        super().__init__(path, kind)
        self.kind = kind

    def __str__(self) -> str:
        return one_line(f"{os.fsdecode(self.args[0])}: {self.kind}, not a regular file; move it away")


def kind(mode: int) -> str:
    """Return the kind of a file with this `st_mode`, for messages."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")


def open_regular(path: Path | bytes, flags: int = os.O_RDONLY) -> int:
    """Open a regular file like `open_with_status`, but return only the file descriptor."""
    return open_with_status(path, flags)[0]


def open_with_status(path: Path | bytes, flags: int = os.O_RDONLY) -> tuple[int, os.stat_result]:
    """Open a regular file. Symbolic links are followed. Does not block if the path is a FIFO.

    Args:
        flags: flags of `os.open`. With O_CREAT, a new file gets mode 0666 minus the umask.

    Returns:
        A file descriptor, which the caller closes, and the status of the file.

    Raises:
        NotRegular: the path is a FIFO, a device, a socket or a folder.
        OSError: `os.open` failed.
    """
    try:
        handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
    except OSError as error:
        with contextlib.suppress(OSError):  # if stat also fails, report the error of open
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode):
                raise NotRegular(path, kind(mode)) from error
        raise
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise NotRegular(path, kind(status.st_mode))
    os.set_blocking(handle, True)  # on Lustre, a non-blocking read fails if another host holds a lock
    return handle, status


def open_file(path: Path) -> FileIO:
    """Open a regular file like `open_regular`, as an unbuffered file object."""
    return FileIO(path, "rb", opener=lambda name, flags: open_regular(path))


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        UserError: the file is larger, or not a regular file.
        OSError: the file cannot be read.
    """
    handle, status = open_with_status(path)
    try:
        if status.st_size > limit:
            raise UserError(f"{path}: {status.st_size:,} bytes, more than the {limit:,} bytes that are allowed")
        # Allocate the size of the file, not the limit. A growing file, or one in /proc (size 0), may have more bytes.
        content = read_up_to(handle, status.st_size + 1)
        if len(content) > status.st_size:
            content += read_up_to(handle, limit + 1 - len(content))
    finally:
        os.close(handle)
    if len(content) > limit:
        raise UserError(f"{path}: more than the {limit:,} bytes that are allowed")
    return content


def read_list(path: Path, what: str) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Args:
        what: expected content of the file, for the message.

    Raises:
        UserError: the file is missing, too large, not a regular file, or not UTF-8 text.
        StorageFailed: the file cannot be read.
    """
    try:
        text = read_bounded(path, MAX_LIST).decode("utf-8-sig")
    except NotRegular as error:
        raise UserError(f"{path}: {error.kind}; expected {what}") from error
    except OSError as error:
        raise storage_error(path, error, f"expected {what}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start:,}; expected {what}") from None
    if "\0" in text:
        raise UserError(f"{path}: contains a NUL character; expected {what}")
    return text


def read_up_to(handle: int, size: int) -> bytes:
    """Read `size` bytes from the current position, or fewer at the end of the file."""
    data = os.read(handle, size)
    if len(data) in (0, size):
        return data
    parts, left = [data], size - len(data)
    while left and (data := os.read(handle, left)):
        parts.append(data)
        left -= len(data)
    return b"".join(parts)
