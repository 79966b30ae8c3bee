"""Increase the limit of open files, and divide it among the components of a process.

Shells and containers often start programs with a soft limit of 1024 or 256, far below the hard limit.
"""

from __future__ import annotations

import resource

TARGET_LIMIT = 4096
"""Sufficient limit of open files. A much larger one slows down libraries that iterate over all possible descriptors."""
RECOMMENDED_LIMIT = 1024
"""Limit of open files that is enough for every command; recommended in messages."""
_COMPONENTS = 4  # a quarter of the limit for each of two shard readers (training, evaluation), half for other files
_MIN_FILES = 4


def raise_limit() -> None:
    """Increase the soft limit of open files to `TARGET_LIMIT`, or to the hard limit. Child processes inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = TARGET_LIMIT if hard == resource.RLIM_INFINITY else min(TARGET_LIMIT, hard)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def limit() -> int:
    """Return the soft limit of open files; -1: no limit."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def how_to_raise_limit() -> str:
    """Return, for messages, the command that increases the limit of open files, or advice for an administrator."""
    recommended = max(RECOMMENDED_LIMIT, 2 * limit())
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or recommended <= hard:
        return f"'ulimit -n {recommended}'"
    return (
        f"'ulimit -n' allows {hard} at most: an administrator can change /etc/security/limits.conf, or start the "
        f"container with --ulimit nofile={recommended}"
    )


def open_file_budget(most: int) -> int:
    """Return how many files one component may keep open: `most`, or fewer if the limit is low."""
    soft = limit()
    return most if soft == resource.RLIM_INFINITY else min(most, max(_MIN_FILES, soft // _COMPONENTS))
