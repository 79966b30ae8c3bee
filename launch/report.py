"""Plot the curves of a run: `python -m launch.report RUN` writes RUN/curves.png."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from shards.interrupt import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()

import tyro

from launch.monitor.curves import draw_curves
from shards.errors import UserError, report
from shards.option_help import default
from shards.redact import printable, protect_output


@dataclass(frozen=True)
class Report:
    """Plot loss, accuracy and learning rate of a run."""

    run: tyro.conf.Positional[Path]
    """Run folder whose metrics are plotted."""
    out: Annotated[Path | None, default("RUN/curves.png")] = None
    """Figure to write: .png, .pdf or .svg."""


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
