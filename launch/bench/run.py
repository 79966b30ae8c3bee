"""`pipeline bench`: measure loader alone, model alone and both together, to find what limits training."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from launch.bench.decode_paths import measure_paths, without_augmentation
from launch.bench.one_rank import one_rank
from launch.bench.phases import compare, predict, resident_batches, run, training_step
from launch.bench.verdict import Figures
from launch.config.recipe import Recipe
from launch.engine.build import build_model
from launch.engine.engine import Engine
from launch.feed import Feed
from launch.machine.provenance import cpu_name, device_name, git_state, versions
from launch.machine.world import World
from launch.monitor.roofline import Roofline
from launch.teacher import load_teacher
from pipeline.decode.choose import resolve_loader
from pipeline.jobs import open_reader
from pipeline.loader import TrainLoader
from pipeline.storage.memory_cache.shared_pixels import SharedPixels
from shards.cores import cores as usable_cores
from shards.files.output import write_output
from shards.progress import Phases
from shards.redact import redacted

ROUNDS = 3
PHASES = 6 + 3 * ROUNDS
"""Number of phases that `bench` announces: each round measures the loader, the model, and both together."""


def bench(recipe: Recipe, *, ranks: int = 1, steps: int, progress: Phases) -> Figures:
    """Measure the training throughput of one of `ranks` ranks in this process.

    Args:
        recipe: recipe of the training; no run folder is created.
        ranks: number of ranks that training will have on this machine. The measurement uses the micro-batch of one
            rank, the ZeRO stage and options of training on `ranks` ranks, and as many CPU cores as each of them would
            have. It includes neither gradient accumulation nor communication.
        steps: optimizer steps per round of each measurement.
        progress: shows `PHASES` phases.

    Raises:
        UserError: the recipe, the data and the number of ranks are inconsistent.
    """
    progress.begin("opening the set, checking the kernels")
    with one_rank(recipe, ranks=ranks) as (feed, kernels):
        progress.begin("building the model")
        model = build_model(feed.recipe, feed.classes)
        teacher, _ = load_teacher(feed)
        shapes = [dataclasses.replace(shape, accumulation=1) for shape in feed.input_shapes[-1:]]
        engine = Engine(model, feed.recipe, feed.world, shapes=shapes, teacher=teacher)
        for note in engine.notes:
            progress.note(note)
        return _figures(feed, engine, steps, {"ranks": ranks, **engine.resolved, **kernels.resolved}, progress)


def _figures(feed: Feed, engine: Engine, steps: int, resolved: dict[str, Any], progress: Phases) -> Figures:
    recipe, device = feed.recipe, engine.world.device
    batch, ahead, cores = feed.shape.micro_rows, feed.loader_options.settings.ahead, usable_cores()

    with feed.train_loader(step=0, dtype=engine.input_dtype) as first:
        # A memory cache is measured as it is from the second epoch on: filled with the images of the measured steps.
        cache = first.memory_cache
        for _ in range(0 if cache is None else steps + 2 * ahead):
            next(first)

        def loader() -> TrainLoader:
            return feed.train_loader(step=0, dtype=engine.input_dtype, memory_cache=cache)

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        resident, step = resident_batches(feed, engine), training_step(feed, engine)
        alone, model, both = compare(
            loader, resident, step, batch=batch, steps=steps, ahead=ahead, device=device, rounds=ROUNDS,
            begin=progress.begin,
        )  # fmt: skip
        memory, resolved = _memory(device), resolved | first.resolved
        progress.begin("reading without decoding")
        reading = _reading(feed, steps, ahead)
        progress.begin("decoding without augmentation")
        decoding = _decoding(feed, engine, steps, ahead, cache)
    progress.begin("host cost of each decode path")
    paths = measure_paths(feed, dtype=engine.input_dtype, steps=steps)
    progress.begin("computing the roofline")
    return Figures(
        machine=describe_machine(feed.world, cores),
        settings={
            "model": str(recipe.model.spec),
            "batch": batch,
            "size": recipe.data.size,
            "augment": recipe.data.augment,
            "steps": steps,
            "rounds": ROUNDS,
            **resolved,
        },
        reading=reading,
        decoding=decoding,
        decode_paths=paths,
        loader=alone,
        model=model,
        both=both,
        roofline=Roofline.of(feed, engine),
        predicted=predict(alone, model, cores=cores if device.type == "cpu" else None),
        memory=memory,
        read=1.0 if cache is None else 1 - cache.layout.kept / len(cache.layout.offsets),
    )


def _reading(feed: Feed, steps: int, ahead: int) -> float:
    """Measure the images/s of reading and checking samples without decoding them."""
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


def _decoding(feed: Feed, engine: Engine, steps: int, ahead: int, cache: SharedPixels | None) -> float:
    """Measure the images/s of reading, decoding, cropping, flipping and normalizing, without further augmentation."""
    plain = without_augmentation(feed)
    with plain.train_loader(step=0, dtype=engine.input_dtype, memory_cache=cache) as batches:
        for _ in range(ahead):
            next(batches)
        return run(batches, None, steps=steps, batch=feed.shape.micro_rows, device=engine.world.device).rate


def _memory(device: torch.device) -> dict[str, int]:
    """Return bytes of GPU memory: torch's peak, the memory in use including the decoder's, and the total."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    # Peak of reserved memory, not of allocated: torch counts the memory of CUDA graphs as free between captures.
    return {"torch_peak": torch.cuda.max_memory_reserved(device), "in_use": total - free, "total": total}


def describe_machine(world: World, cores: int) -> dict[str, Any]:
    """Describe the machine of the measured rank.

    Args:
        cores: CPU cores that the process may use: with several ranks, at most those of the NUMA node of its GPU.
    """
    return {
        "device": device_name(world.device),
        "cpu": cpu_name(),
        "cores": cores,
        "rank_cores": world.cores,
        "torch_threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "versions": versions(),
        "commit": git_state(),
    }


def write_json(figures: Figures, path: Path) -> None:
    """Write all results as JSON, with credentials removed.

    Raises:
        UserError: the file cannot be written.
    """
    write_output(path, (json.dumps(redacted(figures.to_dict()), indent=1) + "\n").encode(), "--json")
