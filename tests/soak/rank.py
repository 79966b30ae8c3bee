"""A rank of the soak: `launch/train.py` that records its batches, with steps of a minimum duration.

    rank.py RECORD PACE [options of launch/train.py]

For every step of rank R, RECORD/start-START-rank-R.jsonl gets a line before the step, with the sample ids and the
hashes of its images, and a line after it. START is the environment variable SOAK_START. A step that has not taken PACE
seconds is extended to that, so that failures can happen in it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import xxhash

import launch.train
from launch.engine.engine import Engine, StepResult
from launch.resilience import watchdog

# The watchdog waits this long for the heartbeats of all ranks; the default, 20 s, is for slow shared storage.
ANSWER_SECONDS = 6.0

original_step = Engine.step


class Recorder:
    """Writes the record of this rank.

    Args:
        folder: folder for the records, on a disk that is never slow or full.
        pace: minimum duration of a step in seconds.
    """

    def __init__(self, folder: Path, pace: float) -> None:
        self._folder, self._pace = folder, pace
        self._file: IO[str] | None = None

    def step(self, engine: Engine, batches: Any, *, step: int, lr: float) -> StepResult:
        """Do a step, and record it before and after."""
        began, rank = time.monotonic(), engine.world.rank
        if self._file is None:
            path = self._folder / f"start-{os.environ['SOAK_START']}-rank-{rank}.jsonl"
            self._file = path.open("a", buffering=1)
        ids = np.concatenate([batch.ids for batch in batches]).tolist()
        pixels = [xxhash.xxh3_64_hexdigest(x.contiguous().numpy().data) for batch in batches for x in batch.images]
        # Before the step, so that no checkpoint contains a step that is missing in the record.
        self._write(kind="begin", step=step, rank=rank, world=engine.world.size, ids=ids, pixels=pixels)
        result = original_step(engine, batches, step=step, lr=lr)
        time.sleep(max(0.0, began + self._pace - time.monotonic()))
        now = time.monotonic()  # the same clock in all processes, unlike the one that the soak moves
        self._write(kind="done", step=step, rank=rank, time=now, seconds=now - began)
        return result

    def _write(self, **entry: object) -> None:
        assert self._file is not None
        self._file.write(json.dumps(entry) + "\n")


def main() -> int:
    record, pace = Path(sys.argv.pop(1)), float(sys.argv.pop(1))
    watchdog.ANSWER_SECONDS = ANSWER_SECONDS
    watchdog.REPORT_SECONDS = ANSWER_SECONDS + 5.0
    torch.set_num_threads(1)
    recorder = Recorder(record, pace)

    def step(engine: Engine, batches: Any, *, step: int, lr: float) -> StepResult:  # a function becomes a method
        return recorder.step(engine, batches, step=step, lr=lr)

    Engine.step = step  # type: ignore[method-assign]
    return launch.train.main()


if __name__ == "__main__":
    sys.exit(main())
