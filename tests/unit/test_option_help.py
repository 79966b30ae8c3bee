"""`--help` texts of options."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_help_joins_the_lines_of_a_docstring() -> None:
    """tyro alone would break the text where the source does, in the middle of sentences."""
    command = [sys.executable, "launch/train.py", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line.strip("│ ") for line in shown.splitlines()]
    words = " ".join(" ".join(lines).split())
    assert "The classifier is kept if its classes are those of the data set. (default: random initialization)" in words
    start = next(number for number, line in enumerate(lines) if line.startswith("--weights"))
    end = next(number for number, line in enumerate(lines) if line.startswith("--classes"))
    text = lines[start + 1 : end - 1]
    assert all(len(line) > 35 for line in text), f"a short line inside a paragraph: {text}"
