"""Compare ways to run the FAT models (memory format, kernels, torch.compile, fusion), in images/s.

    python benchmarks/model.py [--variants fat_b0 ...] [--ways plain channels-last ...] [--batch N] [--size 224]
                               [--rounds 7] [--dtype float32|bfloat16] [--out FILE.json]

All modes run in one process, alternately in each round. Medians of the rounds and of the ratios are reported. Modes:

  plain           NCHW memory format, eager, like the released implementation
  torch           channels-last activations and weights, eager, without Triton kernels (GPU only)
  channels-last   the default: channels-last, eager, with Triton kernels on a GPU
  compiled        channels-last under torch.compile
  graphs          compiled with CUDA graphs (mode reduce-overhead; GPU only)
  fused           inference only: BatchNorm and identities folded (`fat.fuse`)
  fused compiled  inference only: both

`inference` is a forward pass in eval mode, `training` a forward and backward pass with cross-entropy. bfloat16 uses
autocast (except for fused models, whose weights are meant for fp32). Every mode is compiled and warmed up before the
first round. Runs on a CPU or a GPU; use an otherwise idle machine (the load average at the start is recorded).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fat
from fat.blocks import FASA
from fat.layers import GroupNorm1
from fat.model import Stem
from launch.machine.provenance import cpu_name
from shards.cores import cores

ON_CUDA = ("torch", "graphs")  # modes that, on a CPU, are identical to other modes
WAYS = ("plain", "torch", "channels-last", "compiled", "graphs", "fused", "fused compiled")
MODES = ("inference", "training")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=fat.list_models(), default=fat.list_models())
    default = [way for way in WAYS if DEVICE == "cuda" or way not in ON_CUDA]
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=default)
    parser.add_argument("--batch", type=int, default=256 if DEVICE == "cuda" else 8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    dtypes = ("bfloat16", "float32") if DEVICE == "cuda" else ("float32", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, default=dtypes[0])
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()

    setting = {
        "machine": machine(),
        "load average at the start": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "batch": options.batch,
        "size": options.size,
        "rounds": options.rounds,
        "OpenMP": {key: value for key, value in os.environ.items() if key.startswith(("OMP_", "GOMP_"))},
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    print(f"{'variant':8} {'way':15} {'inference':>12} {'to plain':>9} {'training':>12} {'to plain':>9}   images/s")
    results: list[dict[str, Any]] = []
    for variant in options.variants:
        rows: dict[str, dict[str, Any]] = {way: {"variant": variant, "way": way} for way in options.ways}
        for mode in MODES:
            torch._dynamo.reset()  # all compiled models of a process share one bounded cache
            ways = [way for way in options.ways if mode == "inference" or not way.startswith("fused")]
            steps = {way: step(variant, way, mode == "training", options) for way in ways}
            times, failed = interleave(steps, options.rounds)
            for way, why in failed.items():
                print(f"{variant:8} {way:15} {mode} skipped: {why}")
            for way in times:
                rows[way].update(figures(mode, times, way, options.batch))
        for row in rows.values():
            print(line(row), flush=True)
        results += rows.values()
        if options.out:
            options.out.write_text(json.dumps({**setting, "results": results}, indent=1) + "\n")


def step(variant: str, way: str, training: bool, options: argparse.Namespace) -> Callable[[], None]:
    """Build a model in the given mode; return a function that runs one forward (and, if `training`, backward) pass."""
    torch.manual_seed(0)
    model = fat.create_model(variant).to(DEVICE).train(training)
    if way.startswith("fused"):
        model = fat.fuse(model)
    if way == "plain":
        make_plain(model)
    else:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run: Callable[..., Any] = model
    if way.endswith("compiled") or way == "graphs":
        run = torch.compile(model, fullgraph=True, mode="reduce-overhead" if way == "graphs" else None)
    switch: fat.kernels.Mode = "off" if way in ("plain", "torch") else "auto"
    images = torch.randn(options.batch, 3, options.size, options.size, device=DEVICE)
    if way != "plain":
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(options.batch, device=DEVICE)
    half = options.dtype == "bfloat16" and not way.startswith("fused")

    def once() -> None:
        autocast = torch.autocast(DEVICE, torch.bfloat16) if half else nullcontext()
        with fat.kernels.use(switch), torch.set_grad_enabled(training), autocast:
            logits = run(images)
            loss = F.cross_entropy(logits.float(), labels) if training else None
        if loss is not None:
            loss.backward()
            model.zero_grad()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return once


def interleave(steps: dict[str, Callable[[], None]], rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time the steps alternately, after two untimed calls of each.

    Returns:
        Seconds of each step by round, and the errors of steps that failed and were skipped (mostly out of memory, for
        which libraries raise various errors).
    """
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for round_number in range(-2, rounds):
        for way in list(steps):
            start = time.perf_counter()
            try:
                steps[way]()
            except RuntimeError as error:
                failed[way] = reason(error)
                del steps[way]
                times.pop(way, None)
            if way in failed:  # after the except block, in which the exception keeps the tensors alive
                free()
            elif round_number >= 0:
                times.setdefault(way, []).append(time.perf_counter() - start)
    return times, failed


def free() -> None:
    """Free unused memory, with a garbage collection because models, optimizers and graphs have reference cycles."""
    gc.collect()
    if DEVICE == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # CUDA may report the error of an earlier, asynchronous call
            print(f"error while freeing memory: {reason(error)}", flush=True)


def reason(error: Exception) -> str:
    """Return the class and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def figures(mode: str, times: dict[str, list[float]], way: str, batch: int) -> dict[str, float]:
    found = {f"{mode} images/s": round(batch / median(times[way]), 1)}
    if "plain" in times:
        ratios = [plain / own for plain, own in zip(times["plain"], times[way], strict=True)]
        found[f"{mode} to plain"] = round(median(ratios), 2)
    return found


def line(row: dict[str, Any]) -> str:
    cells = [f"{row.get(f'{mode} {what}', '')}" for mode in MODES for what in ("images/s", "to plain")]
    return f"{row['variant']:8} {row['way']:15} {cells[0]:>12} {cells[1]:>9} {cells[2]:>12} {cells[3]:>9}"


class PlainStem(Stem):
    """Stem that keeps the memory format of the images."""

    def forward(self, images: Tensor) -> Tensor:
        for conv in self.convs:
            images = F.relu(conv(images))
        return self.norm(self.proj(images))


class PlainFASA(FASA):
    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        return super().attend(q, kv).contiguous()


class PlainNorm(GroupNorm1):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 1, self.weight, self.bias, self.eps)


def make_plain(model: nn.Module) -> None:
    """Change a model to use NCHW activations throughout, with the same weights and arithmetic."""
    for module in model.modules():
        for plain in (PlainStem, PlainFASA, PlainNorm):
            if type(module) is plain.__base__:
                module.__class__ = plain
    model.train(model.training)  # train() updates which layers are fused


def machine() -> str:
    """Return the name of the GPU, or of the CPU with the cores that this process may use."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {cores()} cores, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
