"""Self-check of the Triton kernels: compile them in parallel, compare each kernel family with PyTorch, and disable the
families that fail. docs/kernels.md describes the comparisons and their tolerances.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fat import kernels
from fat.kernels import selfcheck
from fat.kernels.prefill.command import Progress
from fat.kernels.prefill.work import evaluation, training_step
from fat.kernels.selfcheck import Check, Failure, KernelFault
from fat.model import Trunk
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
    """A kernel has left the device in an error state, so the process must end."""

    exit_code = 1


@dataclass(frozen=True)
class KernelCheckResult:
    """Result of the self-check, equal on all ranks. It is written to recipe.json."""

    checked: tuple[str, ...] = ()
    """Kernel families that were compared with PyTorch."""
    failed: tuple[Failure, ...] = ()
    """Families that failed on any node, and are therefore disabled on all."""
    seconds: float = 0.0
    """Duration of the comparison on rank 0's node, without compilation."""
    warnings: tuple[str, ...] = ()
    """Reasons why the comparison or the compilation ahead of time failed, from all nodes."""
    compilation: str = ""
    """Summary of the kernels that were compiled ahead of time on rank 0's node."""

    @property
    def resolved(self) -> dict[str, str]:
        """Summaries for the log, by name."""
        check = "; ".join(("not compared", *self.warnings))
        if self.checked:
            disabled = ", ".join(failure.family for failure in self.failed)
            outcome = f"disabled: {disabled}" if disabled else "all agree with PyTorch"
            check = f"{len(self.checked)} families compared in {self.seconds:.1f} s; {outcome}"
        return {"kernel check": check} | ({"kernel compilation": self.compilation} if self.compilation else {})


def check_training_kernels(recipe: Recipe, feed: Feed, model: nn.Module) -> KernelCheckResult:
    """Run `check_kernels` for a training run. Collective."""
    _, precision = zero_and_precision(recipe.parallel, feed.world.device, ranks=feed.world.size)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    frozen, size = recipe.model.frozen_norms, recipe.data.evaluation_size
    shapes = dict.fromkeys((shape.rows, shape.size) for shape in feed.input_shapes)
    return check_kernels(
        model,
        feed.world,
        sizes=sorted({size, *(side for _, side in shapes)}),
        dtype=dtype,
        frozen_norms=frozen,
        augment=None if feed.loader_options.loader == "synthetic" else feed.augment,
        mode=recipe.compile.kernels,
        passes=[
            *(training_step(model, (rows, 3, side, side), dtype=dtype, freeze_bn=frozen) for rows, side in shapes),
            evaluation(model, (feed.eval_rows, 3, size, size), dtype=dtype),
        ],
    )


def check_kernels(
    model: nn.Module,
    world: World,
    *,
    sizes: Sequence[int],
    dtype: torch.dtype,
    gradients: bool = True,
    frozen_norms: bool = False,
    augment: AugmentRecipe | None = None,
    mode: kernels.Mode | None = None,
    passes: Sequence[Work] = (),
) -> KernelCheckResult:
    """Compile the kernels of a model and its loader, compare them with PyTorch, and disable the families that fail.

    Collective: the first rank of every node compiles and compares while the node's other ranks wait. A family that
    fails on one node is disabled on all ranks, so that results do not depend on the rank. Rank 0 prints progress and
    warnings to stderr. Nothing is compared if kernels are not used, or with mode "unchecked". Of other models than FAT,
    only the kernels of the loader are checked.

    Args:
        model: it is not changed.
        sizes: heights and widths of its images in pixels.
        dtype: dtype of the batches. bfloat16: the model runs under autocast; float32: without autocast.
        gradients: whether the model is trained, not only evaluated.
        frozen_norms: whether BatchNorm uses its running statistics in training.
        augment: augmentation that the loader runs on the device; None: none.
        mode: kernel mode of the model; None: `fat.kernels.mode()`, which the loader always uses.
        passes: functions that run the model, from `fat.kernels.prefill`.

    Raises:
        KernelsUnusable: a kernel has left the device in an error state.
    """
    uses_kernels = isinstance(model, Trunk) and kernels.supported(world.device.type)
    of_model = (mode or kernels.mode()) if uses_kernels else "off"
    of_loader = kernels.mode() if augment is not None and augment_kernels.available(world.device) else "off"

    def cases() -> list[Check]:
        found: list[Check] = []
        if of_model == "auto" and isinstance(model, Trunk):
            options = {"gradients": gradients, "frozen_norms": frozen_norms}
            found += dict.fromkeys(case for size in sizes for case in selfcheck.cases(model, size, dtype, **options))
        if augment is not None and of_loader == "auto":
            found += augment_selfcheck.cases(augment, dtype)
        return found

    work = list(passes) if of_model != "off" else []
    if augment is not None and of_loader != "off":
        work.append(lambda: launch_all(augment, dtype))
    result: KernelCheckResult | None = None
    if world.local_rank == 0:
        result = _check_on_this_node(cases, work, world)
    elif work:
        compile_kernels((), show_progress=False)  # loads the kernels that local rank 0 has compiled
    nodes = [result for result in world.gather(result) if result is not None]
    failed: dict[str, Failure] = {}
    for failure in (failure for node in nodes for failure in node.failed):
        failed.setdefault(failure.family, failure)
    warnings = dict.fromkeys(line for node in nodes for line in node.warnings)
    kernels.disable(*failed.keys() & set(kernels.FAMILIES))
    augment_kernels.disable(*failed.keys() & set(augment_kernels.FAMILIES))
    if world.is_main:
        disabled = [
            f"the {family} kernels differ from PyTorch, so PyTorch is used instead: {failure}"
            for family, failure in failed.items()
        ]
        for line in (*disabled, *warnings):
            print(f"warning: {line}", file=sys.stderr, flush=True)
    return replace(nodes[0], failed=tuple(failed.values()), warnings=tuple(warnings))


def _check_on_this_node(cases: Callable[[], list[Check]], work: Sequence[Work], world: World) -> KernelCheckResult:
    """Compile the kernels of `work` and of the comparison, then compare them with PyTorch."""
    checks: list[Check] = []
    warnings: list[str] = []
    try:
        checks = cases()
    except Exception as error:  # a failure of the self-check alone must not prevent training
        reason = f"{type(error).__name__}: {first_line(error)}"
        warnings.append(f"the self-check of the kernels failed ({reason}); they are used unchecked")
    launches = [*work, *(check.launch for check in checks)]
    if not launches:
        return KernelCheckResult(warnings=tuple(warnings))
    compilation, problem = compile_kernels(launches, show_progress=world.is_main)
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


def compile_kernels(work: Sequence[Work], *, show_progress: bool) -> tuple[str, str | None]:
    """Compile the kernels that `work` launches into Triton's cache, from which this process then loads kernels.

    Returns:
        A summary (empty if no kernel is launched), and the first error in one line (None if there was none).
    """
    try:
        from fat.kernels.prefill.compile_ahead import compile_ahead
    except ImportError as error:  # compile-ahead uses internals of Triton that other versions may lack
        return "", f"kernels are compiled at their first launch, not ahead of time: {first_line(error)}"
    report = compile_ahead(work, processes=cores(), progress=Progress(sys.stderr) if show_progress else None)
    return str(report) if report.total else "", report.problem
