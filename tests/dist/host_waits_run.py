"""One rank of a small training run that counts the waits of the host in its steps (tests/support/host_waits.py).

    host_waits_run.py OUT.json RUN --data SET [options of launch/train.py]

On a GPU, CUDA's own check of synchronization also raises an error at a wait. Rank 0 writes {stack: count} to OUT.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from launch.machine.world import connect, disconnect
from tests.support.host_waits import HostWaits
from tests.support.training_loop import training

GLOBAL = 8
WARM_UP = 4  # DeepSpeed's timers start in the third step
STEPS = 2


def main() -> None:
    out, run, _, data, *options = sys.argv[1:]
    world = connect()
    gpu = world.device.type == "cuda"
    with training(Path(data), Path(run), *options, batch=GLOBAL, world=world) as step:
        for _ in range(WARM_UP):
            step()
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        with HostWaits() as waits:
            for _ in range(STEPS):
                step()
        if gpu:
            torch.cuda.set_sync_debug_mode("default")
    if world.is_main:
        # The ranks agree on whether to stop (preemption) through a tensor in host memory, which is no wait for a GPU.
        found = {stack: count for stack, count in waits.found.items() if "launch/resilience/preempt.py" not in stack}
        Path(out).write_text(json.dumps(found))
    disconnect()


if __name__ == "__main__":
    main()
