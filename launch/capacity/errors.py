"""Errors of `pipeline capacity`."""

from shards.errors import UserError


class CapacityError(UserError):
    """The options contradict each other, or nothing can be predicted with them."""
