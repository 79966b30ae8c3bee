"""Before a model runs with FAT's own kernels: compile them in parallel, compare each family with torch, and switch off
the families that fail.

The verdict depends on the device, the driver, torch, Triton, the kernels' sources and the model's shapes. It is kept
for these in a JSON file of its own under $XDG_CACHE_HOME/fat-pipeline/kernel-checks/ (~/.cache, if that is not set), so
the comparison runs once. Remove the folder to compare again. docs/kernels.md tells what is compared, and the bounds.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fat
import pipeline.augment
from fat import kernels
from fat.kernels import selfcheck
from fat.kernels.prefill.command import Progress
from fat.kernels.prefill.work import evaluation, training_step
from fat.kernels.selfcheck import Check, KernelFault
from launch.config.recipe import Recipe
from launch.engine.execution import KERNELS_VARIABLE, zero_and_precision
from launch.engine.kernel_verdict import Verdict, cache_folder, join_verdicts, read_verdict
from launch.feed import Feed
from launch.machine.provenance import device_name, driver_version, installed_version
from launch.machine.world import World
from pipeline.augment import kernels as augment_kernels
from pipeline.augment import selfcheck as augment_selfcheck
from pipeline.augment.pixels import launch_all
from pipeline.augment.recipe import AugmentRecipe
from shards.cores import cores
from shards.errors import UserError, first_line
from shards.files.durable import durable_write
from shards.files.private_folder import make_private

Work = Callable[[], object]


class KernelsUnusable(UserError):
    """A kernel has made the device unusable, so the process must end."""

    exit_code = 1


def check_recipe(recipe: Recipe, feed: Feed, model: fat.FAT) -> Verdict:
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
) -> Verdict:
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
    mine: Verdict | None = None
    if world.local_rank == 0:
        of_model = (mode or kernels.mode()) if kernels.supported(world.device.type) else "off"
        of_loader = kernels.mode() if augment_kernels.available(world.device) else "off"
        what = _Comparison(
            model=model if of_model == "auto" else None,
            augment=augment if of_loader == "auto" else None,
            size=size,
            dtype=dtype,
            gradients=gradients,
            frozen_norms=frozen_norms,
            device=world.device,
        )
        work = [*(passes if of_model != "off" else ())]
        if augment is not None and of_loader != "off":
            work.append(lambda: launch_all(augment, dtype))
        if what.model is not None or what.augment is not None:
            mine = what.verdict(work, tell=world.is_main)
        else:
            unchecked = "unchecked" in (of_model, of_loader if augment else "")
            why = "kernels are used unchecked, as asked for" if unchecked else "no kernels are used here"
            mine = replace(compiled(work, tell=world.is_main) if work else Verdict(), notes=(why,))
    elif kernels.supported(world.device.type):
        from fat.kernels.prefill.compile_ahead import keep_cache

        keep_cache()
    verdict = join_verdicts(mine, world)
    families = {failure.family for failure in verdict.failed}
    kernels.disable(*(families & set(kernels.FAMILIES)))
    augment_kernels.disable(*(families & set(augment_kernels.FAMILIES)))
    if world.is_main:
        _say(*verdict.lines())
    return verdict


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """What is compared on this device."""

    model: fat.FAT | None
    augment: AugmentRecipe | None
    size: int
    dtype: torch.dtype
    gradients: bool
    frozen_norms: bool
    device: torch.device

    def verdict(self, work: Sequence[Work], *, tell: bool) -> Verdict:
        """Compile the kernels of `work` and of the comparison; return the kept verdict, else a new one, which is then
        kept."""
        key = self._key()
        path = cache_folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"
        try:
            make_private(path.parent, remedy="set XDG_CACHE_HOME to a folder of your own")
            kept, unusable = read_verdict(path, key), ""
        except (OSError, UserError) as error:
            reason = f"cannot be written ({error.strerror})" if isinstance(error, OSError) else f"is not used ({error})"
            kept, unusable = None, f"{path.parent} {reason}, so the next run compares kernels again"
        if kept is not None:
            before = compiled(work, tell=tell)
            return replace(kept, warnings=before.warnings, compilation=before.compilation)
        if tell:
            _say(f"comparing kernels with torch, once for {key['device']} with these versions")
        try:
            checks = self._checks()
        except Exception as error:  # a check that cannot be made is no reason not to train
            why = f"{type(error).__name__}: {first_line(error)}"
            line = f"kernels: the comparison could not be made ({why}); they are used unchecked"
            before = compiled(work, tell=tell)
            return replace(before, warnings=(*before.warnings, line))
        before = compiled([*work, *(check.launch for check in checks)], tell=tell)
        start = time.perf_counter()
        try:
            with augment_kernels.disabled():
                failed = selfcheck.run(checks, self.device)
        except KernelFault as fault:
            raise KernelsUnusable(f"{fault}; start again with {KERNELS_VARIABLE}=off") from fault
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        checked = tuple(dict.fromkeys(check.families[-1] for check in checks))
        found = replace(
            before,
            checked=checked,
            failed=tuple(failed),
            source="compared now",
            seconds=time.perf_counter() - start,
        )
        if not unusable:
            try:
                durable_write(path, (json.dumps({"key": key, **found.to_dict()}, indent=1) + "\n").encode())
            except OSError as error:
                reason = f"cannot be written ({error.strerror})"
                unusable = f"{path.parent} {reason}, so the next run compares kernels again"
        return replace(found, warnings=(*found.warnings, unusable)) if unusable else found

    def _checks(self) -> list[Check]:
        checks: list[Check] = []
        if self.model is not None:
            checks += selfcheck.cases(
                self.model, self.size, self.dtype, gradients=self.gradients, frozen_norms=self.frozen_norms
            )
        if self.augment is not None:
            checks += augment_selfcheck.cases(self.augment, self.dtype)
        return checks

    def _key(self) -> dict[str, Any]:
        """All that the verdict depends on."""
        cuda = self.device.type == "cuda"
        return {
            "device": device_name(self.device),
            "capability": list(torch.cuda.get_device_capability(self.device)) if cuda else None,
            "driver": driver_version(),
            "torch": torch.__version__,
            "triton": installed_version("triton"),
            "sources": _digest(_sources()),
            "model": None if self.model is None else _digest([str(self.model).encode()]),
            "use": [self.size, str(self.dtype), self.gradients, self.frozen_norms],
            "augmentation": None if self.augment is None else repr(self.augment),
        }


def compiled(work: Sequence[Work], *, tell: bool) -> Verdict:
    """Compile what `work` launches into Triton's cache; a verdict that says only how that went."""
    try:
        from fat.kernels.prefill.compile_ahead import compile_ahead
    except ImportError as error:  # it uses parts of Triton that another version may not have
        return Verdict(warnings=(f"kernels not compiled ahead, but by their first launch: {first_line(error)}",))
    report = compile_ahead(work, processes=cores(), progress=Progress(sys.stderr) if tell else None)
    warnings = () if report.problem is None else (report.problem,)
    return Verdict(warnings=warnings, compilation=str(report) if report.total else "")


def _sources() -> list[bytes]:
    """The files that kernels and their use are written in, each with its name."""
    folders = [Path(package.__path__[0]) for package in (fat, pipeline.augment)]
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return [part for path in files for part in (path.name.encode(), path.read_bytes())]


def _digest(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)
