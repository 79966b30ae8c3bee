"""Safe folders inside locations where other users can write: a temporary folder, a scratch disk, a shared cache.

Other users can create a folder or a symbolic link at such a location in advance. Therefore a folder is created with
mode 0700 and checked through its descriptor when it is opened, and its files are opened relative to that descriptor,
never through a symbolic link.
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

_GROUP_OR_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
SHARED_FOLDER, SHARED_FILE = 0o2770, 0o660  # set-group-ID: new files belong to the folder's group
PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600


class NotPrivate(UserError):
    """A folder or file that another user owns or can write to, or that is a symbolic link."""


def open_folder(
    folder: Path,
    *,
    remedy: str,
    shared: bool = False,
    inside: int | None = None,
    create: bool = True,
    forbidden: int = _GROUP_OR_OTHERS_WRITE,
) -> int:
    """Open a folder for use as `dir_fd`. By default it is created if it does not exist.

    Args:
        folder: path of the folder. Its parents must exist.
        remedy: what to do about a rejected folder, for the message.
        shared: the folder may belong to another user, and its group may write to it.
        inside: descriptor of the parent folder, in which the last component of `folder` is opened.
        create: create the folder if it does not exist.
        forbidden: mode bits that the folder must not have, unless shared.

    Returns:
        A descriptor, which the caller closes.

    Raises:
        NotPrivate: the path is a symbolic link, not a folder, or writable by everyone. Unless shared, also if it is
            writable by the group or owned by another user.
        OSError: the folder cannot be created or opened.
    """
    name = folder if inside is None else folder.name
    if create:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, PRIVATE_FOLDER, dir_fd=inside)
    try:
        handle = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)
    except PermissionError as error:
        found = os.stat(name, dir_fd=inside, follow_symlinks=False)
        raise NotPrivate(f"{folder}: no permission to open it: {describe_owner(found)}; {remedy}") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise NotPrivate(f"{folder}: a symbolic link or a file, not a folder; {remedy}") from error
        raise
    try:
        found = os.fstat(handle)
        if shared and found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != SHARED_FOLDER:
            _grant_group_access(handle, os.stat(folder.parent) if inside is None else os.fstat(inside))
            found = os.fstat(handle)
        if not shared and found.st_uid != os.geteuid():
            raise NotPrivate(f"{folder}: {describe_owner(found)}, expected {user_name(os.geteuid())}; {remedy}")
        if found.st_mode & (stat.S_IWOTH if shared else forbidden):
            mode = stat.S_IMODE(found.st_mode)
            raise NotPrivate(f"{folder}: others can write to it (mode {mode:04o}); remove that permission, or {remedy}")
    except BaseException:
        os.close(handle)
        raise
    return handle


def open_file(name: str, flags: int, *, folder: int, path: Path, remedy: str, shared: bool = False) -> int:
    """Open a regular file directly inside a folder, never through a symbolic link.

    Args:
        flags: flags of `os.open`. With O_CREAT, a new file gets mode 0600, or 0660 if shared.
        folder: descriptor from `open_folder`.
        path: the file, for messages.
        remedy: what to do about a rejected file, for the message.
        shared: the file may belong to another user.

    Raises:
        NotPrivate: the path is a symbolic link, not a regular file or, unless shared, owned by another user.
        OSError: the file cannot be opened; FileNotFoundError if it does not exist.
    """
    mode = SHARED_FILE if shared else PRIVATE_FILE
    try:
        # O_NONBLOCK: opening a FIFO would otherwise block until another process opens its other end.
        handle = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=folder)
    except PermissionError as error:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        raise NotPrivate(f"{path}: no permission to open it: {describe_owner(found)}; {remedy}") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise NotPrivate(f"{path}: not a regular file; {remedy}") from error
        raise
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise NotPrivate(f"{path}: not a regular file; {remedy}")
        if not shared and found.st_uid != os.geteuid():
            raise NotPrivate(f"{path}: {describe_owner(found)}, expected {user_name(os.geteuid())}; {remedy}")
        if shared and flags & os.O_CREAT and found.st_uid == os.geteuid():
            os.fchmod(handle, SHARED_FILE)  # the umask may have removed the group's permissions
        os.set_blocking(handle, True)  # on Lustre, non-blocking I/O fails if another host holds a lock
    except BaseException:
        os.close(handle)
        raise
    return handle


def write_file(name: str, content: bytes, *, folder: int, path: Path, remedy: str, shared: bool = False) -> None:
    """Write a file durably and atomically inside a folder. Arguments and errors are those of `open_file`."""
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
    """Create a private folder and its parents, or check that an existing folder is private; return it.

    Args:
        group: accept a folder that its group can write to, such as one that a library created with umask 002.

    Raises:
        NotPrivate: see `open_folder`.
        OSError: the folder cannot be created or opened.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.close(open_folder(folder, remedy=remedy, forbidden=stat.S_IWOTH if group else _GROUP_OR_OTHERS_WRITE))
    return folder


def _grant_group_access(handle: int, parent: os.stat_result) -> None:
    """Grant access to the parent folder's group, or to the user's own group if the user is not in that group."""
    with contextlib.suppress(PermissionError):
        os.fchown(handle, -1, parent.st_gid)
    os.fchmod(handle, SHARED_FOLDER)
