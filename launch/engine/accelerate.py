"""Wrap model and optimizer with accelerate, for DDP or DeepSpeed's ZeRO.

Only `launch/monitor/tracker_backends.py` calls accelerate too. `launch/optim/zero_state.py` accesses DeepSpeed's
internal state.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launch.config.errors import RecipeError
from launch.machine.world import World

FOLDER = Path(__file__).resolve().parents[1] / "zero"


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    zero: int,
    bf16: bool,
    clip_grad: float,
) -> tuple[Any, Any]:
    """Wrap model and optimizer. Collective.

    With ZeRO 1 and 2 and a fused optimizer, the caller computes the gradient norm, clips and skips updates
    (`OptimizerState.clip_gradients`), because DeepSpeed's implementation makes the host wait for the device.

    Args:
        model: on its device.
        zero: ZeRO stage; 0 = DDP.
        bf16, clip_grad: used only in the DeepSpeed configuration.

    Returns:
        The wrapped model, and the optimizer to step: PyTorch's without ZeRO, else DeepSpeed's.

    Raises:
        RecipeError: the processes were launched in a way in which they would not train together.
    """
    cuda = world.device.type == "cuda"
    if not cuda:
        # accelerate reads these variables. ACCELERATE_USE_CPU is necessary for DDP with gloo, but would silently bypass
        # DeepSpeed.
        os.environ["DS_ACCELERATOR"] = "cpu"
        if zero:
            os.environ.pop("ACCELERATE_USE_CPU", None)
        else:
            os.environ["ACCELERATE_USE_CPU"] = "true"
    if zero and not dist.is_initialized():
        # DeepSpeed requires a process group even for one process. A HashStore needs no port.
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
            os.environ.setdefault(name, str(value))
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)

    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    # `Engine.average_statistics` averages buffers before they are used, so DDP need not broadcast them at every step.
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if dist.is_initialized():
        handlers.append(InitProcessGroupKwargs(backend=dist.get_backend()))
    plugin = None
    if zero:
        config = deepspeed_config(
            zero,
            model,
            fused=optimizer.defaults["fused"],
            bf16=bf16,
            clip_grad=clip_grad,
        )
        plugin = DeepSpeedPlugin(hf_ds_config=config)
    # Accelerate keeps the settings of the first engine of a process, but `pipeline tune` builds several.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if zero and not cuda:
        _without_cpu_extension()
    accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=handlers)
    _check_agreement(accelerator, world)
    with warnings.catch_warnings():
        # The newest PyTorch deprecates `broadcast_buffers`, but older versions lack its new name.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped, _ = accelerator.prepare(model, optimizer)
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        # By default DDP waits for the device at every 100th step, to collect statistics that are not used here.
        wrapped._set_ddp_runtime_logging_sample_rate(2**31 - 1)
        if not cuda:
            _arrange_buckets(wrapped)
    return (wrapped, wrapped.optimizer) if zero else (wrapped, optimizer)


def _arrange_buckets(wrapped: nn.parallel.DistributedDataParallel) -> None:
    """Let DDP arrange its buckets of gradients before the first step of a start. Collective.

    DDP arranges them anew after the first backward pass, in the order in which that pass computed the gradients. With
    three ranks or more, gloo adds the gradients of the ranks in an order that depends on their place in a bucket, so
    the first step after a start would be rounded differently than the same step of a run that was not interrupted. Here
    they are arranged by a backward pass whose gradients are zero, in the reverse order of the parameters.
    """
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    wrapped.reducer.prepare_for_forward()
    wrapped.reducer.prepare_for_backward([])
    torch.stack([0.0 * parameter.sum() for parameter in trained]).sum().backward()
    for parameter in trained:
        parameter.grad = None


def _without_cpu_extension() -> None:
    """Prevent DeepSpeed from compiling its C++ extension for communication between CPUs, which takes a minute.

    Only tensor-parallel inference uses the extension. If its compilation is killed, its lock blocks all later starts.
    """
    # Not `import deepspeed.comm.torch`, whose attribute `torch` is the library.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def deepspeed_config(zero: int, model: nn.Module, *, fused: bool, bf16: bool, clip_grad: float) -> dict[str, Any]:
    """Return the configuration `launch/zero/zeroN.json`, completed with the values of this run (see `wrap`).

    Args:
        fused: whether the optimizer is fused.
    """
    config: dict[str, Any] = json.loads((FOLDER / f"zero{zero}.json").read_text(encoding="utf-8"))
    # The number of micro-batches can change between steps, so the engine itself divides the loss by it and marks the
    # last micro-batch of each step.
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config["torch_autocast"]["enabled"] = bf16
    settings = config["zero_optimization"]
    if zero == 3:
        settings["overlap_comm"] &= next(model.parameters()).is_cuda
    else:
        # Every backward pass allocates a full gradient bucket, so a bucket should not be larger than all gradients.
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        settings["reduce_bucket_size"] = min(settings["reduce_bucket_size"], trained)
    caller_clips = zero < 3 and fused
    settings |= {"compute_grad_norm": False} if caller_clips else {}
    config["gradient_clipping"] = 0.0 if caller_clips else clip_grad
    return config


def _check_agreement(accelerator: Any, world: World) -> None:
    """Raise RecipeError if launcher, torch.distributed and accelerate disagree about the number of processes.

    Otherwise each rank could silently train alone.
    """
    kind, seen = accelerator.distributed_type.value, accelerator.num_processes
    joined = dist.get_world_size() if dist.is_initialized() else 1
    if joined != world.size or seen != world.size or (kind == "NO" and world.size > 1):
        raise RecipeError(
            f"WORLD_SIZE is {world.size}, but torch.distributed has {joined} processes and accelerate {seen} of type "
            f"{kind}: the ranks would not train together; launch with 'accelerate launch --multi_gpu --num_processes "
            "N launch/train.py ...' (on CPUs too)"
        )
