"""How many files this process may have open: the limit is raised as far as allowed, and shared out among its parts.

Shells and containers often start programs with a soft limit of 1024, or 256, far below the hard one.
"""

from __future__ import annotations

import resource

WANTED = 4096
"""Enough for every part of a run; far more would slow down libraries that look at each number up to the limit."""
ENOUGH = 1024
"""Enough for any command; what messages ask for."""
_PARTS = 4  # two readers of shards (training, evaluation) and as much again for libraries, sockets and the rest
_FEWEST = 4


def raise_limit() -> None:
    """Raise this process's limit of open files, and that of processes that it starts, to `WANTED` where it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def limit() -> int:
    """Return the number of files that this process may have open; -1 = no limit."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def how_to_raise_limit() -> str:
    """Return the command that raises the limit, for messages, or who can raise it."""
    wanted = max(ENOUGH, 2 * limit())
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or wanted <= hard:
        return f"'ulimit -n {wanted}'"
    return f"'ulimit -n' allows {hard} at most: /etc/security/limits.conf, or --ulimit nofile={wanted} of a container"


def open_file_budget(most: int) -> int:
    """Return how many files a part of this process may keep open: `most`, or fewer under a low limit."""
    soft = limit()
    return most if soft == resource.RLIM_INFINITY else min(most, max(_FEWEST, soft // _PARTS))
