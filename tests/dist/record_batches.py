"""One rank of a run that trains nothing: writes what it was fed, one JSON line per micro-batch.

record_batches.py OUT_DIR STEPS START_STEP [options of launch/train.py]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import xxhash

from launch.command_line import parse
from launch.feed import Feed
from launch.world import connect, disconnect


def main() -> None:
    out, steps, start = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    world = connect()
    feed = Feed.of(parse(sys.argv[4:]), world)
    with (
        feed.train_loader(step=start, dtype=torch.float32) as loader,
        (out / f"world{world.size}-from{start}-rank{world.rank}.jsonl").open("w") as log,
    ):
        for _ in range((steps - start) * feed.shape.accumulation):
            batch = next(loader)
            hashes = [xxhash.xxh3_64_hexdigest(image.contiguous().numpy().data) for image in batch.images]
            step = feed.plan.steps_before(batch.position)
            log.write(json.dumps({"step": step, "ids": batch.ids.tolist(), "pixels": hashes}) + "\n")
    world.barrier()
    disconnect()


if __name__ == "__main__":
    main()
