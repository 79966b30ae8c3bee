"""Weights in and out: safetensors with the config inside, and the released layout in a `torch.save` file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fat.config import FATConfig
from fat.layout import from_released, is_released
from fat.model import FAT, Trunk
from fat.pickled import read_state_dict

CONFIG_KEY = "fat_config"  # of the safetensors header
HEAD = "head."
NAMED = 5  # names an error lists before it says how many more


def save_weights(model: Trunk, path: str | Path, *, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes parameters and buffers as safetensors, with the config in the header, so that the file describes itself.

    state: tensors to write in place of the model's own under the same names, for example an average of them. The file
    appears whole or not at all. Needs the safetensors package.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {name: t.detach().cpu().contiguous() for name, t in (state or model.state_dict()).items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, {"format": "pt", CONFIG_KEY: json.dumps(model.config.to_dict())})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(model: Trunk, path: str | Path, *, replace_head: bool = False) -> None:
    """Fills a model from a file, strictly: every tensor of the model is in the file, with its shape, and no other.

    path: .safetensors in our layout or the released one, or a `torch.save` file of either, bare or as
    {"model": ..., ...}; a pickle is read but not executed. replace_head: leave the model's own classifier where the
    file's has another number of classes. A model without classifier (num_classes=0) leaves the file's out, a feature
    extractor the last norm too.
    Raises ValueError naming the file and the tensors that do not fit.
    """
    path = Path(path)
    _, found = read_weights(path)
    if is_released(found):
        found = from_released(found, model.config)
    if isinstance(model, FAT):
        found = _with_head(path, found, model, replace_head)
    else:
        found = {name: t for name, t in found.items() if not name.startswith((HEAD, "norm."))}
    _check_fit(path, found, model.state_dict())
    model.load_state_dict(found)


def load_model(path: str | Path) -> FAT:
    """The model of a file that `save_weights` wrote: its dimensions come from the file. In eval mode."""
    config, _ = read_weights(path)
    if config is None:
        raise ValueError(f"{path}: no config in it; use create_model(NAME, weights={str(path)!r})")
    model = FAT(config)
    load_weights(model, path)
    return model.eval()


def read_weights(path: str | Path) -> tuple[FATConfig | None, dict[str, Tensor]]:
    """(config where the file has one, tensors under the names of the file)."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return None, read_state_dict(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    config = FATConfig(**json.loads(header[CONFIG_KEY])) if CONFIG_KEY in header else None
    return config, tensors


def _with_head(path: Path, found: dict[str, Tensor], model: FAT, replace: bool) -> dict[str, Tensor]:
    """The file's tensors with the classifier that the model is to have."""
    classes = len(found[f"{HEAD}weight"]) if f"{HEAD}weight" in found else 0
    if classes == model.num_classes:
        return found
    if replace or model.num_classes == 0:
        body = {name: t for name, t in found.items() if not name.startswith(HEAD)}
        return body | {f"{HEAD}{name}": t for name, t in model.head.state_dict().items()}
    raise ValueError(
        f"{path}: weights of {classes} classes, and the model has {model.num_classes}: "
        f"ask for num_classes={classes}, or for a fresh head by replace_head=True"
    )


def _check_fit(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    shapes = [
        f"{name} is {list(found[name].shape)}, expected {list(t.shape)}"
        for name, t in expected.items()
        if name in found and found[name].shape != t.shape
    ]
    faults = [
        _some("missing", [name for name in expected if name not in found]),
        _some("unknown", [name for name in found if name not in expected]),
        _some("of another shape", shapes),
    ]
    if any(faults):
        raise ValueError(f"{path}: not this model's weights; {'; '.join(filter(None, faults))}")


def _some(fault: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{fault}: {', '.join(names[:NAMED])}{more}" if names else ""
