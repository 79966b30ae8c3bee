"""The input pipeline: from a shard set to augmented batches on the device.

    from pipeline import train_loader

    loader = train_loader("imagenet-shards", batch_size=128, size=224, augment="fat")
    for epoch in range(90):
        for batch in loader:
            loss = F.cross_entropy(model(batch.images), batch.targets)

`train_loader` and `eval_loader` cover the usual case. The classes that they are made of are also public.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.augment.recipe import AugmentRecipe, augment_recipe
    from pipeline.batch import Batch
    from pipeline.batch_shape import BatchShape, PlanError
    from pipeline.decode.job import DecodeError
    from pipeline.loader import EvalLoader, TrainLoader
    from pipeline.loaders.factory import eval_loader, train_loader
    from pipeline.options import DaliOptions, LoaderOptions
    from pipeline.phases.size_schedule import SizeSchedule
    from pipeline.phases.train_phase import TrainPhase, phases_of
    from pipeline.plan import EvalPlan, Position, TrainPlan
    from pipeline.sampling.selection import select
    from pipeline.storage.remote.shard_set import open_set
    from shards.errors import ShardSetError, UserError
    from shards.format.dataset import ShardSet

# Public name -> module that defines it. Importing torch takes more than a second, which `pipeline --help` and the feed
# process do not need, so a name is imported when it is first used.
_DEFINED_IN = {
    "AugmentRecipe": "pipeline.augment.recipe",
    "Batch": "pipeline.batch",
    "BatchShape": "pipeline.batch_shape",
    "DaliOptions": "pipeline.options",
    "DecodeError": "pipeline.decode.job",
    "EvalLoader": "pipeline.loader",
    "EvalPlan": "pipeline.plan",
    "LoaderOptions": "pipeline.options",
    "PlanError": "pipeline.batch_shape",
    "Position": "pipeline.plan",
    "ShardSet": "shards.format.dataset",
    "ShardSetError": "shards.errors",
    "SizeSchedule": "pipeline.phases.size_schedule",
    "TrainLoader": "pipeline.loader",
    "TrainPhase": "pipeline.phases.train_phase",
    "TrainPlan": "pipeline.plan",
    "UserError": "shards.errors",
    "augment_recipe": "pipeline.augment.recipe",
    "eval_loader": "pipeline.loaders.factory",
    "open_set": "pipeline.storage.remote.shard_set",
    "phases_of": "pipeline.phases.train_phase",
    "select": "pipeline.sampling.selection",
    "train_loader": "pipeline.loaders.factory",
}

__all__ = [
    "AugmentRecipe",
    "Batch",
    "BatchShape",
    "DaliOptions",
    "DecodeError",
    "EvalLoader",
    "EvalPlan",
    "LoaderOptions",
    "PlanError",
    "Position",
    "ShardSet",
    "ShardSetError",
    "SizeSchedule",
    "TrainLoader",
    "TrainPhase",
    "TrainPlan",
    "UserError",
    "augment_recipe",
    "eval_loader",
    "open_set",
    "phases_of",
    "select",
    "train_loader",
]


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_DEFINED_IN[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
