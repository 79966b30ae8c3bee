"""Model and optimiser -> wrapped by accelerate: plain data parallel (DDP), or DeepSpeed's ZeRO.

With `launch/trackers.py` the only file that knows accelerate; `launch/masters.py` knows DeepSpeed's insides.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launch.recipe import RecipeError
from launch.world import World

FOLDER = Path(__file__).with_name("zero")


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    zero: int,
    bf16: bool,
    micro_batch: int,
    accumulation: int,
    clip_grad: float,
) -> tuple[Any, Any]:
    """(wrapped model, optimiser that steps): DDP and torch's own without ZeRO, else DeepSpeed's of both. Collective.

    Args:
        model: on its device.
        zero: ZeRO stage; 0 = plain.
        bf16, micro_batch, accumulation, clip_grad: DeepSpeed must know them; DDP need not.

    Raises:
        RecipeError: the processes were launched so that they would not train together.
    """
    cuda = world.device.type == "cuda"
    if not cuda:
        # accelerate decides by these: "use CPU" would silently bypass DeepSpeed, and is what plain gloo ranks need.
        os.environ["DS_ACCELERATOR"] = "cpu"
        if zero:
            os.environ.pop("ACCELERATE_USE_CPU", None)
        else:
            os.environ["ACCELERATE_USE_CPU"] = "true"
    if zero and not dist.is_initialized():
        # DeepSpeed wants a process group even for one process; this one needs no port.
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
            os.environ.setdefault(name, str(value))
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)

    # DeepSpeed before 0.19.8 looks for nvcc when it is imported, though nothing of ours needs it.
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    # Buffers are averaged when they matter (`Engine.average_statistics`), not broadcast at every step.
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if dist.is_initialized():
        handlers.append(InitProcessGroupKwargs(backend=dist.get_backend()))
    plugin = None
    if zero:
        config: dict[str, Any] = json.loads((FOLDER / f"zero{zero}.json").read_text(encoding="utf-8"))
        config["train_micro_batch_size_per_gpu"] = micro_batch
        config["gradient_accumulation_steps"] = accumulation
        config["gradient_clipping"] = clip_grad
        config["torch_autocast"]["enabled"] = bf16
        config["zero_optimization"]["overlap_comm"] &= cuda
        plugin = DeepSpeedPlugin(hf_ds_config=config)
    accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=handlers)
    _check_agreement(accelerator, world, zero)
    with warnings.catch_warnings():
        # `broadcast_buffers` has a new name in the newest torch only.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped, _ = accelerator.prepare(model, optimizer)
    return (wrapped, wrapped.optimizer) if zero else (wrapped, optimizer)


def _check_agreement(accelerator: Any, world: World, zero: int) -> None:
    """The traps of launching end here: ranks that each believe to be alone would train apart without a word."""
    kind, seen = accelerator.distributed_type.value, accelerator.num_processes
    joined = dist.get_world_size() if dist.is_initialized() else 1
    if joined != world.size or seen != world.size or (kind == "NO" and world.size > 1):
        raise RecipeError(
            f"WORLD_SIZE is {world.size}, torch.distributed sees {joined}, accelerate {seen} processes of type {kind}: "
            "the ranks would not train together; launch with 'accelerate launch --multi_gpu --num_processes N "
            "launch/train.py ...' (on CPUs too)"
        )
    if bool(zero) != (kind == "DEEPSPEED"):
        raise RecipeError(
            f"--zero {zero} asked for, but accelerate chose {kind}; do not set ACCELERATE_USE_DEEPSPEED or a "
            "DeepSpeed configuration in the launcher: the recipe decides"
        )
