"""Ranks that train nothing: each writes what it is fed, a JSON line per step, until it is done or killed.

    record_batches.py [options of launch/train.py]

Reads commands from its input, one JSON object a line, and forks a process per rank (so that torch and DALI are imported
once): {"kind": "train" or "eval", "world": W, "start": S, "stop": S, "pace": SECONDS, "out": FOLDER}. Answers with the
list of their process ids. A training starts at step `start` and ends before `stop`; an evaluation starts with sample
`start`. Rank R writes OUT/rank-R.jsonl; its last line is "done".
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

import pipeline.dali  # noqa: F401 - before forking
from launch.command_line import parse
from launch.feed import Feed
from launch.recipe import Recipe
from launch.world import World
from pipeline.batch import Batch


def main() -> None:
    recipe = parse(sys.argv[1:])
    for line in sys.stdin:
        command = json.loads(line)
        pids = []
        for rank in range(command["world"]):
            pid = os.fork()
            if pid == 0:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(command["world"])}
                os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
                run(recipe, rank, command)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        for pid in pids:
            os.waitpid(pid, 0)
        print("ended", flush=True)


def run(recipe: Recipe, rank: int, command: dict[str, Any]) -> None:
    status = 1
    try:
        torch.set_num_threads(1)
        world = World(rank, command["world"], rank, command["world"], torch.device("cpu"))
        record(Feed.of(recipe, world), command)
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def record(feed: Feed, command: dict[str, Any]) -> None:
    start, stop = command["start"], command["stop"]
    with (Path(command["out"]) / f"rank-{feed.world.rank}.jsonl").open("w") as log:

        def write(content: object) -> None:
            log.write(json.dumps(content) + "\n")
            log.flush()
            time.sleep(command["pace"])

        if command["kind"] == "train":
            with feed.train_loader(step=start, dtype=torch.float32) as loader:
                for step in range(start, stop):
                    batches = [next(loader) for _ in range(feed.shape.accumulation)]
                    assert {feed.plan.steps_before(batch.position) for batch in batches} == {step}
                    write({"step": step, "state": loader.state_dict(), **contents(batches)})
        else:
            loader = feed.eval_loader(dtype=torch.float32)
            assert loader is not None
            with loader:
                loader.load_state_dict({"samples": start})
                for step, batch in enumerate(loader):
                    write({"step": step, "state": loader.state_dict(), **contents([batch])})
        write("done")


def contents(batches: list[Batch]) -> dict[str, list[Any]]:
    """Ids and a hash of each image, of the rows that hold a sample."""
    ids = np.concatenate([batch.ids for batch in batches])
    images = torch.cat([batch.images for batch in batches])
    shown = torch.cat([batch.mask for batch in batches]).numpy()
    hashes = [xxhash.xxh3_64_hexdigest(image.contiguous().numpy().data) for image in images[shown]]
    return {"ids": ids[shown].tolist(), "pixels": hashes}


if __name__ == "__main__":
    main()
