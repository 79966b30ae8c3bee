"""Run `pipeline shard` in a separate process, and find its worker processes."""

from __future__ import annotations

from pathlib import Path

DRIVER = """
import sys, tyro
from shards.commands.command_line import Shard
from shards.errors import UserError
try:
    sys.exit(tyro.cli(Shard).run())
except UserError as error:
    sys.exit(f"error: {error}")
"""
"""Program that runs `pipeline shard` without importing the other commands."""


def descendants(pid: int) -> list[int]:
    """Return the pids of all child processes, recursively."""
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [below for child in children for below in descendants(child)]


def workers_of(pid: int) -> list[int]:
    """Return the pids of the worker processes: the children of the fork server, the only child with children."""
    return [below for child in descendants(pid) for below in descendants(child)]
