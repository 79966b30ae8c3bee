"""Describe the owners and modes of files in error messages."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path


def user_name(uid: int) -> str:
    """Return "user NAME", or "user NUMBER" if the user has no name, which is common in containers."""
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def describe_owner(found: os.stat_result) -> str:
    """Return the kind (file or folder), user, group and mode of a file as text."""
    try:
        group = grp.getgrgid(found.st_gid).gr_name
    except KeyError:
        group = str(found.st_gid)
    kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a file"
    return f"{kind} of {user_name(found.st_uid)}, group {group}, mode {stat.S_IMODE(found.st_mode):04o}"


def describe_obstacle(path: Path | str) -> str:
    """Describe the file or parent folder whose permissions deny this process access to `path`.

    Returns:
        Its owner and mode as text; empty if it cannot be determined.
    """
    for candidate in (Path(path), *Path(path).parents):
        try:
            found = os.stat(candidate)
        except PermissionError:
            continue
        except (OSError, ValueError):
            return ""
        return describe_owner(found) if candidate == Path(path) else f"{candidate} is {describe_owner(found)}"
    return ""
