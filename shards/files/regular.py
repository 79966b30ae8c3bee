"""Open and read regular files only (no fifo, device or socket), with a limit on their size."""

from __future__ import annotations

import contextlib
import os
import stat
from io import FileIO
from pathlib import Path

from shards.errors import ShardSetError, UserError, storage_error
from shards.redact import one_line

MAX_LIST = 2**26
"""Bytes of a text file that names classes or labels."""

_KINDS = {
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
}


class NotRegular(ShardSetError):
    """The path leads to something other than a regular file; `kind` names it."""

    def __init__(self, path: Path | bytes | str, kind: str) -> None:
        super().__init__(path, kind)
        self.kind = kind

    def __str__(self) -> str:
        return one_line(f"{os.fsdecode(self.args[0])}: {self.kind}, not a regular file; move it away")


def kind(mode: int) -> str:
    """Return what a file with this `st_mode` is, for messages."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")


def open_regular(path: Path | bytes, flags: int = os.O_RDONLY) -> int:
    """Open a regular file like `open_with_status`, and return the file descriptor alone."""
    return open_with_status(path, flags)[0]


def open_with_status(path: Path | bytes, flags: int = os.O_RDONLY) -> tuple[int, os.stat_result]:
    """Open a regular file without waiting for the other end of a fifo; symbolic links are followed.

    Args:
        flags: flags of `os.open`. A file that O_CREAT creates has the mode that the umask leaves.

    Returns:
        A file descriptor that the caller closes, and the status of the file that it leads to.

    Raises:
        NotRegular: the path leads to a fifo, a device, a socket or a folder.
        OSError: `os.open` failed.
    """
    try:
        handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error is the one to report
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode):
                raise NotRegular(path, kind(mode)) from error
        raise
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise NotRegular(path, kind(status.st_mode))
    os.set_blocking(handle, True)  # Lustre fails reads that would wait for a lock of another host
    return handle, status


def open_file(path: Path) -> FileIO:
    """Open a regular file as `open_regular`, as an unbuffered file object."""
    return FileIO(path, "rb", opener=lambda name, flags: open_regular(path))


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a whole regular file of at most `limit` bytes.

    Raises:
        UserError: the file is larger, or not a regular file.
        OSError: it cannot be read.
    """
    handle, status = open_with_status(path)
    try:
        if status.st_size > limit:
            raise UserError(f"{path}: {status.st_size:,} bytes, more than the {limit:,} allowed")
        # A growing file, or one in /proc (size 0), may hold more. The buffer has the size of the file, not the limit.
        content = read_up_to(handle, status.st_size + 1)
        if len(content) > status.st_size:
            content += read_up_to(handle, limit + 1 - len(content))
    finally:
        os.close(handle)
    if len(content) > limit:
        raise UserError(f"{path}: more than the {limit:,} bytes allowed")
    return content


def read_list(path: Path, what: str) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Args:
        what: what the file should be, for the message.

    Raises:
        UserError: missing, too large, not a regular file, or not UTF-8 text.
        StorageFailed: it cannot be read.
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
        raise UserError(f"{path}: a NUL character in it; expected {what}")
    return text


def read_up_to(handle: int, size: int) -> bytes:
    """Read from the current position until `size` bytes or the end of the file."""
    data = os.read(handle, size)
    if len(data) in (0, size):
        return data
    parts, left = [data], size - len(data)
    while left and (data := os.read(handle, left)):
        parts.append(data)
        left -= len(data)
    return b"".join(parts)
