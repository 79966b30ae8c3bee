"""`pipeline doctor` on ranks of which one has too little memory for the messages between ranks.

doctor_run.py FILE (of --json)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from launch.doctor import measure
from launch.doctor.options import Doctor


def main() -> int:
    if os.environ["RANK"] == "1":
        measure.reserve_memory = _fail
    return Doctor(json=Path(sys.argv[1])).run([])


def _fail(device: torch.device) -> bool:
    raise torch.OutOfMemoryError(f"{device}: out of memory")
