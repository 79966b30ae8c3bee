"""Read ImageNet's meta.mat (MATLAB level 5) with scipy, in a separate process.

scipy's parser crashes (SIGSEGV) on some damaged files and allocates any size that a file states. The parent process
sends the file through a pipe and receives JSON; the child process is limited to `MAX_MEMORY` and `MAX_SECONDS`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import Any

MAX_MEMORY = 2**32
"""Maximum bytes of address space of the child process."""
MAX_SECONDS = 60
"""Maximum CPU seconds of the child process; the real file takes one second."""
NO_SCIPY = 3  # exit status if scipy is not installed


def read_synsets(meta: bytes) -> list[list[Any]]:
    """Read the rows ILSVRC2012_ID, WNID, words, num_children: int, str, str, int.

    Raises:
        ImportError: scipy is not installed.
        ValueError: the file is damaged; the message is one line.
    """
    # -P: without it, this folder would be on sys.path, and its modules would shadow other packages.
    child = subprocess.run(
        [sys.executable, "-P", __file__],
        input=meta,
        capture_output=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    if child.returncode == NO_SCIPY:
        raise ImportError("scipy")
    if child.returncode:
        lines = child.stderr.decode(errors="replace").strip().splitlines()
        # A negative status is the number of the signal that ended the child process.
        raise ValueError(lines[-1] if lines else f"its parser ended with status {child.returncode}")
    rows: list[list[Any]] = json.loads(child.stdout)
    return rows


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        from scipy.io import loadmat
    except ImportError:
        sys.exit(NO_SCIPY)
    import io

    import numpy as np

    def integer(value: object) -> int:
        if not isinstance(value, int | np.integer):
            raise ValueError(f"expected a number, found {type(value).__name__}")
        return int(value)

    def text(value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"expected text, found {type(value).__name__}")
        return str(value)

    try:
        table = np.atleast_1d(loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True)["synsets"])
        rows = [
            [integer(row["ILSVRC2012_ID"]), text(row["WNID"]), text(row["words"]), integer(row["num_children"])]
            for row in table
        ]
    except Exception as error:  # scipy raises exceptions of any type on damaged data; the parent reports them
        sys.exit(f"{type(error).__name__}: {error}".replace("\n", " "))
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    _main()
