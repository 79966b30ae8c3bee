"""Standard streams that are closed, unread or on a full disk do not end a run (launch/machine/standard_streams.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launching import ROOT, environment

CODE = """
import sys
from launch.machine.standard_streams import ignore_failing_output, open_missing_streams
open_missing_streams()
with open({file!r}, "w") as file:
    ignore_failing_output()
    for stream in (sys.stdout, sys.stderr):
        print("a line with \\u00fc" * 1000, file=stream, flush=True)
    assert file.fileno() > 2
    file.write("whole")
"""


@pytest.mark.parametrize(
    "redirection", ["", ">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full", "2>/dev/full", "| true", "2>&1 >/dev/full | true"]
)
def test_a_stream_that_cannot_be_written_raises_nothing(tmp_path: Path, redirection: str) -> None:
    script, file = tmp_path / "script.py", tmp_path / "file"
    script.write_text(CODE.format(file=str(file)))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} {script} {redirection}"],
        cwd=ROOT,
        env=environment(tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert file.read_text() == "whole"
    assert "Traceback" not in done.stderr
