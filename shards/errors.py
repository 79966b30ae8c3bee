"""Errors that a person can act on: one clear line, and an exit status that means it."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message names the file, the fact and the remedy; command lines print it alone and exit with 2."""

    exit_code = 2


class ShardSetError(UserError):
    """A shard set that does not fit its manifest, or whose manifest does not fit this version."""


class ConversionFailed(UserError):
    """The input was understood, but the job could not be finished as asked (too many rejects, disk full)."""

    exit_code = 1
