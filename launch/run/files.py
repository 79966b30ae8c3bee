"""Open, read and check files of a run folder. Other users or failing disks may have changed them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from shards.errors import UserError
from shards.files import regular
from shards.files.durable import temporary_name

# Error numbers of paths that cannot be a run folder. All other errors are failures of the storage.
_BAD_PATH = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.EINVAL)
_PROBE_BYTES = 4096


class FolderFailed(UserError):
    """The storage of the run folder failed, or access to it was denied; another start may succeed."""

    exit_code = 1


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file like `shards.files.regular.open_regular`, but raise only `OSError`.

    Raises:
        IsADirectoryError: the path is a folder, a FIFO, a socket or a device.
        OSError: `os.open` failed.
    """
    try:
        return regular.open_regular(path, flags)
    except regular.NotRegular as error:
        raise IsADirectoryError(errno.EISDIR, "not a regular file", str(path)) from error


def read_regular(path: Path, *, limit: int, flags: int = os.O_RDONLY) -> bytes:
    """Read a regular file of at most `limit` bytes; of a longer file, return `limit` + 1 bytes.

    Raises:
        OSError: see `open_regular`.
    """
    with open(open_regular(path, flags), "rb") as file:
        return file.read(limit + 1)


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, by writing and removing a temporary file.

    Raises:
        OSError: the folder cannot be written.
    """
    probe = temporary_name(folder / "probe")
    try:
        handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.write(handle, bytes(_PROBE_BYTES))
            os.fsync(handle)
        finally:
            os.close(handle)
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def unwritable(run: Path, error: OSError) -> UserError:
    """Convert an error from writing to the run folder `run`.

    Returns:
        A `UserError` (exit status 2) if the path cannot be a run folder, else a `FolderFailed` (exit status 1): a full
        or failing disk and missing permissions may be corrected before the next start.
    """
    path = error.filename2 or error.filename  # filename2 is the target of a rename
    where = Path(os.fsdecode(path)) if isinstance(path, str | bytes) else run
    name = "" if where == run else f"{where.relative_to(run) if where.is_relative_to(run) else where}: "
    fact = f"{run}: the run folder cannot be written ({name}{error.strerror or error})"
    if error.errno in _BAD_PATH:
        return UserError(f"{fact}; move the file at this path away, or use another run folder (--out)")
    return FolderFailed(f"{fact}; free disk space or correct the permissions, or use another run folder (--out)")
