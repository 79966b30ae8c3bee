"""Describe in `--help` the effective default of an option whose default is None."""

from __future__ import annotations

from typing import Any

import tyro


def default(text: str) -> Any:
    """Return metadata for a field whose default is None, so that `--help` shows `(default: TEXT)`:

    lr: Annotated[float | None, default("5e-4 x global batch / 512")] = None
    """
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")
