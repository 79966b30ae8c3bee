"""The figures of a run that the report shows first, as text, and the table of its starts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fat.account.table import PAPER_TOP1
from launch.monitor.curves import best_name
from launch.monitor.goodput import TRAINING, Goodput
from launch.monitor.metrics import WEIGHTS_NAMES
from launch.monitor.panels import Lines
from launch.monitor.time_to_accuracy import time_to_accuracy
from launch.report.loaded_run import LoadedRun
from launch.run.metrics_schema import EVALUATIONS
from shards.progress import duration

IMAGENET_CLASSES = 1000  # of ImageNet-1K, on which the paper's accuracies were measured


@dataclass(frozen=True)
class Summary:
    """Texts about one run; "" where there is nothing to say."""

    name: str
    state: str
    reason: str
    model: str
    best: str
    best_note: str
    last: str
    last_note: str
    step: str
    epoch: str
    rate: str
    rate_note: str
    wall: str
    starts: str
    goodput: str
    goodput_note: str
    facts: dict[str, str]
    """Further facts, by their names."""


def summarize(run: LoadedRun) -> Summary:
    lines, final = run.timeline.lines, run.timeline.final
    train = [line for line in final if line["kind"] == "train"]
    start = run.timeline.starts[-1] if run.timeline.starts else {}
    step = max((line.get("step", 0) for line in final), default=0)
    epoch = max((line["epoch"] for line in final if "epoch" in line), default=0)
    best, best_note = _best(run)
    last, last_note = _last(run)
    count = len(run.goodput.starts)
    return Summary(
        name=run.name,
        state=run.state(),
        reason=run.status.reason if run.status else "",
        model=model_title(start["model"]) if start else "",
        best=best,
        best_note=best_note,
        last=last,
        last_note=last_note,
        step=f"{step:,} of {start['total_steps']:,}" if start else f"{step:,}",
        epoch=f"epoch {epoch} of {start['epochs']}" if start and epoch else "",
        rate=f"{median(line['images_per_second'] for line in train):,.0f} images/s" if train else "-",
        rate_note=f"median; last {train[-1]['images_per_second']:,.0f}" if train else "no step has been logged",
        wall=duration(run.goodput.wall),
        starts=f"{count} start{'s' if count != 1 else ''}",
        goodput=f"{run.goodput.goodput:.1%}",
        goodput_note=_lost(run.goodput),
        facts=_facts(run, lines, start),
    )


def _best(run: LoadedRun) -> tuple[str, str]:
    best = run.timeline.best()
    if best is None:
        ended = any(line["kind"] == "end" for line in run.timeline.lines)
        return "-", "no validation split" if ended else "not evaluated yet, or no validation split"
    place = next(line for line in run.timeline.final if line["kind"] in EVALUATIONS and line["top1"] == best[0])
    return f"{best[0]:.2%}", f"epoch {place['epoch']}, step {place['step']:,}{best_name(run.timeline, best)}"


def _last(run: LoadedRun) -> tuple[str, str]:
    last = {line["kind"]: line for line in run.timeline.final if line["kind"] in EVALUATIONS}
    if not last:
        return "", ""
    newest = list(last.values())[-1]
    note = f"epoch {newest['epoch']}, {newest['samples']:,} images"
    if len(last) > 1:
        note = f"{WEIGHTS_NAMES['weights']}; {WEIGHTS_NAMES['average']} {last['eval-ema']['top1']:.2%}; {note}"
    return f"{next(iter(last.values()))['top1']:.2%}", note


def _lost(goodput: Goodput) -> str:
    costs = {name: seconds for name, seconds in goodput.categories.items() if name != TRAINING}
    name = max(costs, key=lambda name: costs[name])
    return f"then {name} {goodput.fractions[name]:.1%}" if costs[name] else ""


def _facts(run: LoadedRun, lines: Lines, start: dict[str, Any]) -> dict[str, str]:
    worlds = [str(line["world"]) for line in run.timeline.starts]
    changes = [world for number, world in enumerate(worlds) if number == 0 or world != worlds[number - 1]]
    found = {
        "Folder": str(run.path.resolve()),
        "Started": clock(run.timeline.began),
        "Last line": clock(lines[-1]["time"]),
    }
    if start:
        hosts = dict.fromkeys(line["host"] for line in run.timeline.starts)
        found |= {
            "Ranks": ", then ".join(changes),
            "Device": start["device"],
            "Hosts of rank 0": ", ".join(list(hosts)[:5]) + (f" and {len(hosts) - 5} more" if len(hosts) > 5 else ""),
            "Engine": start["engine"],
            "Global batch": f"{start['global_batch']:,} images",
            "Steps per epoch": f"{start['steps_per_epoch']:,}",
        }
    for line in run.timeline.starts:
        if line.get("origin"):
            name = "Branched from" if Path(line["origin"]).is_absolute() else "Returned to"
            found[name] = f"{line['origin']}, step {line['step']:,}"
    if (race := time_to_accuracy(lines)) is not None:
        found["Time to accuracy"] = race.describe()
    if run.saved and run.saved.recipe.data.data:
        found["Data set"] = str(run.saved.recipe.data.data)
    if run.classes:
        found["Classes"] = f"{len(run.classes):,}"
    for name in ("skipped", "replaced"):
        counts = [max((line[name] for line in own), default=0) for own in _counts_by_start(lines, name)]
        if sum(counts):
            found[{"skipped": "Skipped steps", "replaced": "Replaced samples"}[name]] = f"{sum(counts):,}"
    return found


def _counts_by_start(lines: Lines, name: str) -> list[list[dict[str, Any]]]:
    """Return the lines of each start that have a count which begins with 0 in every start."""
    found: list[list[dict[str, Any]]] = [[]]
    for line in lines:
        if line["kind"] == "start":
            found.append([])
        elif line.get(name):
            found[-1].append(line)
    return found


def paper_accuracy(run: LoadedRun) -> tuple[float, str] | None:
    """Return the paper's top-1 accuracy in percent and its name, if the run has as many classes as ImageNet-1K."""
    classes = len(run.classes) if run.classes else run.evaluation.info.outputs if run.evaluation else 0
    model = run.timeline.starts[-1]["model"] if run.timeline.starts else ""
    value = PAPER_TOP1.get(model)
    if classes != IMAGENET_CLASSES or value is None:
        return None
    return value, f"paper, {model_title(model)}: {value} %"


def model_title(model: str) -> str:
    """Return the name of a model as shown to readers, such as FAT-B3 for fat_b3."""
    return model.upper().replace("_", "-") if model in PAPER_TOP1 else model


def clock(moment: float) -> str:
    """Return a Unix time as UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))
    except (OverflowError, ValueError, OSError):
        return "unknown"
