"""Metadata in a weights file's header: the model, its classes, its preprocessing and facts about its training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fat.config import FATConfig
from fat.model import MIN_SIZE
from fat.weights.classes import MAX_TEXT, ClassList
from fat.weights.safe_pickle import printable

CONFIG_KEY, CLASSES_KEY, TRAINING_KEY = "fat_config", "fat_classes", "fat_training"
MAX_SIZE = 8192  # maximum image size in pixels per side
_MAX_STEP = 10**15
_MAX_NAME = 300  # maximum characters of a model's name, of a digest and of a version
_MAX_JSON = 64 * 2**10  # maximum characters of the config, and of `fat_training`

T = TypeVar("T")
Channels = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """Metadata of a weights file. A field is None if the file does not contain it."""

    config: FATConfig | None = None
    """Dimensions of a FAT, as trained."""
    classes: ClassList | None = None
    """Classes of the outputs; for a long list, only its length and digest."""
    model: str | None = None
    """Name of the model: "fat_b0", or that of another model, such as "timm/resnet50"."""
    size: int | None = None
    """Side of the square images that training was evaluated on, 32 to 8192 pixels."""
    crop_pct: float | None = None
    """Fraction of the short side that the center crop kept in these evaluations, in (0, 1]."""
    interpolation: str | None = None
    """Filter with which these images were resized; "bicubic" in this project."""
    mean: Channels | None = None
    """Mean of the red, green and blue channel that is subtracted from pixel values in 0 to 1."""
    std: Channels | None = None
    """Standard deviation of each channel, by which the difference is divided; above 0."""
    step: int | None = None
    """Number of optimizer steps for which the model was trained."""
    top1: float | None = None
    """Top-1 accuracy at this step on the validation split, a fraction."""
    ema: bool | None = None
    """Whether the weights are the moving average (EMA) of the trained weights."""
    recipe: str | None = None
    """Digest of the training's recipe: xxh3-64 of RUN/recipe.json's recipe, 16 hex digits."""
    version: str | None = None
    """Version of the program that trained the model, such as "fat-pipeline 0.1.0"."""

    def to_header(self) -> dict[str, str]:
        """Return the metadata for a safetensors file: a few hundred bytes, and `MAX_TEXT` bytes of classes at most."""
        header = {}
        if self.config is not None:
            header[CONFIG_KEY] = json.dumps(self.config.to_dict())
        if self.classes is not None:
            header[CLASSES_KEY] = self.classes.dumps(MAX_TEXT)
        facts = {name: getattr(self, name) for name in _FACTS if getattr(self, name) is not None}
        if facts:
            header[TRAINING_KEY] = json.dumps(facts)
        return header

    @classmethod
    def from_header(cls, path: Path, header: Mapping[str, str]) -> WeightsInfo:
        """Parse the metadata of an untrusted safetensors file.

        Raises ValueError that names the file and the invalid field.
        """

        def read(key: str, parse: Callable[[str], T], limit: int, fault: str) -> T | None:
            if key not in header:
                return None
            try:
                if len(header[key]) > limit:
                    raise ValueError(f"has {len(header[key]):,} characters; at most {limit:,} are allowed")
                return parse(header[key])
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: {key} in its header {fault} ({printable(str(error))})") from error

        config = read(CONFIG_KEY, lambda text: FATConfig.from_dict(json.loads(text)), _MAX_JSON, "is not a config")
        classes = read(CLASSES_KEY, ClassList.loads, MAX_TEXT, "is not a class list")
        facts = read(TRAINING_KEY, _training, _MAX_JSON, "does not describe a training") or {}
        return cls(config=config, classes=classes, **facts)


def _training(text: str) -> dict[str, Any]:
    facts = json.loads(text)
    if not isinstance(facts, dict) or not facts.keys() <= _FACTS.keys():
        raise ValueError(f"expected a mapping of {', '.join(_FACTS)}")
    parsed = {}
    for name, value in facts.items():
        expected, parse = _FACTS[name]
        parsed[name] = None if value is None else parse(value)
        if value is not None and parsed[name] is None:
            raise ValueError(f"{name}: expected {expected}")
    return parsed


def _integer(least: int, most: int) -> tuple[str, Callable[[object], Any]]:
    def parse(value: object) -> int | None:
        return value if isinstance(value, int) and type(value) is int and least <= value <= most else None

    return f"an integer from {least} to {most:,}", parse


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and type(value) is not bool and math.isfinite(value) else None


def _crop(value: object) -> float | None:
    number = _number(value)
    return number if number is not None and 0 < number <= 1 else None


def _fraction(value: object) -> float | None:
    number = _number(value)
    return number if number is not None and 0 <= number <= 1 else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= _MAX_NAME and value.isprintable() else None


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _channels(value: object) -> Channels | None:
    numbers = [_number(entry) for entry in value] if isinstance(value, list) and len(value) == 3 else [None]
    return tuple(numbers) if all(n is not None and abs(n) <= 1e3 for n in numbers) else None  # type: ignore[return-value]


def _scale(value: object) -> Channels | None:
    channels = _channels(value)
    return channels if channels is not None and min(channels) > 0 else None


# Fields in `fat_training`: what is expected, and a function that returns the value, or None if it is invalid.
_FACTS: Mapping[str, tuple[str, Callable[[object], Any]]] = {
    "model": (f"a name of at most {_MAX_NAME} printable characters", _text),
    "size": _integer(MIN_SIZE, MAX_SIZE),
    "crop_pct": ("a number in (0, 1]", _crop),
    "interpolation": (f"a name of at most {_MAX_NAME} printable characters", _text),
    "mean": ("three numbers", _channels),
    "std": ("three numbers above 0", _scale),
    "step": _integer(0, _MAX_STEP),
    "top1": ("a number from 0 to 1", _fraction),
    "ema": ("true or false", _flag),
    "recipe": (f"a digest of at most {_MAX_NAME} characters", _text),
    "version": (f"a text of at most {_MAX_NAME} printable characters", _text),
}
