"""Options of knowledge distillation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from launch.config.errors import RecipeError
from shards.option_help import default
from shards.ranges import Fraction, check_ranges


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Knowledge distillation from a trained model (docs/distillation.md)."""

    teacher: Annotated[str | None, default("no distillation")] = None
    """Teacher: a run folder (its best weights), a weights file of this project, or a name as in --model, whose weights
    are in --teacher-weights. Its classes must include those of the data set."""
    teacher_weights: Annotated[Path | None, default("those of --teacher")] = None
    """Weights file or run folder of a --teacher that is a name, such as --teacher timm/resnet50 --teacher-weights
    resnet50.pth."""
    distillation: Literal["hard", "soft"] = "hard"
    """hard = cross-entropy with the teacher's prediction (DeiT, arXiv 2012.12877); soft = Kullback-Leibler divergence
    from the teacher's probabilities at a temperature (Hinton et al., arXiv 1503.02531)."""
    distillation_alpha: Fraction = 0.5
    """Weight of the distillation loss; the loss with the labels has the weight 1 - alpha. DeiT uses 0.5 for hard and
    0.1 for soft distillation."""
    distillation_temperature: Annotated[float, Interval(ge=0.1, le=100)] = 3.0
    """Temperature T of soft distillation: both logits are divided by T, and the loss is multiplied by its square."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.teacher_weights is not None and self.teacher is None:
            raise RecipeError(f"--teacher-weights {self.teacher_weights}: requires --teacher NAME, the teacher's model")
