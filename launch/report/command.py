"""`pipeline report RUN`: one HTML page about one run, or about several runs in comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from shards.errors import UserError
from shards.files.output import check_output, write_output
from shards.option_help import default
from shards.redact import printable


@dataclass(frozen=True)
class Report:
    """Write a report of a run, or a comparison of several runs, as one HTML file that needs no other file and no
    network."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders (--out of trainings)."""
    out: Path = Path("report.html")
    """HTML file to write."""
    png: Annotated[Path | None, default("not written")] = None
    """Figure of the curves to write as well: .png, .pdf or .svg."""

    def run(self) -> int:
        from launch.monitor.curves import FORMATS, figure
        from launch.report.loaded_run import load_runs
        from launch.report.page import render

        check_output(self.out, "--out", (".html", ".htm"), default=Report.out)
        if self.png is not None:
            check_output(self.png, "--png", FORMATS)
        if not self.runs:
            raise UserError("no run folder is given; name one or more, as in: pipeline report runs/fat")
        runs = load_runs(self.runs)
        write_output(self.out, render(runs).encode("utf-8", "backslashreplace"), "--out")
        print(printable(f"wrote {self.out}"))
        if self.png is not None:
            write_output(self.png, figure([run.timeline for run in runs], self.png.suffix[1:].lower()), "--png")
            print(printable(f"wrote {self.png}"))
        return 0
