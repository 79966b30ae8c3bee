"""Run an example on one rank, and record its training batches: one JSON line for each.

    record_example.py OUT EXAMPLE [arguments of the example]

Rank R writes OUT/rank-R.jsonl, with the position and the sample ids of every batch when it is delivered.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import torch

from pipeline import Batch, TrainLoader


def main() -> None:
    _, out, example, *arguments = sys.argv
    torch.set_num_threads(1)
    path = Path(out) / f"rank-{os.environ.get('RANK', '0')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    deliver = TrainLoader.__next__
    with path.open("w") as log:

        def recorded(loader: TrainLoader) -> Batch:
            batch = deliver(loader)
            log.write(json.dumps([*batch.position, batch.ids.tolist()]) + "\n")
            log.flush()
            return batch

        TrainLoader.__next__ = recorded  # type: ignore[method-assign]
        sys.argv = [example, *arguments]
        runpy.run_path(example, run_name="__main__")


if __name__ == "__main__":
    main()
