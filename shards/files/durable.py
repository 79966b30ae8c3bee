"""Write files durably: after a power cut, a file is complete or does not exist."""

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
    """Open a file that appears under its name only when the block ends well: temporary name, fsync, rename.

    The temporary name is random and must not exist, so two processes never write to the same temporary file, and no
    symbolic link is followed.
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
    """Return a random hidden name beside `path`, which `is_temporary` recognises."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY}")


def is_temporary(name: str, of: str) -> bool:
    """Return whether `name` is a temporary name of a file whose own name matches the regular expression `of`."""
    return re.fullmatch(rf"\.(?:{of})\.[0-9a-f]{{16}}{re.escape(TEMPORARY)}", name) is not None


def durable_write(path: Path, content: bytes) -> None:
    """Write a whole file durably."""
    with durable_file(path) as file:
        write_all(file, content)


def save_array(path: Path, array: NDArray) -> None:
    """Write an array as .npy durably."""
    with durable_file(path) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        write_all(file, array.tobytes())


def write_all(file: FileIO, content: bytes | memoryview) -> None:
    """Write every byte to a raw file, whose `write` may stop early."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def write_parts(file: FileIO, parts: list[bytes]) -> None:
    """Write several pieces in one call."""
    written = os.writev(file.fileno(), parts)
    if written < sum(map(len, parts)):
        write_all(file, b"".join(parts)[written:])


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
