"""The parts of a model that fine-tuning treats differently: its layers in order of depth, its classifier, its backbone.

The functions know no model class. They use timm's methods `group_matcher` and `get_classifier` if a model has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from torch import nn

from launch.config.errors import RecipeError
from launch.models.classifier import find_classifier

_JOINS_PREVIOUS = 99999
"""Last number of a key in timm's `group_matcher` that belongs to the previous layer (`MATCH_PREV_GROUP`)."""


def layers_of(model: nn.Module) -> dict[str, int]:
    """Return the layer of every parameter, from 0 for the stem to the highest number for the head, by name.

    Raises:
        RecipeError: the order of the model's layers is unknown.
    """
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is None:
        raise RecipeError(
            f"--layer-decay: the order of the layers of {type(model).__name__} is unknown; use --layer-decay 1, or a "
            "model with timm's method group_matcher"
        )
    return number_layers([name for name, _ in model.named_parameters()], matcher(coarse=False))


def number_layers(names: Iterable[str], matcher: Any) -> dict[str, int]:
    """Return the layer of each name, as timm's `group_with_matcher` does.

    Args:
        matcher: result of timm's `group_matcher`: a dictionary of patterns, whose groups are numbers, in order of
            depth; instead of a pattern, a list of (pattern, suffix) is allowed. Names that match no pattern belong to
            the last layer. Or a function from names to keys.
    """
    key_of: Callable[[str], Any] = _key_function(matcher) if isinstance(matcher, dict) else matcher
    keys = {name: _as_tuple(key_of(name)) for name in names}
    numbers: dict[tuple[float, ...], int] = {}
    for key in sorted(set(keys.values())):
        joins = bool(numbers) and key[-1] == _JOINS_PREVIOUS
        numbers[key] = len(set(numbers.values())) - joins
    return {name: numbers[key] for name, key in keys.items()}


def _key_function(patterns: dict[str, Any]) -> Callable[[str], tuple[float, ...]]:
    compiled: list[tuple[re.Pattern[str], int, Iterable[int]]] = []
    for number, entry in enumerate(patterns.values()):
        for pattern, suffix in [(entry, None)] if isinstance(entry, str) else entry or ():
            compiled.append((re.compile(pattern), number, suffix or ()))

    def key(name: str) -> tuple[float, ...]:
        for pattern, number, suffix in compiled:
            if found := pattern.match(name):
                groups = [group for group in found.groups() if group is not None]
                return tuple(map(float, chain([number], groups, suffix)))
        return (math.inf,)

    return key


def _as_tuple(key: Any) -> tuple[float, ...]:
    return tuple(map(float, key)) if isinstance(key, Iterable) else (float(key),)


def classifier_of(model: nn.Module) -> nn.Module:
    """Return the module that maps features to logits.

    Raises:
        RecipeError: it is unknown, or has no parameters.
    """
    found = find_classifier(model)
    if found is None:
        raise RecipeError(
            f"--freeze-backbone, --head-lr-scale: {type(model).__name__} has no classifier that can be trained alone; "
            "omit these options, or use a model with timm's method get_classifier"
        )
    return found[1]


def freeze_backbone(model: nn.Module) -> None:
    """Exclude all parameters but those of the classifier from training, for a linear probe."""
    model.requires_grad_(False)
    classifier_of(model).requires_grad_(True)


def backbone_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest modules that neither contain the classifier nor belong to it."""
    yield from _outside(model, classifier_of(model))


def _outside(module: nn.Module, classifier: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if child is classifier:
            continue
        if any(inner is classifier for inner in child.modules()):
            yield from _outside(child, classifier)
        else:
            yield child


def set_grad_checkpointing(model: nn.Module, enable: bool = True) -> None:
    """Enable or disable activation checkpointing.

    Raises:
        RecipeError: the model does not support it.
    """
    switch: Any = getattr(model, "set_grad_checkpointing", None)
    supported = callable(switch)
    try:
        if supported:
            switch(enable)
    except AssertionError:  # some models of timm have the method, but no checkpointing
        supported = False
    if not supported:
        raise RecipeError(
            f"--grad-checkpointing: {type(model).__name__} does not support it; omit the option, or use a model with "
            "timm's method set_grad_checkpointing"
        )
