"""`pipeline bench`: loader alone, model alone, both together, in one run: who waits for whom, and how much of the
device the model itself uses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from launch.bench.one_rank import one_rank
from launch.bench.phases import compare, predict, resident_batches, run, training_step
from launch.bench.verdict import Figures
from launch.config.recipe import Recipe
from launch.engine.build import build_model
from launch.engine.engine import Engine
from launch.feed import Feed
from launch.machine.provenance import cpu_name, device_name, git_state, versions
from launch.roofline import Roofline
from pipeline.decode.choose import resolve_loader
from pipeline.jobs import open_reader
from pipeline.loader import TrainLoader
from shards.cores import cores as usable_cores
from shards.files.output import write_output
from shards.redact import printable, redacted

ROUNDS = 3


def bench(recipe: Recipe, *, ranks: int = 1, steps: int) -> Figures:
    """Measure what one of `ranks` ranks of a training does, in this process alone.

    Args:
        recipe: of the training; nothing is written.
        ranks: that the training will have on this machine. Measured are the micro-batch of one, with the ZeRO stage and
            the options that so many have, on its share of the cores; neither accumulation nor communication.
        steps: optimiser steps per round of each measurement.

    Raises:
        UserError: recipe, data and ranks do not fit together.
    """
    with one_rank(recipe, ranks=ranks) as (feed, kernels):
        model = build_model(feed.recipe, feed.classes)
        engine = Engine(model, feed.recipe, feed.world, micro_batch=feed.shape.micro_rows, accumulation=1)
        for note in engine.notes:
            print(printable(note), file=sys.stderr)
        return _figures(feed, engine, steps, {"ranks": ranks, **engine.resolved, **kernels.resolved})


def _figures(feed: Feed, engine: Engine, steps: int, resolved: dict[str, Any]) -> Figures:
    recipe, device = feed.recipe, engine.world.device
    batch, ahead, cores = feed.shape.micro_rows, feed.loader_options.settings.ahead, usable_cores()

    def loader() -> TrainLoader:
        return feed.train_loader(step=0, dtype=engine.input_dtype)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    resident, step = resident_batches(feed, engine), training_step(feed, engine)
    alone, model, both = compare(
        loader, resident, step, batch=batch, steps=steps, ahead=ahead, device=device, rounds=ROUNDS
    )
    memory = _memory(device)
    with loader() as batches:
        resolved = resolved | batches.resolved
    return Figures(
        machine=_machine(device, cores),
        settings={
            "variant": recipe.model.variant,
            "batch": batch,
            "size": recipe.data.size,
            "augment": recipe.data.augment,
            "steps": steps,
            "rounds": ROUNDS,
            **resolved,
        },
        reading=_reading(feed, steps, ahead),
        decoding=_decoding(feed, engine, steps, ahead),
        loader=alone,
        model=model,
        both=both,
        roofline=Roofline.of(feed, engine),
        predicted=predict(alone, model, cores=cores if device.type == "cpu" else None),
        memory=memory,
    )


def _reading(feed: Feed, steps: int, ahead: int) -> float:
    """Images per second that are read and checked, when nobody decodes them."""
    options, plan, rows = feed.loader_options, feed.plan, feed.shape.rows(0)
    if options.loader == "synthetic":
        return 0.0
    beton = resolve_loader(options, feed.dataset.split("train")) == "ffcv"
    work = ((plan.ids(plan.at(step), rows), None) for step in itertools.count())
    with open_reader(feed.dataset, "train", options, beton=beton) as reader:
        batches = reader.read_ahead(work, options.settings.read_ahead)
        for _ in range(ahead):
            next(batches)
        start = time.perf_counter()
        for _ in range(steps):
            next(batches)
        return steps * len(rows) / (time.perf_counter() - start)


def _decoding(feed: Feed, engine: Engine, steps: int, ahead: int) -> float:
    """Images per second that are read, decoded, cropped, flipped and normalised, without any further augmentation."""
    recipe = feed.recipe
    light = dataclasses.replace(recipe.data, augment="light", rand_augment=None, erase=None, mixup=None, cutmix=None)
    plain = dataclasses.replace(feed, augment=light.augmentation())
    with plain.train_loader(step=0, dtype=engine.input_dtype) as batches:
        for _ in range(ahead):
            next(batches)
        return run(batches, None, steps=steps, batch=feed.shape.micro_rows, device=engine.world.device).rate


def _memory(device: torch.device) -> dict[str, int]:
    """Bytes of GPU memory: torch's peak, and what is in use in all (the decoder's too)."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    # Reserved, not allocated: what CUDA graphs compute in counts as free between captures.
    return {"torch_peak": torch.cuda.max_memory_reserved(device), "in_use": total - free, "total": total}


def _machine(device: torch.device, cores: int) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "versions": versions(),
        "commit": git_state(),
    }


def write_json(figures: Figures, path: Path) -> None:
    """Write all figures, and the ratios among them, without credentials.

    Raises:
        UserError: the file cannot be written.
    """
    write_output(path, (json.dumps(redacted(figures.to_dict()), indent=1) + "\n").encode(), "--json")
