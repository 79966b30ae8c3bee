"""The console on which commands print wide tables."""

from __future__ import annotations

import os
import sys

from rich.console import Console

WIDTH_IN_FILE = 120
"""Width in a file or a pipe, such as srun's, unless COLUMNS sets another one."""


def table_console() -> Console:
    """Return a console on stdout that does not cut the tables to 80 columns where there is no terminal."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH_IN_FILE
    return Console(highlight=False, width=width)
