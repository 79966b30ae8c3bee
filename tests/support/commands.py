"""Run commands in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

SMALL = ("--size", "32", "--augment", "light", "--global-batch", "32", "--epochs", "1", "--warmup-epochs", "0")
"""Training options for one short epoch of the digits."""


def run(main: Callable[[], int], *args: object) -> int:
    """Call a command's `main` with these arguments; return its exit status.

    Environment variables and the number of threads are restored afterwards.
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
    from launch.cli import main as pipeline  # imported here because the kernel tests do not have all its libraries

    status = pipeline([str(arg) for arg in args])
    assert status == 0, f"pipeline {' '.join(map(str, args))}: exit status {status}"
