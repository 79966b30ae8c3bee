"""Describe in `--help` the effective default of an option whose default is None."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import tyro
from tyro import _strings as tyro_strings

# tyro joins the lines of a field's docstring only if they are not indented, so `--help` would break lines where the
# source does. If a later version moves this function, the help has more line breaks, and nothing else changes.
_join_lines: Callable[[str], str] | None = getattr(tyro_strings, "remove_single_line_breaks", None)
if _join_lines is not None:
    join: Callable[[str], str] = _join_lines
    tyro_strings.remove_single_line_breaks = lambda helptext: join(inspect.cleandoc(helptext))


def default(text: str) -> Any:
    """Return metadata for a field whose default is None, so that `--help` shows `(default: TEXT)`:

    lr: Annotated[float | None, default("5e-4 x global batch / 512")] = None
    """
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")
