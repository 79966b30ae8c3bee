"""Write files durably: after a power failure, a file is complete or does not exist."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TEMPORARY = ".tmp"


@contextmanager
def durable_file(path: Path) -> Iterator[FileIO]:
    """Open a temporary file that is fsynced and renamed to `path` when the block ends without an exception.

    The temporary name is random and must not exist, so two processes never write to the same temporary file, and
    symbolic links are not followed.
    """
    temporary = temporary_name(path)
    file = temporary.open("xb", buffering=0)
    try:
        with file:
            yield file
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """Return a random hidden file name next to `path` that `is_temporary` recognizes."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY}")


def is_temporary(name: str, of: str) -> bool:
    """Return whether `name` is a temporary name of a file whose final name matches the regular expression `of`."""
    return re.fullmatch(rf"\.(?:{of})\.[0-9a-f]{{16}}{re.escape(TEMPORARY)}", name) is not None


def durable_write(path: Path, content: bytes) -> None:
    """Write a file durably."""
    with durable_file(path) as file:
        write_all(file, content)


def save_array(path: Path, array: NDArray) -> None:
    """Write an array durably as .npy."""
    with durable_file(path) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        write_all(file, array.tobytes())


def write_all(file: FileIO, content: bytes | memoryview) -> None:
    """Write all bytes to a raw file, whose `write` may write fewer."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def write_parts(file: FileIO, parts: list[bytes]) -> None:
    """Write several byte strings in one system call."""
    written = os.writev(file.fileno(), parts)
    if written < sum(map(len, parts)):
        write_all(file, b"".join(parts)[written:])


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that renames in it are durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
