"""Options of the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from launch.config.errors import RecipeError
from launch.models.specification import DEFAULT, ModelSpec, Variant
from shards.option_help import default
from shards.ranges import Decay, check_ranges


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model, initial weights and number of classes."""

    variant: Annotated[Variant | None, default("b0")] = None
    """FAT variant. Parameters of b0, b1, b2, b3: 4.5, 7.8, 13.5, 29.2 million; ImageNet top-1 accuracy in the paper:
    77.6, 80.1, 81.9, 83.6 %."""
    model: Annotated[str | None, default("FAT, see --variant")] = None
    """Another model (docs/other-models.md): timm/NAME, such as timm/resnet50, for a model of timm with random weights;
    or package.module:function, for a function that is called with num_classes and returns a torch.nn.Module from
    images to logits. fat_b3 is the same as --variant b3."""
    drop_path: Annotated[Decay | None, default("the paper's value for the variant; other models: their own")] = None
    """Drop-path rate (stochastic depth) of the last block. It rises linearly from 0 at the first block. Other models
    get it as drop_path_rate."""
    weights: Annotated[Path | None, default("random initialization")] = None
    """Weights to start from, for fine-tuning: a run folder (its best weights), a weights file, or a checkpoint written
    by torch.save, such as those of the released FAT code. The classifier is kept if its classes are those of the data
    set."""
    classes: Annotated[Annotated[int, Interval(ge=1, le=1_000_000)] | None, default("those of the data set")] = None
    """Number of outputs of the classifier, at least the number of classes of the data set. With --weights that have
    another number, the classifier is initialized anew."""
    freeze_bn: bool = False
    """Normalize with BatchNorm's running statistics and do not update them. Use it for fine-tuning with small
    batches."""
    recalibrate_bn: Annotated[int, Interval(ge=0, le=1_000_000)] = 0
    """At the end of the last epoch, replace BatchNorm's running statistics, of the weights and of their EMA, by
    averages over this many global batches of training images, without drop path; 0 = off. Useful if the image size has
    changed shortly before. Not with --freeze-bn or --freeze-backbone, which keep the statistics."""
    freeze_backbone: bool = False
    """Train only the classifier (linear probe). The other layers compute as in evaluation, with BatchNorm's running
    statistics, and no gradients are computed for them. Use it with --weights. It cannot change when a run is
    resumed."""

    def __post_init__(self) -> None:
        check_ranges(self)
        spec = self.spec
        if self.variant is not None and spec != ModelSpec.of_variant(self.variant):
            raise RecipeError(f"--variant {self.variant} and --model {spec} are different models; use one of both")
        if self.recalibrate_bn and self.frozen_norms:
            option = "--freeze-bn" if self.freeze_bn else "--freeze-backbone"
            raise RecipeError(
                f"--recalibrate-bn {self.recalibrate_bn}: {option} keeps BatchNorm's statistics; omit one of both"
            )

    @property
    def spec(self) -> ModelSpec:
        """The model that these options name.

        Raises:
            UserError: `model` is not the name of a model.
        """
        if self.model is not None:
            return ModelSpec.parse(self.model)
        return DEFAULT if self.variant is None else ModelSpec.of_variant(self.variant)

    @property
    def frozen_norms(self) -> bool:
        """Whether BatchNorm uses its running statistics in training."""
        return self.freeze_bn or self.freeze_backbone
