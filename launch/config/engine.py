"""How the model is distributed and executed: what changes its speed, and last bits of its results."""

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
    """DeepSpeed ZeRO stage; 0 = plain data parallel. auto = 1 on several GPUs, 0 on one GPU and on CPUs."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 = autocast with fp32 parameters and statistics. auto = bf16 on GPUs, fp32 on CPUs."""
    sync_bn: str = "auto"
    """BatchNorm over ranks: auto (synchronized on several GPUs), on, off, or group:N (within N neighbouring ranks)."""
    numa_binding: bool = True
    """Bind each rank to the cores (and so to the memory) near its GPU, where there are several NUMA nodes."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|on|off|group:[1-9]\d{0,5}", self.sync_bn):
            raise RecipeError(f"--sync-bn {printable(self.sync_bn)}: auto, on, off or group:N (up to 999999) expected")


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """How the model is executed. 'pipeline tune' measures which of these values are fastest."""

    memory_format: Annotated[MemoryFormat | None, default("channels-last without ZeRO, else contiguous")] = None
    """Memory format of the weights; with ZeRO only contiguous is possible. Images and activations are channels-last
    either way."""
    kernels: Annotated[Literal["auto", "off", "unchecked"] | None, default("$FAT_KERNELS, else auto")] = None
    """FAT's own kernels, where there are any (docs/kernels.md). auto = compared with torch at every start, and switched
    off where they do not agree; unchecked = without that."""
    compile: Annotated[
        Literal["off", "cudagraphs", "default", "reduce-overhead", "max-autotune"] | None,
        default("cudagraphs on GPUs where they can be captured, else off"),
    ] = None
    """off = eager; cudagraphs = forward and backward captured as CUDA graphs, without torch.compile; the others are
    modes of torch.compile, of which reduce-overhead and max-autotune use CUDA graphs of their own
    (docs/performance.md)."""
    optimizer_impl: Annotated[OptimizerImpl | None, default("fused")] = None
    """fused = one kernel per group of parameters; foreach = several."""
