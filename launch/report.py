"""Draw the curves of a run: `python -m launch.report RUN` writes RUN/curves.png."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from launch.run.curves import draw_curves
from shards.errors import UserError, report
from shards.redact import printable, protect_output


@dataclass(frozen=True)
class Report:
    """Draw loss, accuracy and learning rate of a run."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    out: Path | None = None
    """Picture to write. None = RUN/curves.png."""


def main() -> int:
    protect_output()
    try:
        command = tyro.cli(Report)
        print(printable(draw_curves(command.run, command.out)))
    except UserError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
