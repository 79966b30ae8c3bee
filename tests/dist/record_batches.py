"""A rank that records its batches instead of training: one JSON line per step, until it ends or is killed.

    record_batches.py OUT train|eval START STOP PACE [options of launch/train.py]

A training starts at step START and ends before STOP; an evaluation starts with sample START. After each step the rank
sleeps PACE seconds. Rank R writes OUT/rank-R.jsonl; its last line is "done".
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from launch.config.command_line import parse
from launch.feed import Feed
from launch.machine.world import World
from pipeline.batch import Batch


def main() -> None:
    out, kind, start, stop, pace, *options = sys.argv[1:]
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    feed = Feed.of(parse(options), World(rank, size, rank, size, torch.device("cpu")))
    record(feed, Path(out), kind, int(start), int(stop), pace=float(pace))


def record(feed: Feed, out: Path, kind: str, start: int, stop: int, *, pace: float) -> None:
    with (out / f"rank-{feed.world.rank}.jsonl").open("w") as log:

        def write(content: object) -> None:
            log.write(json.dumps(content) + "\n")
            log.flush()
            time.sleep(pace)

        if kind == "train":
            with feed.train_loader(step=start, dtype=torch.float32) as loader:
                for step in range(start, stop):
                    batches = [next(loader) for _ in range(feed.shape.accumulation)]
                    assert {feed.plan.steps_before(batch.position) for batch in batches} == {step}
                    write({"step": step, "state": loader.state_dict(), **contents(batches)})
        else:
            loader = feed.eval_loader(dtype=torch.float32)
            assert loader is not None
            with loader:
                loader.load_state_dict(loader.state_dict() | {"samples": start})
                for step, batch in enumerate(loader):
                    write({"step": step, "state": loader.state_dict(), **contents([batch])})
        write("done")


def contents(batches: list[Batch]) -> dict[str, list[Any]]:
    """Return the id and a hash of the image of each row that has a sample."""
    ids = np.concatenate([batch.ids for batch in batches])
    images = torch.cat([batch.images for batch in batches])
    shown = torch.cat([batch.mask for batch in batches]).numpy()
    hashes = [xxhash.xxh3_64_hexdigest(image.contiguous().numpy().data) for image in images[shown]]
    return {"ids": ids[shown].tolist(), "pixels": hashes}


if __name__ == "__main__":
    main()
