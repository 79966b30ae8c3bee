"""Whose a file is, for messages: names of users and groups where they have any, numbers where they have none."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path


def user_name(uid: int) -> str:
    """Return "user NAME", or "user NUMBER" where the number has no name, as often in containers."""
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def describe_owner(found: os.stat_result) -> str:
    """Describe a file or folder: its user, group and mode."""
    try:
        group = grp.getgrgid(found.st_gid).gr_name
    except KeyError:
        group = str(found.st_gid)
    kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a file"
    return f"{kind} of {user_name(found.st_uid)}, group {group}, mode {stat.S_IMODE(found.st_mode):04o}"


def describe_obstacle(path: Path | str) -> str:
    """Describe what keeps this process from a file: the file itself, or the folder above it that nobody may enter.

    Returns:
        Empty where the system does not say.
    """
    for place in (Path(path), *Path(path).parents):
        try:
            found = os.stat(place)
        except PermissionError:
            continue
        except (OSError, ValueError):
            return ""
        return describe_owner(found) if place == Path(path) else f"{place} is {describe_owner(found)}"
    return ""
