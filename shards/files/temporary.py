"""Choose folders for temporary files, sockets and caches, with fallbacks if TMPDIR or HOME cannot be used."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.util
import os
import sys
import tempfile
from pathlib import Path

from shards.errors import UserError
from shards.files.private_folder import create_private_folder
from shards.redact import printable

_VARIABLES = ("TMPDIR", "TEMP", "TMP")  # in the order in which Python's tempfile reads them
_SOCKET_PATH = 107
"""Maximum length of the path of a Unix socket in bytes (unix(7): 108 with the terminating NUL)."""
_IN_FOLDER = len("/pymp-01234567/listener-01234567")  # multiprocessing appends such names to the path
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def temporary_folder() -> Path:
    """Return the folder for temporary files. Prints a note, once, if it is not the one in TMPDIR.

    Raises:
        UserError: no such folder can be written.
    """
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        setting = _tmpdir_setting()
        raise UserError(
            f"{setting or 'TMPDIR'}: no folder for temporary files can be written (also tried /tmp, /var/tmp and the "
            "current folder); set TMPDIR to a folder that you can write to"
        ) from error
    setting = _tmpdir_setting()
    if setting and os.path.abspath(os.environ[setting.partition("=")[0]]) != str(folder):
        note(f"{setting} cannot be written; using {folder} for temporary files")
    return folder


def prepare_sockets() -> None:
    """Create the folder for multiprocessing's sockets, once per process, at a path that is short enough for a socket.

    The default is inside the temporary folder, whose path may be too long: many batch systems create one per job.

    Raises:
        UserError: no folder with a short enough path can be created.
    """
    try:
        given = str(temporary_folder())
        problem = f"TMPDIR={given}: path too long for sockets"
    except UserError as error:  # a folder in _SHORT, such as /dev/shm, may still be writable
        given, problem = "", str(error).partition(";")[0]
    for folder in (given, os.environ.get("XDG_RUNTIME_DIR", ""), *_SHORT):
        if not folder or len(os.fsencode(os.path.abspath(folder))) + _IN_FOLDER > _SOCKET_PATH:
            continue
        before, tempfile.tempdir = tempfile.tempdir, folder
        try:
            multiprocessing.util.get_temp_dir()  # creates the folder in tempfile.tempdir, and removes it at exit
        except OSError:
            continue
        finally:
            tempfile.tempdir = before
        if folder != given:
            note(f"{problem}; creating sockets in {folder}")
        return
    most = _SOCKET_PATH - _IN_FOLDER
    raise UserError(f"{problem}; set TMPDIR to a folder that you can write to, with a path of at most {most} bytes")


def prepare_caches() -> None:
    """Use a private cache folder in the temporary folder if the user's cache folder cannot be created.

    This is the case without a home folder, which is common in containers, or with a read-only one. XDG_CACHE_HOME and
    TRITON_HOME are set for this process and its children. Call this before importing libraries that use caches.

    Raises:
        UserError: the folder cannot be created, or another user owns it; the message names the variable to set.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    cache = Path(named or os.path.expanduser("~/.cache"))  # remains ~/.cache if the user has no home folder
    cause = f"XDG_CACHE_HOME={named}" if named else f"HOME={os.environ.get('HOME', '')}"
    if not _can_create(cache):
        folder = temporary_folder() / f"fat-pipeline-cache-{os.geteuid()}"
        remedy = "set XDG_CACHE_HOME to a folder that you own"
        try:
            create_private_folder(folder, remedy=remedy)
        except OSError as error:
            raise UserError(f"{cause} cannot be written, nor {folder} ({error.strerror}); {remedy}") from error
        note(f"{cause} cannot be written; using {folder} for caches")
        os.environ["XDG_CACHE_HOME"] = str(folder)
    # Triton ignores XDG_CACHE_HOME.
    if "TRITON_CACHE_DIR" not in os.environ and not _can_create(Path(os.path.expanduser("~/.triton"))):
        os.environ.setdefault("TRITON_HOME", os.environ.get("XDG_CACHE_HOME") or str(cache))


@functools.cache
def note(line: str) -> None:
    """Print a note on standard error, once per process and only on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            print(f"note: {printable(line)}", file=sys.stderr, flush=True)


def _tmpdir_setting() -> str:
    """Return the environment variable that sets the temporary folder, as NAME=VALUE; empty if none does."""
    name = next((name for name in _VARIABLES if os.environ.get(name)), None)
    return f"{name}={os.environ[name]}" if name else ""


def _can_create(folder: Path) -> bool:
    """Return whether a folder can be written or created, judging by the part of its path that exists."""
    if not folder.is_absolute():
        return False
    for path in (folder, *folder.parents):
        try:
            os.stat(path)
        except FileNotFoundError:
            if path.is_symlink():  # a dangling symbolic link
                return False
            continue
        except OSError:
            return False
        return path.is_dir() and os.access(path, os.W_OK | os.X_OK)
    return False
