"""Fill Triton's cache with the kernels of FAT's training steps and evaluation.

    TRITON_CACHE_DIR=DIR python -m fat.kernels.prefill [--models fat_b0 ...] [--batch 256] [--size 224] [--prune]

Needs no GPU. The cache serves a machine of that compute capability with the same Python, the same versions of torch and
Triton and the same sources, at the same paths: its keys are hashes of these, and it holds absolute paths.
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
from fat.kernels.prefill.work import evaluation, training_step

KEPT = (".cubin", ".json", ".so")  # what a launch reads
WORK = {"step": training_step, "eval": evaluation}
EVERY = 5.0  # seconds between two lines of progress


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fat.kernels.prefill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--models", nargs="+", choices=fat.list_models(), default=["fat_b0"])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--work", nargs="+", choices=tuple(WORK), default=list(WORK))
    options = parser.parse_args()
    work: list[Callable[[], object]] = []
    for name in options.models:
        with torch.device("meta"):
            model = fat.create_model(name)
        shape = (options.batch, model.config.in_chans, options.size, options.size)
        work += [WORK[kind](model, shape, dtype=getattr(torch, options.dtype)) for kind in options.work]
    return fill(work, options)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every tool that fills the cache."""
    parser.add_argument("--batch", type=_whole_number(1_000_000), default=256, help="images per micro-batch")
    parser.add_argument("--size", type=_whole_number(8192), default=224, help="side of the images in pixels")
    parser.add_argument(
        "--capability", type=_capability, default=(9, 0), help="compute capability of the GPU (9.0: H100, H200)"
    )
    parser.add_argument("--processes", type=_whole_number(1024), help="compilers at a time (one per core)")
    parser.add_argument("--prune", action="store_true", help="delete all but machine code, metadata and launchers")


def fill(work: Sequence[Callable[[], object]], options: argparse.Namespace) -> int:
    """Compile what `work` launches, and print what was done. Returns an exit code: 1 when anything failed."""
    if importlib.util.find_spec("triton") is None:
        print("error: Triton is not installed; install the triton package of this torch version", file=sys.stderr)
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
    """Delete the intermediate code in Triton's cache, which no launch reads."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in KEPT:
            path.unlink()


class Progress:
    """Prints how many kernels are compiled, at most once in `EVERY` seconds."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream, self.last = stream, -EVERY

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= EVERY or done == total:
            print(f"compiling kernels {done}/{total}", file=self.stream, flush=True)
            self.last = now


def _whole_number(most: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from 1 to `most`, as argparse takes it."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text[:60]}: a whole number from 1 to {most:,} expected")
        return int(text)

    return parse


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    try:
        return int(major), int(minor)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected MAJOR.MINOR, such as 9.0") from None
