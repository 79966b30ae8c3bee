"""Compare complete training steps and inference of FAT in different modes, and of other models, in images/s.

    python benchmarks/step.py [--models fat_b0 ... swin_tiny_patch4_window7_224 ...] [--ways ...] [--modes ...]
                              [--batch N] [--size 224] [--rounds 7] [--dtype bfloat16|float32] [--alone]
                              [--out FILE.json]

Modes (--ways); they run alternately in each round, and medians of the rounds and of the ratios are reported:

  contiguous      NCHW memory format, eager
  library         channels-last weights and activations, eager, without FAT's Triton kernels
  channels-last   like library, with FAT's Triton kernels (GPU)
  graph           like channels-last, with the complete step replayed as one CUDA graph
  graph conv1x1   like graph, with 1x1 convolutions in cuDNN instead of matrix products
  compiled        channels-last under torch.compile
  compiled graph  like compiled, with the complete step replayed as one CUDA graph

With --alone, the modes run in sequence, each freed before the next is built, for models of which only one fits into
memory. A training step is forward, cross-entropy, backward, gradient clipping and fused AdamW; bfloat16 uses autocast.
Models other than FAT come from timm and are skipped if it is not installed. If a mode fails, the reason is reported; if
other modes may have caused it (out of memory, CUDA error, disturbed capture), the mode runs again alone. Meant for a
GPU; on a CPU, the modes with graphs are omitted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torch.nn import functional as F

import fat
from benchmarks.model import DEVICE, free, interleave, machine, make_plain, reason
from fat import layers
from fat.kernels import use

WAYS = ("contiguous", "library", "channels-last", "graph", "graph conv1x1", "compiled", "compiled graph")
OURS = ("library", "graph conv1x1")  # modes that only FAT supports
MODES = ("training", "inference")
OTHERS = ("swin_tiny_patch4_window7_224", "convnext_tiny", "efficientnet_b0", "repvit_m1")
CLIP = 5.0
GRAPH_WARM_UP = 3  # number of runs on a side stream before a capture, as PyTorch requires
# Substrings of errors that another mode may have caused: out of memory, asynchronous errors, disturbed captures.
SHARED_FAILURES = ("memory", "alloc", "captur", "cuda error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*fat.list_models(), *OTHERS])
    ways = WAYS if DEVICE == "cuda" else tuple(way for way in WAYS if "graph" not in way)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=ways)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--batch", type=int, default=256 if DEVICE == "cuda" else 8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    dtypes = ("bfloat16", "float32") if DEVICE == "cuda" else ("float32", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, default=dtypes[0])
    parser.add_argument("--alone", action="store_true", help="run the modes in sequence, one in memory at a time")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # the same setting as in `launch.engine`
    setting = {name: getattr(options, name) for name in ("batch", "size", "rounds", "dtype")}
    setting |= {"machine": machine(), "torch": torch.__version__}
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    results: list[dict[str, Any]] = []
    for name in options.models:
        if name not in fat.list_models() and importlib.util.find_spec("timm") is None:
            print(f"{name}: skipped, because timm is not installed")
            continue
        for mode in options.modes:
            torch._dynamo.reset()  # all compiled models of a process share one bounded cache
            results += compare(name, mode == "training", options)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps({**setting, "results": results}, indent=1) + "\n")


def compare(name: str, training: bool, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a model in all modes and return one row per mode."""
    mode = "training" if training else "inference"
    ways = [way for way in options.ways if way not in OURS or name in fat.list_models()]
    rows: dict[str, dict[str, Any]] = {way: {"model": name, "mode": mode, "way": way} for way in ways}
    times: dict[str, list[float]] = {}
    for turn in [[way] for way in ways] if options.alone else [ways]:
        times |= run(rows, turn, training, options)
    for way in set(ways) - set(times):
        if not options.alone and len(ways) > 1 and any(word in rows[way]["failed"].lower() for word in SHARED_FAILURES):
            rows[way]["beside the others"] = rows[way].pop("failed")
            times |= run(rows, [way], training, options)
    for way, row in rows.items():
        if way in times:
            row["images/s"] = round(options.batch / median(times[way]), 1)
        if way in times and (base := next(iter(times))) != way:
            pairs = zip(times[base], times[way], strict=True)
            row[f"to {base}"] = round(median(first / own for first, own in pairs), 3)
        ratio = "".join(f"{value:>7} {key}" for key, value in row.items() if key.startswith("to "))
        found = row.get("failed") or f"{row['images/s']:>10,.1f} images/s {ratio}"
        print(f"{name:30} {mode:10} {way:15} {found}", flush=True)
    return list(rows.values())


def run(
    rows: dict[str, dict[str, Any]], ways: Sequence[str], training: bool, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Time modes alternately, return their seconds by round, and free all memory. If a mode fails, the reason is stored
    in its row."""
    steps: dict[str, Callable[[], None]] = {}
    for way in ways:
        try:
            steps[way] = step(rows[way]["model"], way, training, options)
            steps[way]()
        except Exception as error:
            steps.pop(way, None)
            rows[way]["failed"] = reason(error)
        if way not in steps:  # after the except block, in which the exception keeps the model alive
            free()
    times, failed = interleave(steps, options.rounds)
    for way, why in failed.items():
        rows[way]["failed"] = why
    steps.clear()
    graph_pool.cache_clear()  # a pool cannot be used again after its last graph was freed
    free()
    return times


def step(name: str, way: str, training: bool, options: argparse.Namespace) -> Callable[[], None]:
    """Build a model in the given mode; return a function that runs one step and waits for the device."""
    torch.manual_seed(0)
    model = build(name).to(DEVICE).train(training)
    images = torch.randn(options.batch, 3, options.size, options.size, device=DEVICE)
    if options.dtype == "bfloat16":
        images = images.bfloat16()
    if way == "contiguous":
        make_plain(model)
    else:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(options.batch, device=DEVICE) % 1000
    run = torch.compile(model) if "compiled" in way else model
    autocast = options.dtype == "bfloat16"
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True, capturable=DEVICE == "cuda") if training else None

    def once() -> None:
        with torch.set_grad_enabled(training), torch.autocast(DEVICE, torch.bfloat16) if autocast else nullcontext():
            logits = run(images)
        if optimizer is not None:
            F.cross_entropy(logits.float(), labels).backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    with switched(way):
        work = captured(once) if "graph" in way else once

    def finished() -> None:
        with switched(way):
            work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return finished


@contextmanager
def switched(way: str) -> Iterator[None]:
    """Switch FAT's kernels and matrix products on or off as the mode requires."""
    kernels = use("off" if way == "library" else "auto")
    with kernels, mock.patch.object(layers, "MATRIX_PRODUCTS", way != "graph conv1x1"):
        yield


def captured(once: Callable[[], None]) -> Callable[[], None]:
    """Capture the work as one CUDA graph. The result keeps model, optimizer and images alive, which the graph uses."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(GRAPH_WARM_UP):
            once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=graph_pool(), capture_error_mode="thread_local"):
        once()

    def replay(_keeps_what_the_graph_reads: Callable[[], None] = once) -> None:
        graph.replay()

    return replay


@cache
def graph_pool() -> Any:
    """Return the memory pool that all graphs share: the memory does not suffice for several pools of large models."""
    return torch.cuda.graph_pool_handle()


def build(name: str) -> nn.Module:
    """Create a FAT model, or timm's model of this name (the first of `NAME*` if there is no exact match)."""
    if name in fat.list_models():
        return fat.create_model(name)
    import timm

    names = [name] if timm.is_model(name) else timm.list_models(f"{name}*")
    if not names:
        raise ValueError(f"timm {timm.__version__} has no model named {name}*")
    return timm.create_model(names[0])


if __name__ == "__main__":
    main()
