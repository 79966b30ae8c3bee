"""A training run in which something goes wrong, on purpose.

    provoke.py nan|drift|disk|slow|ask|record|stall [options of launch/train.py]

nan: the images of steps 3, 6, 7, 8 hold a NaN. drift: rank 1's weights are disturbed after step 3. disk: no large
file can be written during steps 4 and 5. slow: every step
after the first takes a minute. ask: the run is asked to leave in the middle of its first evaluation, of the moving
average if it has one. record: every rank writes what it was fed to RUN/fed-RANK.jsonl. stall: no training; prints how
long a save holds the caller.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import xxhash

import launch.run.folder
import launch.train
from launch.config.command_line import parse
from launch.engine.build import build_model
from launch.engine.engine import Engine, StepResult
from launch.machine.world import connect
from launch.run.checkpoint import Fingerprint
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.checkpoint_writer import BackgroundWriter
from launch.run.progress import Progress

BAD_STEPS = {2, 5, 6, 7}
original_step = Engine.step
original_evaluate = Engine.evaluate


def nan_step(engine: Engine, batches: Any, *, step: int, lr: float) -> StepResult:
    if step in BAD_STEPS:
        images = batches[0].images.clone()
        images[0, 0, 0, 0] = float("nan")
        batches = [dataclasses.replace(batches[0], images=images), *batches[1:]]
    return original_step(engine, batches, step=step, lr=lr)


def drifting_step(engine: Engine, batches: Any, *, step: int, lr: float) -> StepResult:
    result = original_step(engine, batches, step=step, lr=lr)
    if step == 2 and engine.world.rank == 1:
        with torch.no_grad():
            next(engine.model.parameters()).mul_(1.001)
    return result


def step_on_a_full_disk(engine: Engine, batches: Any, *, step: int, lr: float) -> StepResult:
    full = step in (3, 4)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    result = original_step(engine, batches, step=step, lr=lr)
    if step in (2, 4):  # the saves of steps 2 (well) and 4 (on the full disk) end now
        writers[-1].wait()
    return result


writers: list[BackgroundWriter] = []


class KnownWriter(BackgroundWriter):
    """Is the last of `writers`."""

    def __init__(self, folder: CheckpointFolder) -> None:
        super().__init__(folder)
        writers.append(self)


def slow_step(engine: Engine, batches: Any, *, step: int, lr: float) -> StepResult:
    for _ in range(60 if step else 0):
        time.sleep(1)
    return original_step(engine, batches, step=step, lr=lr)


def interrupted_evaluation(engine: Engine, batches: Any, *, average: bool = False) -> dict[str, float] | None:
    def with_a_request() -> Any:
        for number, batch in enumerate(batches):
            if number == 5 and average == ("--ema" in sys.argv):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return original_evaluate(engine, with_a_request(), average=average)


def recorded_step(engine: Engine, batches: Any, *, step: int, lr: float) -> StepResult:
    world = engine.world
    entry = {
        "step": step,
        "rank": world.rank,
        "world": world.size,
        "ids": [int(i) for batch in batches for i in batch.ids],
        "pixels": [xxhash.xxh3_64_hexdigest(x.contiguous().numpy().data) for batch in batches for x in batch.images],
    }
    with (parse(sys.argv[1:]).run.out / f"fed-{world.rank}.jsonl").open("a") as log:
        log.write(json.dumps(entry) + "\n")
    return original_step(engine, batches, step=step, lr=lr)


def measure_stall() -> None:
    recipe = parse(sys.argv[1:])
    world = connect()
    model = build_model(recipe, 1000)
    engine = Engine(model, recipe, world, micro_batch=1, accumulation=1)
    times = []
    with tempfile.TemporaryDirectory() as folder:
        writer = BackgroundWriter(CheckpointFolder(Path(folder), keep=1))
        for number in range(5):
            writer.wait()
            begun = time.perf_counter()  # what RunFolder.save does after waiting
            state = engine.state_dict()
            writer.save(state, Progress(step=number + 1, epoch_step=number + 1), Fingerprint({}, {}))
            times.append(time.perf_counter() - begun)
        writer.close()
    size = sum(tensor.nbytes for tensor in state.values()) / 1e6
    milliseconds = 1e3 * statistics.median(times) / size * 100
    print(json.dumps({"megabytes": size, "milliseconds_per_100_megabytes": milliseconds}))


def main() -> int:
    kind = sys.argv.pop(1)
    if kind == "stall":
        measure_stall()
        return 0
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with EFBIG instead
    steps = {
        "nan": nan_step,
        "drift": drifting_step,
        "disk": step_on_a_full_disk,
        "slow": slow_step,
        "ask": original_step,
        "record": recorded_step,
    }
    Engine.step = steps[kind]  # type: ignore[method-assign]
    if kind == "disk":
        launch.run.folder.BackgroundWriter = KnownWriter  # type: ignore[misc]
    if kind == "ask":
        Engine.evaluate = interrupted_evaluation  # type: ignore[method-assign]
    return launch.train.main()


if __name__ == "__main__":
    sys.exit(main())
