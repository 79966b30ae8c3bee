"""Folders for temporary files, for sockets and for caches, where TMPDIR or HOME cannot serve."""

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

_VARIABLES = ("TMPDIR", "TEMP", "TMP")  # as Python's tempfile reads them
_SOCKET_PATH = 107
"""Bytes of the name of a Unix socket (unix(7): 108, with the closing NUL)."""
_IN_FOLDER = len("/pymp-01234567/listener-01234567")  # what multiprocessing adds
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def temporary_folder() -> Path:
    """Return the folder for temporary files; says so, once, where it is not the one that TMPDIR names.

    Raises:
        UserError: there is none that can be written.
    """
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        wish = _wish()
        raise UserError(
            f"{wish or 'TMPDIR'}: no folder for temporary files can be written (tried that, /tmp, /var/tmp and the "
            "current folder); set TMPDIR to a folder that you can write to"
        ) from error
    wish = _wish()
    if wish and os.path.abspath(os.environ[wish.partition("=")[0]]) != str(folder):
        note(f"{wish} cannot be written; temporary files go to {folder}")
    return folder


def prepare_sockets() -> None:
    """Make the folder in which multiprocessing creates its sockets, with a name short enough for them. Once a process.

    By default it is in the temporary folder, whose name may be too long: batch systems have one for each job.

    Raises:
        UserError: no folder can be made whose name is short enough.
    """
    try:
        given = str(temporary_folder())
        problem = f"TMPDIR={given}: too long a name for sockets"
    except UserError as error:  # /dev/shm may still do
        given, problem = "", str(error).partition(";")[0]
    for folder in (given, os.environ.get("XDG_RUNTIME_DIR", ""), *_SHORT):
        if not folder or len(os.fsencode(os.path.abspath(folder))) + _IN_FOLDER > _SOCKET_PATH:
            continue
        before, tempfile.tempdir = tempfile.tempdir, folder
        try:
            multiprocessing.util.get_temp_dir()  # made where tempfile says, kept, and removed at the end
        except OSError:
            continue
        finally:
            tempfile.tempdir = before
        if folder != given:
            note(f"{problem}; sockets are made in {folder}")
        return
    most = _SOCKET_PATH - _IN_FOLDER
    raise UserError(f"{problem}; set TMPDIR to a folder that you can write to, of at most {most} bytes")


def prepare_caches() -> None:
    """Give libraries a cache folder where the user's own cannot be made: a private one in the temporary folder.

    A user without a home folder, as in containers, or with a read-only one has none. XDG_CACHE_HOME and TRITON_HOME are
    set for this process and those that it starts. Call it before libraries that keep caches are imported.

    Raises:
        UserError: no folder can be made, or another user has one of that name; the message names the variable.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    cache = Path(named or os.path.expanduser("~/.cache"))  # stays "~/.cache" for a user without a home
    cause = f"XDG_CACHE_HOME={named}" if named else f"HOME={os.environ.get('HOME', '')}"
    if not _can_be_made(cache):
        folder = temporary_folder() / f"fat-pipeline-cache-{os.geteuid()}"
        remedy = "set XDG_CACHE_HOME to a folder of your own"
        try:
            create_private_folder(folder, remedy=remedy)
        except OSError as error:
            raise UserError(f"{cause} cannot be written, nor {folder} ({error.strerror}); {remedy}") from error
        note(f"{cause} cannot be written; caches are kept in {folder}")
        os.environ["XDG_CACHE_HOME"] = str(folder)
    # Triton knows a home folder of its own alone.
    if "TRITON_CACHE_DIR" not in os.environ and not _can_be_made(Path(os.path.expanduser("~/.triton"))):
        os.environ.setdefault("TRITON_HOME", os.environ.get("XDG_CACHE_HOME") or str(cache))


@functools.cache
def note(line: str) -> None:
    """Print a note on standard error: once, and of several ranks on the first."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            print(f"note: {printable(line)}", file=sys.stderr, flush=True)


def _wish() -> str:
    """The variable that names a temporary folder, as NAME=VALUE; empty where there is none."""
    name = next((name for name in _VARIABLES if os.environ.get(name)), None)
    return f"{name}={os.environ[name]}" if name else ""


def _can_be_made(folder: Path) -> bool:
    """Whether a folder can be written, or made; looks at what exists of its path."""
    if not folder.is_absolute():
        return False
    for place in (folder, *folder.parents):
        try:
            os.stat(place)
        except FileNotFoundError:
            if place.is_symlink():  # to a place that is not there
                return False
            continue
        except OSError:
            return False
        return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    return False
