"""Fill Triton's cache with the kernels of FAT's training steps and evaluation.

    TRITON_CACHE_DIR=DIR python -m fat.kernels.prefill [--models fat_b0 ...] [--batch 256] [--size 224 ...] [--prune]

No GPU is needed. The cache can be used on machines with a GPU of the compiled compute capability, if Python, PyTorch,
Triton and the sources have the same versions and paths: its keys are hashes of these, and it contains absolute paths.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import torch

import fat
from fat.account.arguments import number, parser
from fat.kernels.prefill.work import evaluation, training_step
from fat.model import MIN_SIZE

KEPT = (".cubin", ".json", ".so")  # the files in Triton's cache that a launch reads
WORK = {"step": training_step, "eval": evaluation}
EVERY = 5.0  # seconds between progress lines


def main() -> int:
    arguments = parser("fat.kernels.prefill", __doc__)
    add_options(arguments, several_sizes=True)
    arguments.add_argument(
        "--models", nargs="+", choices=fat.list_models(), default=["fat_b0"], help="models to compile kernels for"
    )
    arguments.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="autocast dtype; float32: no autocast",
    )
    arguments.add_argument(
        "--work", nargs="+", choices=tuple(WORK), default=list(WORK), help="step: training step; eval: evaluation"
    )
    options = arguments.parse_args()
    work: list[Callable[[], object]] = []
    for name in options.models:
        with torch.device("meta"):
            model = fat.create_model(name)
        for size in options.size:
            shape = (options.batch, model.config.in_chans, size, size)
            work += [WORK[kind](model, shape, dtype=getattr(torch, options.dtype)) for kind in options.work]
    return fill(work, options)


def add_options(arguments: argparse.ArgumentParser, *, several_sizes: bool = False) -> None:
    """Add the options of all tools that fill the cache.

    Args:
        several_sizes: `size` is a list.
    """
    arguments.add_argument("--batch", type=number(int, 1, 1_000_000), default=256, help="images per micro-batch")
    size = number(int, MIN_SIZE, 8192)
    if several_sizes:
        help = "sides of the square images in pixels, such as all sizes of a --size-schedule"
        arguments.add_argument("--size", type=size, nargs="+", default=[224], help=help)
    else:
        arguments.add_argument("--size", type=size, default=224, help="side of the square images in pixels")
    arguments.add_argument(
        "--capability", type=_capability, default=(9, 0), help="compute capability to compile for (9.0: H100, H200)"
    )
    arguments.add_argument(
        "--processes", type=number(int, 1, 1024), help="number of parallel compiler processes (default: one per core)"
    )
    arguments.add_argument(
        "--prune", action="store_true", help="delete cached files that no launch reads, such as intermediate code"
    )


def fill(work: Sequence[Callable[[], object]], options: argparse.Namespace) -> int:
    """Compile the kernels that `work` launches, and print a summary. Returns an exit code: 1 if a kernel failed."""
    if importlib.util.find_spec("triton") is None:
        print("error: Triton is not installed; install the triton package for this PyTorch version", file=sys.stderr)
        return 2
    from fat.kernels.prefill.compile_ahead import cache_folder, compile_ahead

    report = compile_ahead(
        work, capability=options.capability, processes=options.processes, progress=Progress(), wait=float("inf")
    )
    print(report)
    if report.problem is not None:
        print(f"error: {report.problem}", file=sys.stderr)
        return 1
    folder = cache_folder()
    if options.prune:
        prune(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    print(f"{folder}: {len(files)} files, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB")
    return 0


def prune(folder: Path) -> None:
    """Delete the files in Triton's cache that no launch reads, such as intermediate code."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in KEPT:
            path.unlink()


class Progress:
    """Prints how many kernels have been compiled, at most once every `EVERY` seconds."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream, self.last = stream, -EVERY

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= EVERY or done == total:
            print(f"compiling kernels {done}/{total}", file=self.stream, flush=True)
            self.last = now


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    try:
        return int(major), int(minor)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected MAJOR.MINOR, such as 9.0") from None
