"""Say in `--help` what an option that is None by default amounts to."""

from __future__ import annotations

from typing import Any

import tyro


def default(text: str) -> Any:
    """Metadata of a field whose default is None: `--help` shows `(default: TEXT)`.

    lr: Annotated[float | None, default("5e-4 x global batch / 512")] = None
    """
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")
