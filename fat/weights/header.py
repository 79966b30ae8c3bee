"""Metadata in a weights file's header: the model's dimensions, its classes and facts about its training."""

from __future__ import annotations

import json
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
_MAX_JSON = 64 * 2**10  # maximum characters of the config, and of `fat_training`

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """Metadata of a weights file. A field is None if the file does not contain it."""

    config: FATConfig | None = None
    classes: ClassList | None = None
    """Classes of the outputs; for a long list, only its length and digest."""
    size: int | None = None
    """Side of the square images that training was evaluated on, 32 to 8192 pixels."""
    crop_pct: float | None = None
    """Fraction of the short side that the centre crop kept in these evaluations, in (0, 1]."""
    step: int | None = None
    """Number of optimizer steps for which the model was trained."""

    def to_header(self) -> dict[str, str]:
        """Return the metadata for a safetensors file: a few hundred bytes, and `MAX_TEXT` bytes of classes at most."""
        header = {}
        if self.config is not None:
            header[CONFIG_KEY] = json.dumps(self.config.to_dict())
        if self.classes is not None:
            header[CLASSES_KEY] = self.classes.dumps(MAX_TEXT)
        facts = {"size": self.size, "crop_pct": self.crop_pct, "step": self.step}
        facts = {name: value for name, value in facts.items() if value is not None}
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
    if not isinstance(facts, dict) or not facts.keys() <= {"size", "crop_pct", "step"}:
        raise ValueError("expected a mapping of size, crop_pct and step")
    for name, least, most in (("size", MIN_SIZE, MAX_SIZE), ("step", 0, _MAX_STEP)):
        value = facts.get(name)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise ValueError(f"{name}: expected an integer from {least} to {most:,}")
    crop = facts.get("crop_pct")
    if crop is not None and (type(crop) not in (int, float) or not 0 < crop <= 1):
        raise ValueError("crop_pct: expected a number in (0, 1]")
    return facts
