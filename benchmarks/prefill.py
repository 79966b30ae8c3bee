"""Compile the kernels of GPU tests and benchmarks into Triton's cache, on a machine without a GPU.

    TRITON_CACHE_DIR=DIR python benchmarks/prefill.py [--models fat_b0 ...] [--batch 256] [--prune] [--sweep fat_b0]
                                                      [--work step eval augment check digits benchmarks sweep tests]

Kinds of --work:

  step, eval   a training step of each model, and its evaluation
  augment      augmentation with the recipe `fat`
  check        the self-check of kernels at the start of a run, for each model with that augmentation
  digits       the demo: FAT-B0 at 64 pixels, recipe `light`, its evaluation and self-check
  benchmarks   the kernels of benchmarks/kernels.py
  sweep        the kernels of benchmarks/sweep.py
  tests        the kernels of tests/gpu/test_kernels.py and tests/gpu/test_training_step.py

`python -m fat.kernels.prefill` does only `step` and `eval`, and documents on which machines the cache can be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import fat
from fat.kernels import selfcheck
from fat.kernels.impl import tiles
from fat.kernels.prefill.command import add_options, fill
from fat.kernels.prefill.work import evaluation, training_step

Work = Callable[[], object]
DIGITS, DIGITS_BATCH, DIGITS_SIZE = 10, 64, 64
DIGITS_LAST = 40  # images in the last batch of the evaluation: 360 images in batches of 64
TEST_BATCH, TEST_SIZE = 8, 224


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--models", nargs="+", choices=fat.list_models(), default=fat.list_models())
    parser.add_argument("--work", nargs="+", choices=tuple(WORK), default=list(WORK))
    parser.add_argument(
        "--sweep",
        nargs="+",
        choices=fat.list_models(),
        default=[],
        help="models for which --work benchmarks also compiles all launch configurations of the weight gradients",
    )
    options = parser.parse_args()
    return fill([run for kind in options.work for run in WORK[kind](options)], options)


def steps(options: argparse.Namespace) -> Iterator[Work]:
    for name in options.models:
        yield training_step(model(name), (options.batch, 3, options.size, options.size))


def evaluations(options: argparse.Namespace) -> Iterator[Work]:
    for name in options.models:
        yield evaluation(model(name), (options.batch, 3, options.size, options.size))


def augmentation(options: argparse.Namespace) -> Iterator[Work]:
    yield augmented("fat", options.size)


def comparisons(options: argparse.Namespace) -> Iterator[Work]:
    for name in options.models:
        yield compared(selfcheck.cases(model(name), options.size, torch.bfloat16))
    yield compared(augmentation_cases("fat", options.size, torch.bfloat16))


def digits(options: argparse.Namespace) -> Iterator[Work]:
    small = model("fat_b0", drop_path=0.0, num_classes=DIGITS)
    yield training_step(small, (DIGITS_BATCH, 3, DIGITS_SIZE, DIGITS_SIZE))
    for rows in (DIGITS_BATCH, DIGITS_LAST):
        yield evaluation(small, (rows, 3, DIGITS_SIZE, DIGITS_SIZE))
    yield compared(selfcheck.cases(small, DIGITS_SIZE, torch.bfloat16))
    yield compared(augmentation_cases("light", DIGITS_SIZE, torch.bfloat16))
    yield augmented("light", DIGITS_SIZE)


def benchmarks(options: argparse.Namespace) -> Iterator[Work]:
    from benchmarks import kernel_jobs

    def run(variants: list[str], sweep: bool) -> None:
        wanted = argparse.Namespace(
            variants=variants, stages=[1, 2, 3, 4], batch=options.batch, size=options.size, dtype="bfloat16"
        )
        # `Module.to` fails for fake tensors.
        stay = mock.patch.object(torch.nn.Module, "to", lambda module, *args, **kwargs: module)
        with stay, mock.patch.object(kernel_jobs, "DEVICE", "cpu"):
            for job in kernel_jobs.jobs(wanted):
                if not sweep:
                    for way in ("ours", kernel_jobs.OTHER_FORM):
                        job.ways.get(way, lambda: None)()
                elif job.trains and "weight" in job.name:
                    for _, call in kernel_jobs.weight_forms(job.ways["ours"]):
                        call()

    if options.sweep:
        yield lambda: run(options.sweep, True)
    yield lambda: run(["fat_b0", "fat_b3"], False)


def sweep(options: argparse.Namespace) -> Iterator[Work]:
    from benchmarks import kernel_jobs
    from benchmarks import sweep as candidates

    def run() -> None:
        with mock.patch.object(kernel_jobs, "DEVICE", "cpu"):
            for call in candidates.CALLS:
                launch, _ = call.make(options.batch)
                for _, shaped in candidates.candidates(call):
                    with shaped:
                        launch()

    yield run


def tests(options: argparse.Namespace) -> Iterator[Work]:
    from tests.gpu import test_kernels as cases
    from tests.gpu import test_training_step as steps
    from tests.support import kernel_checks as checks
    from tests.support import training_loop

    def run() -> None:
        draw = checks.Draw.seeded(0, "cpu")
        with (
            mock.patch.object(checks, "expect", return_value=None),
            mock.patch.object(torch, "equal", return_value=True),
            mock.patch.object(torch.Tensor, "item", return_value=1.0),
        ):
            for case in cases.DEPTHWISE:
                checks.check_depthwise(case, draw)
                for form in (tiles.strips, tiles.patches):
                    with mock.patch.object(tiles, "weight_gradient", form):
                        checks.check_weight_gradient(case, draw)
            for case in cases.NORMED:
                checks.check_depthwise_stats(case, draw)
            for outputs, channels, dtype in cases.FOLDED:
                checks.check_fold(outputs, channels, dtype, draw)
            for case in cases.GATED:
                checks.check_depthwise_gate(case, draw)
                checks.check_depthwise_norm(case, draw)
            for queries, keys, heads, dtype in cases.ATTENTION:
                checks.check_attend(queries, keys, heads, dtype, draw)
            for shape, dtype in cases.MAPS:
                checks.check_gate(shape, dtype, draw)
                checks.check_norm(shape, dtype, 0.0, draw)
                checks.check_add(shape, dtype, True, draw)

    yield run
    for name in ("fat_b0", "fat_b3"):
        for dtype in (torch.bfloat16, torch.float32):
            whole = model(name, drop_path=0.0)
            yield training_step(whole, (TEST_BATCH, 3, TEST_SIZE, TEST_SIZE), dtype=dtype)
    for dtype in (torch.bfloat16, torch.float32):
        yield compared(selfcheck.cases(model("fat_b0"), TEST_SIZE, dtype))
        yield compared(augmentation_cases("fat", TEST_SIZE, dtype))
        yield training_step(model(steps.CONFIG), (steps.ROWS, 3, steps.SIDE, steps.SIDE), dtype=dtype)
        yield evaluation(model(steps.CONFIG), (steps.ROWS + 2, 3, steps.SIDE, steps.SIDE), dtype=dtype)
    yield compared(selfcheck.cases(model("fat_b0"), 64, torch.bfloat16))
    for rows in (32, 16):  # micro-batch sizes without and with gradient accumulation
        yield training_step(model(training_loop.CONFIG), (rows, 3, training_loop.SIZE, training_loop.SIZE))


def model(name: str | fat.FATConfig, **config: Any) -> fat.FAT:
    with torch.device("meta"):
        return fat.create_model(name, **config)


def compared(checks: Sequence[selfcheck.Check]) -> Work:
    """Launch the kernels of a self-check."""

    def run() -> None:
        for check in checks:
            check.launch()

    return run


def augmentation_cases(recipe: str, size: int, dtype: torch.dtype) -> Sequence[selfcheck.Check]:
    from pipeline.augment import selfcheck as augment_selfcheck
    from pipeline.augment.recipe import augment_recipe

    return augment_selfcheck.cases(augment_recipe(recipe, size=size), dtype)


def augmented(recipe: str, size: int) -> Work:
    from pipeline.augment.pixels import launch_all
    from pipeline.augment.recipe import augment_recipe

    return lambda: launch_all(augment_recipe(recipe, size=size), torch.bfloat16)


WORK: dict[str, Callable[[argparse.Namespace], Iterator[Work]]] = {
    "step": steps,
    "eval": evaluations,
    "augment": augmentation,
    "check": comparisons,
    "digits": digits,
    "benchmarks": benchmarks,
    "sweep": sweep,
    "tests": tests,
}

if __name__ == "__main__":
    sys.exit(main())
