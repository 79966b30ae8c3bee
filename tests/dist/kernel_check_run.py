"""One of two ranks on which different kernel families fail the self-check: `kernel_check_run.py OUT`.

Every rank writes OUT/RANK.json: its verdict, and the families that are switched off on it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch

import fat
from fat import kernels
from fat.config import FATConfig
from fat.kernels import families, selfcheck
from fat.kernels.selfcheck import Failure
from launch.engine.kernel_check import check_kernels
from launch.machine.world import connect, disconnect

FAILS = {0: families.NORM, 1: families.GATE}
NET = FATConfig(widths=(8, 8, 8, 8), depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), windows=(2, 1, 1, 1), num_classes=3)


def main() -> None:
    world = connect()
    failed = [Failure(FAILS[world.rank], "operator", "map 2x8x9x9", "float32", f"wrong on rank {world.rank}")]
    model = fat.create_model(NET)
    with mock.patch.object(kernels, "supported", return_value=True), mock.patch.object(selfcheck, "run") as run:
        run.return_value = failed
        # With one rank per node, every rank runs the self-check; with two ranks on one node, only the first does.
        apart = check_kernels(model, replace(world, local_rank=0), sizes=[64], dtype=torch.float32)
        off = sorted(kernels.switched_off())
        passes = [lambda: None]
        together = check_kernels(model, world, sizes=[64], dtype=torch.float32, gradients=False, passes=passes)
    found = {"apart": asdict(apart), "off": off, "together": asdict(together), "comparisons": run.call_count}
    (Path(sys.argv[1]) / f"{world.rank}.json").write_text(json.dumps(found))
    disconnect()


if __name__ == "__main__":
    main()
