"""`pipeline shard` as a process of its own, and its workers."""

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
"""What `pipeline shard` does, without what the other commands import."""


def descendants(pid: int) -> list[int]:
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [below for child in children for below in descendants(child)]


def workers_of(pid: int) -> list[int]:
    """Those below the fork server, which is the one that has any."""
    return [below for child in descendants(pid) for below in descendants(child)]
