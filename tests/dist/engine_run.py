"""One rank of a small training on fixed random batches, to test the engine without data loading.

    engine_run.py OUT.pt --steps N [--state STATE.pt --at STEP] [--micro M] [--shapes MxSIZE ...] [--poison STEP]
                  [--statistics] [--recalibrate N] [--replay [--fails-on RANK]] [options of launch/train.py]

Step n has the shape number n of --shapes, which are repeated: M images per forward pass, and their size. BatchNorm is
frozen unless --statistics is given; --recalibrate replaces its statistics at the end. Rank 0 writes the canonical
state, the losses and gradient norms of all steps, and the notes to OUT.pt. With --replay, training passes are captured
and replayed by a substitute for CUDA graphs, whose capture can be made to fail on one rank.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import fat
from launch.config.command_line import parse
from launch.engine.cuda_graph_capture import RECORDERS
from launch.engine.engine import Engine
from launch.engine.input_shapes import InputShape
from launch.machine.world import connect, disconnect
from pipeline.batch_shape import BatchShape
from pipeline.loader import Batch
from pipeline.plan import Position
from tests.support.recorders import FailsAt, ReplayOnCpu

GLOBAL, CLASSES, SIZE = 8, 10, 32


def batch_of(step: int, rows: range, poison: bool, size: int = SIZE) -> Batch:
    """Return rows of a global batch that depends on nothing but the step and the size."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL, 3, size, size, generator=generator)
    labels = torch.randint(0, CLASSES, (GLOBAL,), generator=generator)
    if poison:
        images[GLOBAL - 1, 0, 0, 0] = float("nan")
    chosen = list(rows)
    return Batch(
        images=images[chosen].contiguous(memory_format=torch.channels_last),
        labels=labels[chosen],
        ids=np.array(chosen),
        planned=np.array(chosen),
        mask=torch.ones(len(chosen), dtype=torch.bool),
        position=Position(0, step),
    )


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--steps", type=int, required=True)
    arguments.add_argument("--state", type=Path)
    arguments.add_argument("--at", type=int, default=0)
    arguments.add_argument("--micro", type=int, help="default: all images of a rank")
    arguments.add_argument("--shapes", nargs="+", metavar="MxSIZE")
    arguments.add_argument("--recalibrate", type=int, default=0, help="number of batches")
    arguments.add_argument("--poison", type=int, default=-1)
    arguments.add_argument("--statistics", action="store_true", help="do not freeze BatchNorm")
    arguments.add_argument("--replay", action="store_true", help="capture and replay training passes")
    arguments.add_argument("--fails-on", type=int, default=-1, help="rank whose capture fails")
    own, rest = arguments.parse_known_args()
    recipe = parse([*rest, "--size", str(SIZE)] if own.statistics else [*rest, "--size", str(SIZE), "--freeze-bn"])
    world = connect()
    if own.replay:
        failing = world.rank == own.fails_on
        recorder = FailsAt(world.device, 9) if failing else ReplayOnCpu(world.device)
        RECORDERS["cpu"] = lambda device: recorder
    torch.manual_seed(0)
    config = fat.FATConfig(num_classes=CLASSES, widths=(16, 32, 48, 64), depths=(1, 2, 2, 1), heads=(2, 4, 6, 8))
    model = fat.create_model(config)
    ranks = BatchShape(global_batch=GLOBAL, world=world.size, rank=world.rank)
    pairs = [map(int, text.split("x")) for text in own.shapes or [f"{own.micro or ranks.rank_rows}x{SIZE}"]]
    sizes = [(replace(ranks, micro_batch=rows), size) for rows, size in pairs]
    shapes = [InputShape(shape.micro_rows, size, shape.accumulation) for shape, size in sizes]
    engine = Engine(model, recipe, world, shapes=shapes)
    if own.state:
        engine.load_state_dict(torch.load(own.state, weights_only=True)["state"], steps=own.at)
    losses, norms = [], []
    for step in range(own.at, own.steps):
        shape, size = sizes[step % len(sizes)]
        batches = [batch_of(step, shape.rows(m), step == own.poison, size) for m in range(shape.accumulation)]
        result = engine.step(batches, step=step, lr=1e-3)
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())
    shape = sizes[0][0]
    for average in (False, True) if own.recalibrate else ():
        batches = [batch_of(200 + number, shape.rows(0), False) for number in range(own.recalibrate)]
        engine.recalibrate_batch_norm(batches, average=average)
    accuracy = engine.evaluate([batch_of(100, shape.rows(0), False)], average=bool(recipe.optim.ema))
    state = engine.state_dict()
    if world.is_main:
        found = {"state": state, "losses": losses, "norms": norms, "loss": accuracy["loss"], "notes": engine.notes}
        found |= {"compile": engine.resolved["compile"], "replayed": recorder.replayed if own.replay else 0}
        torch.save(found, own.out)
    disconnect()


if __name__ == "__main__":
    main()
