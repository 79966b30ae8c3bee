"""Folders in places where other users can write: the temporary folder, a scratch disk, a shared cache folder.

Other users can create a folder or a symbolic link there in advance. Such a folder is therefore created with
mode 0700, checked by its descriptor when it is opened, and its files are opened relative to that descriptor, never
through a symbolic link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from shards.errors import UserError
from shards.files.durable import temporary_name
from shards.ownership import describe_owner, user_name

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
SHARED_FOLDER, SHARED_FILE = 0o2770, 0o660  # set-group-ID: new files inside belong to the folder's group
PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600


class NotPrivate(UserError):
    """A folder or file that another user owns or may write to, or a symbolic link in its place."""


def open_folder(
    folder: Path,
    *,
    remedy: str,
    shared: bool = False,
    inside: int | None = None,
    create: bool = True,
    forbidden: int = _OTHERS_WRITE,
) -> int:
    """Open a folder for use as `dir_fd`; by default it is created if it does not exist.

    Args:
        folder: its parents must exist.
        remedy: what to do about a folder that is refused.
        shared: the folder's group may write to it, and it may belong to another user.
        inside: descriptor of its parent; `folder` then serves for messages and for its name.
        forbidden: bits of the mode that it must not have, unless shared.

    Returns:
        A descriptor, which the caller closes.

    Raises:
        NotPrivate: a symbolic link or no folder; unless shared, another user's or writable by others; in any case
            writable by everybody.
        OSError: it cannot be created or opened.
    """
    name = folder if inside is None else folder.name
    if create:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, PRIVATE_FOLDER, dir_fd=inside)
    try:
        handle = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)
    except PermissionError as error:
        found = os.stat(name, dir_fd=inside, follow_symlinks=False)
        raise NotPrivate(f"{folder}: {describe_owner(found)}, which cannot be opened; {remedy}") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise NotPrivate(f"{folder}: a symbolic link or a file, not a folder; {remedy}") from error
        raise
    try:
        found = os.fstat(handle)
        if shared and found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != SHARED_FOLDER:
            _share(handle, os.stat(folder.parent) if inside is None else os.fstat(inside))
            found = os.fstat(handle)
        if not shared and found.st_uid != os.geteuid():
            raise NotPrivate(f"{folder}: {describe_owner(found)}, not of {user_name(os.geteuid())}; {remedy}")
        if found.st_mode & (stat.S_IWOTH if shared else forbidden):
            mode = stat.S_IMODE(found.st_mode)
            raise NotPrivate(f"{folder}: others may write to it (mode {mode:04o}); remove that permission, or {remedy}")
    except BaseException:
        os.close(handle)
        raise
    return handle


def open_file(name: str, flags: int, *, folder: int, path: Path, remedy: str, shared: bool = False) -> int:
    """Open a regular file directly inside a folder, never through a symbolic link.

    Args:
        flags: of `os.open`; a file that O_CREAT makes gets mode 0600, or 0660 if shared.
        folder: descriptor from `open_folder`.
        path: the file, for messages.
        remedy: what to do about a file that is refused.

    Raises:
        NotPrivate: a symbolic link, or no regular file; unless shared, another user's.
        OSError: it cannot be opened; FileNotFoundError where there is none.
    """
    mode = SHARED_FILE if shared else PRIVATE_FILE
    try:
        # O_NONBLOCK: opening a fifo would wait for its other end.
        handle = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=folder)
    except PermissionError as error:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        raise NotPrivate(f"{path}: {describe_owner(found)}, which cannot be opened; {remedy}") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise NotPrivate(f"{path}: not a regular file; {remedy}") from error
        raise
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise NotPrivate(f"{path}: not a regular file; {remedy}")
        if not shared and found.st_uid != os.geteuid():
            raise NotPrivate(f"{path}: {describe_owner(found)}, not of {user_name(os.geteuid())}; {remedy}")
        if shared and flags & os.O_CREAT and found.st_uid == os.geteuid():
            os.fchmod(handle, SHARED_FILE)  # the umask has taken the group's rights
        os.set_blocking(handle, True)  # Lustre fails reads and writes that would wait for a lock of another host
    except BaseException:
        os.close(handle)
        raise
    return handle


def write_file(name: str, content: bytes, *, folder: int, path: Path, remedy: str, shared: bool = False) -> None:
    """Write a file durably and atomically inside a folder. Arguments and errors as of `open_file`."""
    temporary = temporary_name(Path(name)).name
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    handle = open_file(temporary, flags, folder=folder, path=path, remedy=remedy, shared=shared)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def create_private_folder(folder: Path, *, remedy: str, group: bool = False) -> Path:
    """Create a folder for this user alone, parents included, or check that an existing one is; returns it.

    Args:
        group: accept a folder to which its group may write, as libraries make them under a umask of 002.

    Raises:
        NotPrivate: see `open_folder`.
        OSError: it cannot be created or opened.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.close(open_folder(folder, remedy=remedy, forbidden=stat.S_IWOTH if group else _OTHERS_WRITE))
    return folder


def _share(handle: int, parent: os.stat_result) -> None:
    """Give the group of the parent folder access, or the user's own group if the user is not a member of that group."""
    with contextlib.suppress(PermissionError):
        os.fchown(handle, -1, parent.st_gid)
    os.fchmod(handle, SHARED_FOLDER)
