"""Before a model runs with FAT's own kernels: compile them in parallel, compare each family with torch, and switch off
the families that fail. docs/kernels.md tells what is compared, and the bounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

import fat
from fat import kernels
from fat.kernels import selfcheck
from fat.kernels.prefill.command import Progress
from fat.kernels.prefill.work import evaluation, training_step
from fat.kernels.selfcheck import Check, Failure, KernelFault
from launch.config.recipe import Recipe
from launch.engine.execution import KERNELS_VARIABLE, zero_and_precision
from launch.feed import Feed
from launch.machine.world import World
from pipeline.augment import kernels as augment_kernels
from pipeline.augment import selfcheck as augment_selfcheck
from pipeline.augment.pixels import launch_all
from pipeline.augment.recipe import AugmentRecipe
from shards.cores import cores
from shards.errors import UserError, first_line

Work = Callable[[], object]


class KernelsUnusable(UserError):
    """A kernel has made the device unusable, so the process must end."""

    exit_code = 1


@dataclass(frozen=True)
class KernelCheckResult:
    """What the comparison has found, the same on every rank. Written to recipe.json."""

    checked: tuple[str, ...] = ()
    """Families that were compared with torch."""
    failed: tuple[Failure, ...] = ()
    """Those of them that are switched off, and why: they failed on any node."""
    seconds: float = 0.0
    """Duration of the comparison on rank 0's node, without compilation."""
    warnings: tuple[str, ...] = ()
    """Why no comparison could be made, or kernels could not be compiled ahead, on any node."""
    compilation: str = ""
    """How many kernels were compiled before their first launch, on rank 0's node."""

    @property
    def resolved(self) -> dict[str, str]:
        """Summaries for the log, beside those of the engine."""
        check = "; ".join(("not compared", *self.warnings))
        if self.checked:
            off = ", ".join(failure.family for failure in self.failed)
            outcome = f"switched off: {off}" if off else "all agree with torch"
            check = f"{len(self.checked)} families compared in {self.seconds:.1f} s; {outcome}"
        return {"kernel check": check} | ({"kernel compilation": self.compilation} if self.compilation else {})


def check_training_kernels(recipe: Recipe, feed: Feed, model: fat.FAT) -> KernelCheckResult:
    """`check_kernels` for a training run."""
    _, precision = zero_and_precision(recipe.parallel, feed.world.device, ranks=feed.world.size)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    frozen, sides = recipe.model.freeze_bn, (3, recipe.data.size, recipe.data.size)
    return check_kernels(
        model,
        feed.world,
        size=recipe.data.size,
        dtype=dtype,
        frozen_norms=frozen,
        augment=None if feed.loader_options.loader == "synthetic" else feed.augment,
        mode=recipe.compile.kernels,
        passes=[
            training_step(model, (feed.shape.micro_rows, *sides), dtype=dtype, freeze_bn=frozen),
            evaluation(model, (feed.eval_rows, *sides), dtype=dtype),
        ],
    )


def check_kernels(
    model: fat.FAT,
    world: World,
    *,
    size: int,
    dtype: torch.dtype,
    gradients: bool = True,
    frozen_norms: bool = False,
    augment: AugmentRecipe | None = None,
    mode: kernels.Mode | None = None,
    passes: Sequence[Work] = (),
) -> KernelCheckResult:
    """Compile the kernels that a model and its loader will use, compare them with torch, and switch off the families
    that fail.

    Collective: the first rank of every node compiles and compares while its other ranks wait, and a family that fails
    on one node is switched off on all ranks, so that results do not depend on the rank. Rank 0 prints progress and
    warnings to stderr. Nothing is compared where kernels do not serve, or with mode "unchecked".

    Args:
        model: is left as it is.
        size: side of its images in pixels.
        dtype: bfloat16 = under autocast, float32 = without; also of the loader's batches.
        gradients: whether it is trained, or evaluated only.
        frozen_norms: BatchNorm stands still in training.
        augment: what the loader does on the device, if anything.
        mode: the model's kernels; None = `fat.kernels.mode()`, by which augmentation goes in any case.
        passes: what the model will run, for `fat.kernels.prefill`.

    Raises:
        KernelsUnusable: a kernel has made the device unusable.
    """
    of_model = (mode or kernels.mode()) if kernels.supported(world.device.type) else "off"
    of_loader = kernels.mode() if augment is not None and augment_kernels.available(world.device) else "off"

    def cases() -> list[Check]:
        found: list[Check] = []
        if of_model == "auto":
            found += selfcheck.cases(model, size, dtype, gradients=gradients, frozen_norms=frozen_norms)
        if augment is not None and of_loader == "auto":
            found += augment_selfcheck.cases(augment, dtype)
        return found

    work = list(passes) if of_model != "off" else []
    if augment is not None and of_loader != "off":
        work.append(lambda: launch_all(augment, dtype))
    mine: KernelCheckResult | None = None
    if world.local_rank == 0:
        mine = _check_on_this_node(cases, work, world)
    elif work:
        compile_kernels((), tell=False)  # nothing, but let launches find what the first rank has compiled
    nodes = [verdict for verdict in world.gather(mine) if verdict is not None]
    failed: dict[str, Failure] = {}
    for failure in (failure for node in nodes for failure in node.failed):
        failed.setdefault(failure.family, failure)
    warnings = dict.fromkeys(line for node in nodes for line in node.warnings)
    kernels.disable(*failed.keys() & set(kernels.FAMILIES))
    augment_kernels.disable(*failed.keys() & set(augment_kernels.FAMILIES))
    if world.is_main:
        off = [
            f"the {family} kernels do not agree with torch and are switched off: {failure}"
            for family, failure in failed.items()
        ]
        for line in (*off, *warnings):
            print(f"warning: {line}", file=sys.stderr, flush=True)
    return replace(nodes[0], failed=tuple(failed.values()), warnings=tuple(warnings))


def _check_on_this_node(cases: Callable[[], list[Check]], work: Sequence[Work], world: World) -> KernelCheckResult:
    """Compile the kernels of `work` and of the comparison, and compare."""
    checks: list[Check] = []
    warnings: list[str] = []
    try:
        checks = cases()
    except Exception as error:  # a comparison that cannot be made is no reason not to train
        why = f"{type(error).__name__}: {first_line(error)}"
        warnings.append(f"kernels: the comparison could not be made ({why}); they are used unchecked")
    launches = [*work, *(check.launch for check in checks)]
    if not launches:
        return KernelCheckResult(warnings=tuple(warnings))
    compilation, problem = compile_kernels(launches, tell=world.is_main)
    if problem is not None:
        warnings.append(problem)
    start = time.perf_counter()
    try:
        with augment_kernels.disabled():
            failed = selfcheck.run(checks, world.device)
    except KernelFault as fault:
        raise KernelsUnusable(f"{fault}; start again with {KERNELS_VARIABLE}=off") from fault
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return KernelCheckResult(
        checked=tuple(dict.fromkeys(check.families[-1] for check in checks)),
        failed=tuple(failed),
        seconds=round(time.perf_counter() - start, 2),
        warnings=tuple(warnings),
        compilation=compilation,
    )


def compile_kernels(work: Sequence[Work], *, tell: bool) -> tuple[str, str | None]:
    """Compile what `work` launches into Triton's cache, and make this process look kernels up there.

    Returns:
        A summary, empty if nothing is launched; and what went wrong in a line, None if nothing did.
    """
    try:
        from fat.kernels.prefill.compile_ahead import compile_ahead
    except ImportError as error:  # it uses parts of Triton that another version may not have
        return "", f"kernels not compiled ahead, but by their first launch: {first_line(error)}"
    report = compile_ahead(work, processes=cores(), progress=Progress(sys.stderr) if tell else None)
    return str(report) if report.total else "", report.problem
