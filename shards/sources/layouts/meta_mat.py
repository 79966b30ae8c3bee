"""ImageNet's meta.mat (MATLAB level 5), read by scipy in a process of its own.

scipy's parser ends its process (SIGSEGV) on some damaged files, and allocates whatever sizes a file states. The parent
passes the file by a pipe and gets JSON back; the child may use `MAX_MEMORY` and `MAX_SECONDS`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import Any

MAX_MEMORY = 2**32
"""Bytes of address space."""
MAX_SECONDS = 60
"""Of CPU time; the real file takes a second."""
NO_SCIPY = 3  # exit status


def read_synsets(meta: bytes) -> list[list[Any]]:
    """Read the rows ILSVRC2012_ID, WNID, words, num_children: int, str, str, int.

    Raises:
        ImportError: scipy is not installed.
        ValueError: one line on what is wrong with the file.
    """
    # -P: the folder of this file is not put on the path, where its neighbours would hide modules of other packages.
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
        raise ValueError(lines[-1] if lines else f"its parser ended with status {child.returncode}")  # of a signal: < 0
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
            raise ValueError(f"{type(value).__name__} where a number should be")
        return int(value)

    def text(value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{type(value).__name__} where text should be")
        return str(value)

    try:
        table = np.atleast_1d(loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True)["synsets"])
        rows = [
            [integer(row["ILSVRC2012_ID"]), text(row["WNID"]), text(row["words"]), integer(row["num_children"])]
            for row in table
        ]
    except Exception as error:  # scipy may raise anything on damaged data; the parent reports it
        sys.exit(f"{type(error).__name__}: {error}".replace("\n", " "))
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    _main()
