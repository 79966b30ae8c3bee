"""Write run folders as a training leaves them, without training."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import fat
from launch.config.recipe import Recipe
from launch.run.evaluation_record import EvaluationInfo, EvaluationRecord, write_evaluation
from launch.run.metrics_file import METRICS_NAME
from launch.run.saved_recipe import CLASSES_NAME, RECIPE_NAME, SavedEngine, SavedRun
from launch.run.status import write_status

BEGAN = 1_700_000_000.0
STEP_SECONDS, DOWN_SECONDS = 2.0, 60.0
START = {
    "world": 1, "engine": "plain data parallel, fp32", "model": "fat_b0", "device": "some CPU", "host": "node1",
    "global_batch": 64,
}  # fmt: skip


def write_run(
    run: Path,
    *,
    steps: int = 100,
    log_every: int = 10,
    epochs: int = 4,
    evaluations: bool = True,
    ema: bool = False,
    crash: tuple[int, int] | None = None,
    classes: int = 10,
    recipe: Recipe | None = None,
    status: str = "finished",
    evaluated: int = 0,
) -> Path:
    """Write a run folder and return it.

    Args:
        crash: steps after which the run was killed, and from which it was resumed.
        evaluated: number of samples in the record of the last evaluation; 0: no record.
    """
    run.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for first, last in [(0, crash[0]), (crash[1], steps)] if crash else [(0, steps)]:
        began = lines[-1]["time"] + DOWN_SECONDS if lines else BEGAN
        kinds = ("eval", "eval-ema")[: 1 + ema] if evaluations else ()
        lines += _start(range(first, last + 1, log_every), began=began, steps=steps, epochs=epochs, kinds=kinds)
    names = {"eval": "weights", "eval-ema": "average"}
    best = max(((line["top1"], names[line["kind"]]) for line in lines if "top1" in line), default=None)
    if status == "finished":
        named = {"best": best[0], "best_of": best[1]} if best else {"best": None}
        lines.append({"kind": "end", "time": lines[-1]["time"], "step": steps, "seconds": 9.0, **named})
    (run / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_status(run, status, step=steps, best=best)
    engine = SavedEngine(zero=0, precision="fp32", world=1, device="some CPU", cores=2)
    saved = SavedRun(recipe=recipe or Recipe(), engine=engine, versions={"torch": "2.11"}, git="0123456789ab")
    (run / RECIPE_NAME).write_text(json.dumps(dataclasses.asdict(saved), default=str))
    (run / CLASSES_NAME).write_text(fat.ClassList.of([f"folder{i}" for i in range(classes)]).dumps())
    if evaluated:
        write_evaluation(run, record(evaluated, classes))
    return run


def _start(logged: range, *, began: float, steps: int, epochs: int, kinds: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a start that logs these steps, and evaluates at the end of each epoch."""
    per_epoch = steps // epochs
    moment = began + 5
    totals = {"total_steps": steps, "steps_per_epoch": per_epoch, "epochs": epochs, "started": began}
    yield {"kind": "start", "time": moment, "step": logged[0], **START, **totals}
    yield {"kind": "resolved", "time": moment, "step": logged[0], "loader": "dali on CPUs"}
    for step in logged[1:]:
        seconds = logged.step * STEP_SECONDS
        moment += seconds
        place = {"step": step, "epoch": (step - 1) // per_epoch + 1}
        noise = math.sin(step * 12.9898) * 0.1
        yield {
            "kind": "train", "time": moment, **place, "lr": 1e-3 * (1 - step / steps), "grad_norm": 3.0 + noise,
            "loss": 1 + 5 * math.exp(-3 * step / steps) + noise, "steps": logged.step,
            "seconds": seconds, "images_per_second": 100 + 10 * noise, "data_wait": 0.02 + noise / 10,
        }  # fmt: skip
        for kind in kinds if step % per_epoch == 0 else ():
            top1 = round(0.9 * step / steps + 0.05 * (kind == "eval-ema"), 6)
            results = {"top1": top1, "top5": top1 + 0.05, "loss": 6 - 5 * top1, "samples": 360, "seconds": 1.0}
            yield {"kind": kind, "time": moment, **place, **results}


def record(samples: int, classes: int, *, thumbnail_side: int = 64) -> EvaluationRecord:
    """Return the record of an evaluation in which class c is wrong c / (2 * classes) of the time."""
    draw = np.random.default_rng(0)
    ids = np.arange(samples)
    labels = ids % classes
    wrong = draw.random(samples) < labels / (2 * classes)
    predictions = np.where(wrong, (labels + 1 + draw.integers(0, 2, samples)) % classes, labels)
    losses = np.where(wrong, 2 + draw.random(samples), draw.random(samples))
    rows = np.stack([ids, labels, predictions, losses, np.exp(-losses), np.full(samples, 0.5)], axis=1)
    info = EvaluationInfo(step=100, weights="weights", outputs=classes)
    hardest = [image.id for image in EvaluationRecord.of(rows, info).hardest]
    thumbnails = {sample: _jpeg(draw.integers(0, 256, (thumbnail_side, thumbnail_side, 3))) for sample in hardest}
    return dataclasses.replace(EvaluationRecord.of(rows, info), thumbnails=thumbnails)


def _jpeg(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
