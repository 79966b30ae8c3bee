"""The recipe: all training options, as one frozen dataclass per section.

The docstrings of the fields are the help texts of the command line (`launch.config.command_line`). The defaults are the
paper's recipe for every variant; numbers that the paper does not give are those of the released code.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any

import xxhash

from launch.config.data import DataConfig
from launch.config.distillation import DistillationConfig
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
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    run: RunConfig = field(default_factory=RunConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    preempt: PreemptConfig = field(default_factory=PreemptConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as nested dictionaries without credentials, as they are saved in recipe.json."""
        return typing.cast(dict[str, Any], redacted(dataclasses.asdict(self)))

    def digest(self) -> str:
        """Return the xxh3-64 hash of `to_dict` in canonical JSON, 16 hex digits."""
        return xxhash.xxh3_64_hexdigest(json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":")).encode())
