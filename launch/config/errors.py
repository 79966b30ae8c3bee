"""The error that a contradictory or impossible configuration raises."""

from __future__ import annotations

from shards.errors import UserError


class RecipeError(UserError):
    """Options that contradict one another or make no sense."""
