"""One rank that resolves what its recipe leaves open, each with a file of measurements of its own.

    choices_run.py OUT [options of launch/train.py]

Rank R measures into OUT/tuned-R.json, and writes the values that it came to, and their sources, to OUT/rank-R.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from launch.tuning import choices

from launch.tuning import open_options
from launch.config.command_line import parse
from launch.feed import Feed
from launch.engine.build import build_model
from launch.machine.world import connect, disconnect


def main() -> None:
    out, recipe = Path(sys.argv[1]), parse(sys.argv[2:])
    choices.SECONDS = 5.0
    world = connect()
    os.environ["FAT_TUNED"] = str(out / f"tuned-{world.rank}.json")
    feed = Feed.of(recipe, world)
    resolved, _, found = choices.resolve(recipe, feed, build_model(recipe, feed.classes), goes_on=False)
    (out / f"rank-{world.rank}.json").write_text(
        json.dumps([open_options.given(resolved), found.sources, found.figures])
    )
    disconnect()


if __name__ == "__main__":
    main()
