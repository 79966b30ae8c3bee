"""Find the classifier of any model: the module that maps features to logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# Names of the classifier in torchvision's models, which have no `get_classifier`.
_NAMES = ("head", "fc", "classifier", "heads")


def find_classifier(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return name and module of the classifier; None if it is unknown, or has no parameters.

    It is the result of timm's method `get_classifier`; without the method, the module that `default_cfg["classifier"]`
    names, or that has a name which is usual in torchvision.
    """
    get: Any = getattr(model, "get_classifier", None)
    modules = dict(model.named_modules())
    if callable(get):
        module = get()
        name = next((name for name, inner in modules.items() if name and inner is module), None)
    else:
        config = getattr(model, "default_cfg", None)
        names = (config.get("classifier") if isinstance(config, dict) else None, *_NAMES)
        name = next((name for name in names if isinstance(name, str) and name in modules), None)
    if name is None or not any(True for _ in modules[name].parameters()):
        return None
    return name, modules[name]


def classifier_name(model: nn.Module) -> str | None:
    """Return the name of the layer that computes the logits, the last one of the classifier; None if it is unknown."""
    found = find_classifier(model)
    if found is None:
        return None
    weights = ((name, getattr(layer, "weight", None)) for name, layer in found[1].named_modules())
    layers = [name for name, weight in weights if isinstance(weight, Tensor) and weight.ndim > 1]
    return ".".join(filter(None, (found[0], layers[-1]))) if layers else None
