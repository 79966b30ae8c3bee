"""Options of distribution, precision and execution. They affect speed and memory, and results only by rounding."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from launch.config.errors import RecipeError
from shards.option_help import default
from shards.redact import printable

OptimizerImpl = Literal["fused", "foreach"]
MemoryFormat = Literal["channels-last", "contiguous"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Distribution over ranks, and precision."""

    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage. 0 = DistributedDataParallel without DeepSpeed; auto = 1 on several GPUs, 0 on one GPU and
    on CPUs. A run can be resumed with another stage. Try 0 on slow networks."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 = autocast to bfloat16, with parameters, optimizer state and BatchNorm statistics in float32; fp32 = float32
    throughout; auto = bf16 on GPUs, fp32 on CPUs."""
    sync_bn: str = "auto"
    """Ranks over which BatchNorm statistics are computed. on = all ranks; off = each rank alone; group:N = groups of N
    consecutive ranks; auto = on for several GPUs, else off. group:8 avoids communication between nodes of 8 GPUs."""
    numa_binding: bool = True
    """Bind each rank to the CPU cores and memory of its GPU's NUMA node, on machines with several NUMA nodes."""
    check_nodes: bool = True
    """Measure devices, network and storage of all nodes for at most 20 s before a run on several nodes, and warn about
    slow nodes ('pipeline doctor' measures for longer). RUN/doctor.json gets the measurements."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|on|off|group:[1-9]\d{0,5}", self.sync_bn):
            raise RecipeError(f"--sync-bn {printable(self.sync_bn)}: expected auto, on, off or group:N, N up to 999999")


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Execution of the model. 'pipeline tune' measures which of these values are fastest on a machine."""

    memory_format: Annotated[MemoryFormat | None, default("channels-last without ZeRO, else contiguous")] = None
    """Memory format of the weights. ZeRO supports only contiguous weights. Images and activations are channels-last in
    either case."""
    kernels: Annotated[Literal["auto", "off", "unchecked"] | None, default("$FAT_KERNELS, else auto")] = None
    """Triton kernels for the model (docs/kernels.md). auto = compare each kernel family with PyTorch at every start,
    and fall back to PyTorch for families that differ; unchecked = skip this self-check; off = use PyTorch only."""
    compile: Annotated[
        Literal["off", "cudagraphs", "default", "reduce-overhead", "max-autotune"] | None,
        default("cudagraphs on GPUs if capture is possible, else off"),
    ] = None
    """Execution mode. off = eager; cudagraphs = forward and backward captured as CUDA graphs, without torch.compile;
    default, reduce-overhead, max-autotune = modes of torch.compile, the last two with CUDA graphs of their own
    (docs/performance.md). torch.compile takes minutes at the start of a run."""
    optimizer_impl: Annotated[OptimizerImpl | None, default("fused")] = None
    """Implementation of adamw and sgd: fused = one kernel per group of parameters; foreach = one kernel per operation,
    and the host waits for the gradient norm at every step."""
    grad_checkpointing: bool = False
    """Activation checkpointing: store only the input of each block, and compute its activations again in the backward
    pass. Uses less memory and about a third more time. Not possible with CUDA graphs, so --compile is off by
    default."""
