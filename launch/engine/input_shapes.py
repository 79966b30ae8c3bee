"""The shapes of training batches, which may change between steps, and the drop-path rates that belong to them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

_DROP_PATH = re.compile(r"(DropPath|StochasticDepth)$")  # class names of FAT, timm, transformers; of torchvision
_RATES = ("drop", "drop_prob", "p")  # attribute of each class that is the rate


@dataclass(frozen=True)
class InputShape:
    """The micro-batches of the training steps on a rank, in a part of the training."""

    rows: int
    """Images per forward pass."""
    size: int
    """Height and width of the images in pixels."""
    accumulation: int
    """Forward passes per optimizer step."""
    drop_path_scale: float = 1.0
    """Factor of the model's drop-path rates."""


class DropPathRates:
    """Scales the drop-path rates of a model by the factor of each batch's shape.

    The rates are Python numbers that a CUDA graph and compiled code contain as constants. Each shape has a single
    factor, and graphs and code of its own, so that no step captures or compiles anything.

    Args:
        shapes: the shapes of all batches. Images of other shapes have the factor 1.
    """

    def __init__(self, model: nn.Module, shapes: Sequence[InputShape]) -> None:
        self._scales = {(shape.rows, shape.size): shape.drop_path_scale for shape in shapes}
        self._scale = 1.0
        self._rates = [
            (module, name, getattr(module, name))
            for module in model.modules()
            if _DROP_PATH.search(type(module).__name__)
            for name in _RATES
            if isinstance(getattr(module, name, None), float)
        ]

    @property
    def note(self) -> str:
        """Message for the log if the rates cannot be scaled; empty if they can, or if all factors are 1."""
        if self._rates or set(self._scales.values()) <= {1.0}:
            return ""
        return "note: the model has no drop-path layers, so only augmentation is weaker at small image sizes"

    def scale_for(self, rows: int, size: int) -> None:
        """Set the rates of the steps with batches of this shape."""
        scale = self._scales.get((rows, size), 1.0)
        if scale != self._scale:
            for module, name, rate in self._rates:
                setattr(module, name, rate * scale)
            self._scale = scale
