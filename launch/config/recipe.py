"""The recipe: everything that decides what a run computes, in one frozen dataclass per concern.

The docstrings of the fields are the command line's help (`launch.config.command_line`). The defaults are the paper's
recipe for every variant. Numbers are the released code's unless a docstring says otherwise.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from launch.config.data import DataConfig
from launch.config.engine import CompileConfig, ParallelConfig
from launch.config.model import ModelConfig
from launch.config.optim import OptimConfig
from launch.config.resilience import PreemptConfig, WatchdogConfig
from launch.config.run import CheckpointConfig, LogConfig, RunConfig
from shards.redact import redacted


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Complete training configuration."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    run: RunConfig = field(default_factory=RunConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    preempt: PreemptConfig = field(default_factory=PreemptConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values without credentials, as `recipe.json` holds them."""
        return typing.cast(dict[str, Any], redacted(dataclasses.asdict(self)))
