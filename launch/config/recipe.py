"""The recipe: everything that decides what a run computes, in one frozen dataclass per concern.

The docstrings of the fields are the command line's help (`launch.config.command_line`); `b0()` .. `b3()` are the
paper's recipes. Numbers are the released code's unless a docstring says otherwise.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
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


def b0() -> Recipe:
    """FAT-B0: 4.5 M parameters, 77.6 % top-1."""
    return Recipe(model=ModelConfig(variant="b0"))


def b1() -> Recipe:
    """FAT-B1: 7.8 M parameters, 80.1 % top-1."""
    return Recipe(model=ModelConfig(variant="b1"))


def b2() -> Recipe:
    """FAT-B2: 13.5 M parameters, 81.9 % top-1."""
    return Recipe(model=ModelConfig(variant="b2"))


def b3() -> Recipe:
    """FAT-B3: 29.2 M parameters, 83.6 % top-1."""
    return Recipe(model=ModelConfig(variant="b3"))


VARIANTS: dict[str, Callable[[], Recipe]] = {"b0": b0, "b1": b1, "b2": b2, "b3": b3}
