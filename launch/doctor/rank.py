"""Script of the processes that `pipeline doctor` starts: the command itself, as one rank of several."""

from __future__ import annotations

import sys
from pathlib import Path

# Python puts a script's folder first on the import path; imports need the project's root there instead.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
