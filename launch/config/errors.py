"""The error for a contradictory or invalid configuration."""

from __future__ import annotations

from shards.errors import UserError


class RecipeError(UserError):
    """Options that are invalid or contradict one another."""
