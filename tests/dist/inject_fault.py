"""A training run with an injected fault.

inject_fault.py nan|drift|disk|slow|blocked|start|stop|record|stall [options of launch/train.py]

nan       the images of steps 3, 6, 7 and 8 contain a NaN
drift     the weights of rank 1 are changed after step 3
disk      no large file can be written during steps 4 and 5
slow      every step after the first takes a minute
blocked   every step after the first blocks in a C library, until the file RUN/unblock exists
start     SIGTERM arrives while the model is built
stop      the run is preempted in the middle of its first evaluation (of the EMA weights if there are any)
record    no fault: every rank writes the ids and image hashes of its batches to RUN/fed-RANK.jsonl
stall     no training: print how long a save blocks the caller
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import resource
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import xxhash

import fat
import launch.resume.folder
import launch.train
from launch.config.command_line import parse
from launch.engine.build import build_model
from launch.engine.engine import Engine, StepResult
from launch.engine.input_shapes import InputShape
from launch.machine.simple_launcher import LAUNCHER
from launch.machine.world import connect
from launch.run.checkpoint import Fingerprint
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.checkpoint_writer import BackgroundWriter
from launch.run.progress import Progress
from launch.run.weights_files import WeightsFiles
from tests.support.waiting import wait_until

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
    if step in (2, 4):  # wait for the saves of step 2 (succeeds) and step 4 (fails on the full disk)
        writers[-1].wait()
    return result


writers: list[BackgroundWriter] = []


class RecordedWriter(BackgroundWriter):
    """Writer that appends itself to `writers`."""

    def __init__(self, folder: CheckpointFolder, weights: WeightsFiles, **options: Any) -> None:
        super().__init__(folder, weights, **options)
        writers.append(self)


def slow_step(engine: Engine, batches: Any, *, step: int, lr: float) -> StepResult:
    for _ in range(60 if step else 0):
        time.sleep(1)
    return original_step(engine, batches, step=step, lr=lr)


def blocked_step(engine: Engine, batches: Any, *, step: int, lr: float) -> StepResult:
    if step:
        library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        library.pthread_mutex_lock(mutex)

        def unlock() -> None:
            wait_until((parse(sys.argv[1:]).run.out / "unblock").exists)
            library.pthread_mutex_unlock(mutex)

        threading.Thread(target=unlock, daemon=True).start()
        library.pthread_mutex_lock(mutex)  # not interrupted by signals, and Python does not run meanwhile
    return original_step(engine, batches, step=step, lr=lr)


def interrupted_evaluation(
    engine: Engine, batches: Any, *, average: bool = False, **options: Any
) -> dict[str, float] | None:
    def batches_with_request() -> Any:
        for number, batch in enumerate(batches):
            if number == 5 and average == ("--ema" in sys.argv):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return original_evaluate(engine, batches_with_request(), average=average, **options)


def terminated(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


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
    engine = Engine(model, recipe, world, shapes=[InputShape(1, 32, 1)])
    times = []
    with tempfile.TemporaryDirectory() as folder:
        writer = BackgroundWriter(CheckpointFolder(Path(folder), keep=1), WeightsFiles(Path(folder), fat.WeightsInfo()))
        for number in range(5):
            writer.wait()
            begun = time.perf_counter()  # the part of RunFolder.save after waiting
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
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails with EFBIG
    steps = {
        "nan": nan_step,
        "drift": drifting_step,
        "disk": step_on_a_full_disk,
        "slow": slow_step,
        "blocked": blocked_step,
        "start": original_step,
        "stop": original_step,
        "record": recorded_step,
    }
    Engine.step = steps[kind]  # type: ignore[method-assign]
    if kind == "disk":
        launch.resume.folder.BackgroundWriter = RecordedWriter  # type: ignore[misc]
    if kind == "start":
        launch.train.check_training_kernels = terminated
    if kind == "stop":
        Engine.evaluate = interrupted_evaluation  # type: ignore[method-assign]
    return launch.train.main()


if __name__ == "__main__":
    LAUNCHER.attach()  # as launch/train.py does
    sys.exit(main())
