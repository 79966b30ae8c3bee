"""Weights in and out: safetensors with the config inside, and the released layout in a `torch.save` file."""

from __future__ import annotations

import json
import os
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fat.config import FATConfig
from fat.layout import from_released, is_released
from fat.model import FAT, Trunk
from fat.pickled import printable, read_state_dict

CONFIG_KEY = "fat_config"  # of the safetensors header
MAX_HEADER = (
    16 * 2**20
)  # bytes of a safetensors header; that of fat_b3 has 0.1 MB, and parsing takes ten times its size
HEAD = "head."
NAME_SHOWN = 120  # characters of each
NAMED = 5  # names an error lists before it says how many more


def save_weights(model: Trunk, path: str | Path, *, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes parameters and buffers as safetensors, with the config in the header, so that the file describes itself.

    state: tensors to write in place of the model's own under the same names, for example an average of them. The file
    appears whole or not at all. Needs the safetensors package.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {name: t.detach().cpu().contiguous() for name, t in (state or model.state_dict()).items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        save_file(tensors, temporary, {"format": "pt", CONFIG_KEY: json.dumps(model.config.to_dict())})
        temporary.chmod(mode)  # safetensors creates files with mode 0600, whatever the umask is
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename too must survive a power cut
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(model: Trunk, path: str | Path, *, replace_head: bool = False) -> None:
    """Fills a model from a file, strictly: every tensor of the model is in the file, with its shape, and no other.

    path: .safetensors in our layout or the released one, or a `torch.save` file of either, bare or as
    {"model": ..., ...}; a pickle is read but not executed. replace_head: leave the model's own classifier where the
    file's has another number of classes. A model without classifier (num_classes=0) leaves the file's out, a feature
    extractor the last norm too. Floating-point tensors of another precision are converted; a warning says where float64
    loses digits.
    Raises ValueError naming the file and the tensors that do not fit, whose type cannot be converted, or whose values
    are not finite.
    """
    path = Path(path)
    _, found = read_weights(path)
    _fill(path, found, model, replace_head)


def _fill(path: Path, found: dict[str, Tensor], model: Trunk, replace_head: bool = False) -> None:
    expected = model.state_dict()
    found = _fitting(path, found, model, replace_head)
    rounded = []
    for name, tensor in found.items():
        wanted = expected[name].dtype
        if tensor.dtype == torch.float64 and wanted == torch.float32:
            found[name] = tensor.float()
            if not torch.equal(found[name].double(), tensor):
                rounded.append(name)
        if tensor.is_floating_point() and not torch.isfinite(found[name]).all():
            raise ValueError(
                f"{path}: {printable(name)} has values that are not finite (nan or inf); use an earlier checkpoint"
            )
    if rounded:
        warnings.warn(f"{path}: float64 weights are rounded to float32; {_some('rounded', rounded)}", stacklevel=3)
    model.load_state_dict(found)


def _fitting(path: Path, found: dict[str, Tensor], model: Trunk, replace_head: bool) -> dict[str, Tensor]:
    """The file's tensors under the model's names. Takes no memory for the model, which may be on the meta device.

    Raises ValueError.
    """
    if is_released(found):
        found = from_released(found, model.config)
    if isinstance(model, FAT):
        found = _with_head(path, found, model, replace_head)
    else:
        found = {name: t for name, t in found.items() if not name.startswith((HEAD, "norm."))}
    _check_fit(path, found, model.state_dict())
    return found


def load_model(path: str | Path) -> FAT:
    """The model of a file that `save_weights` wrote: its dimensions come from the file. In eval mode."""
    path = Path(path)
    config, found = read_weights(path)
    if config is None:
        raise ValueError(f"{path}: no config in it; use create_model(NAME, weights={str(path)!r})")
    with torch.device("meta"):  # a config may ask for more memory than its file has tensors for
        _fitting(path, found, FAT(config), replace_head=False)
    model = FAT(config)
    _fill(path, found, model)
    return model.eval()


def read_weights(path: str | Path) -> tuple[FATConfig | None, dict[str, Tensor]]:
    """(config where the file has one, tensors under the names of the file); takes about as much memory as the file.

    Raises ValueError naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return None, read_state_dict(path)
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > min(MAX_HEADER, path.stat().st_size):
        raise ValueError(
            f"{path}: not a readable safetensors file (a header of {header_bytes:,} bytes; "
            f"{min(MAX_HEADER, path.stat().st_size):,} at most)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({printable(str(error))})") from error
    return _config(path, header.get(CONFIG_KEY)), tensors


def _config(path: Path, text: str | None) -> FATConfig | None:
    try:
        return None if text is None else FATConfig.from_dict(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {CONFIG_KEY} in its header describes no model ({printable(str(error))})") from error


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
    types = [
        f"{name} is {found[name].dtype}, expected {t.dtype}"
        for name, t in expected.items()
        if name in found and not _convertible(found[name].dtype, t.dtype)
    ]
    faults = [
        _some("missing", [name for name in expected if name not in found]),
        _some("unknown", [name for name in found if name not in expected]),
        _some("of another shape", shapes),
        _some("of another type", types),
    ]
    if any(faults):
        raise ValueError(f"{path}: not this model's weights; {'; '.join(filter(None, faults))}")


_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def _convertible(found: torch.dtype, expected: torch.dtype) -> bool:
    """Whether values keep their meaning: integers in place of weights have lost their fractions or lack their scale."""
    return found == expected or any(found in kind and expected in kind for kind in (_FLOATS, _INTEGERS))


def _some(fault: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{fault}: {', '.join(printable(name, NAME_SHOWN) for name in names[:NAMED])}{more}" if names else ""
