"""One rank of a run that consists of collectives and a watchdog only, for tests that stop ranks.

    watchdog_run.py RUN TIMEOUT STEPS [BUSY_STEP]

Appends each step to RUN/steps-RANK. In step BUSY_STEP, rank 1 skips the collective but still records progress.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from launch.machine.world import connect, run_command
from launch.resilience import watchdog
from launch.resilience.watchdog import Watchdog

watchdog.ANSWER_SECONDS = 6.0  # shorter than the default, which allows for slow shared storage


def main() -> int:
    run, timeout, steps, busy_step = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    world = connect()
    with Watchdog(run, world, timeout=timeout) as dog, (run / f"steps-{world.rank}").open("w") as log:
        for step in range(1, steps + 1):
            if step == busy_step and world.rank == 1:
                busy(dog)
            dist.all_reduce(torch.ones(1))
            dog.beat(step)
            print(step, file=log, flush=True)
            time.sleep(0.05)
    return 0


def busy(dog: Watchdog) -> None:
    """Loop forever, under a name that the test finds in the stacks."""
    while True:
        dog.beat()
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(run_command(main))
