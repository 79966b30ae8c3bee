"""Call the commands in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

SMALL = ("--size", "32", "--augment", "light", "--global-batch", "32", "--epochs", "1", "--warmup-epochs", "0")
"""Options of training that make one short epoch of the digits."""


def run(main: Callable[[], int], *args: object) -> int:
    """Call a command's `main` with these arguments; return its exit status.

    The variables and the threads that it sets for the rest of its process are put back.
    """
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        patch.setattr(sys, "argv", ["command", *map(str, args)])
        try:
            return int(main())
        finally:
            torch.set_num_threads(threads)


def run_pipeline(*args: str | Path) -> None:
    """Run `pipeline ARGS`, which must succeed."""
    from launch.cli import main as pipeline  # many libraries, which tests of kernels do without

    status = pipeline([str(arg) for arg in args])
    assert status == 0, f"pipeline {' '.join(map(str, args))}: exit status {status}"
