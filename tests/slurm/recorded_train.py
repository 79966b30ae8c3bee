"""launch/train.py whose ranks record their batches, with optional injected faults.

    recorded_train.py [options of launch/train.py]

Rank R appends a line per step to RUN/fed-R.jsonl: start of the job, world size, node, rendezvous, ids and hashes of its
images. Environment variables: PACE: minimum seconds per step; CRASH_AT: step in which rank 0 raises an exception;
HANG_AT: step in which rank 1 sleeps for ever (only in the first start of a job); CRASH_ON_STOP: rank 0 raises an
exception when it is asked to stop (only in the first start).
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
import xxhash

import launch.train
from launch.config.command_line import parse
from launch.engine.engine import Engine, StepResult
from launch.resilience.preempt import Preemption

original_step, original_consume = Engine.step, Preemption._consume
START = int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def step(engine: Engine, batches: Any, *, step: int, lr: float) -> StepResult:
    world = engine.world
    entry = {
        "step": step,
        "start": START,
        "rank": world.rank,
        "world": world.size,
        "node": os.environ.get("SLURMD_NODENAME"),
        "node_id": os.environ.get("SLURM_NODEID"),
        "rendezvous": f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
        "threads": [world.cores, torch.get_num_threads(), int(os.environ["OMP_NUM_THREADS"])],
        "ids": [int(i) for batch in batches for i in batch.ids],
        "pixels": [xxhash.xxh3_64_hexdigest(x.contiguous().numpy().data) for batch in batches for x in batch.images],
    }
    with (RUN / f"fed-{world.rank}.jsonl").open("a") as log:
        log.write(json.dumps(entry) + "\n")
    if step == int(os.environ.get("CRASH_AT", "-1")) and world.rank == 0:
        raise RuntimeError("injected fault")
    if step == int(os.environ.get("HANG_AT", "-1")) and world.rank == 1 and START == 0:
        hang()
    time.sleep(float(os.environ.get("PACE", "0")))
    return original_step(engine, batches, step=step, lr=lr)


def consume(preemption: Preemption, name: str) -> bool:
    """Remove a request file; raise an exception after a request to stop."""
    found = original_consume(preemption, name)
    if found and name == "PREEMPT" and "CRASH_ON_STOP" in os.environ and START == 0:
        raise RuntimeError("injected fault")
    return found


def hang() -> None:
    """Sleep for ever, under a name that the test finds in the stacks."""
    while True:
        time.sleep(1)


if __name__ == "__main__":
    RUN = parse(sys.argv[1:]).run.out
    Engine.step = step  # type: ignore[method-assign]
    Preemption._consume = consume  # type: ignore[method-assign]
    sys.exit(launch.train.main())
