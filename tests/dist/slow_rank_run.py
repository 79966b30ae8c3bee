"""A training that compares its ranks over a few seconds instead of a minute.

    slow_rank_run.py [options of launch/train.py]

The environment variable SLOW_DATA is the time in seconds by which the loader of rank 1 delays every batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from launch import train
from launch.monitor import metrics
from launch.stragglers.rank_times import RankTimes
from pipeline.loader import TrainLoader

WINDOW = 8.0


def main() -> int:
    metrics.RankTimes = partial(RankTimes, window=WINDOW)  # type: ignore[misc]
    delay = float(os.environ.get("SLOW_DATA", "0"))
    if delay and os.environ["RANK"] == "1":
        TrainLoader.__next__ = _delayed(TrainLoader.__next__, delay)  # type: ignore[method-assign]
    return train.main()


def _delayed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        time.sleep(seconds)
        return function(*args)

    return call


if __name__ == "__main__":
    raise SystemExit(main())
