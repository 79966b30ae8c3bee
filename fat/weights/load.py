"""Load weights: safetensors that describe themselves, and checkpoints of the released code and other tools."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fat.config import VARIANTS, FATConfig
from fat.model import FAT, Trunk
from fat.weights.classes import MAX_COUNT, ClassList
from fat.weights.classifier import HEAD, match_classifier
from fat.weights.entries import listed, select
from fat.weights.header import WeightsInfo
from fat.weights.released_names import from_released, is_released
from fat.weights.safe_pickle import open_checkpoint, printable

MAX_HEADER = 16 * 2**20
"""Bytes of a safetensors header: that of fat_b3 has 0.1 MB, and parsing takes ten times its size."""


def load_weights(
    model: Trunk,
    path: str | Path,
    *,
    replace_head: bool = False,
    classes: ClassList | None = None,
    entry: str | None = None,
) -> tuple[str, ...]:
    """Fill a model from a file, strictly: every tensor of the model is in the file, with its shape, and no other.

    path: .safetensors in our layout or the released one, or a `torch.save` file of either, bare or nested. Prefixes of
    wrappers are removed, and of several state dicts one is chosen (`fat.weights.entries.select`); a pickle is read but
    not executed. replace_head: leave the model's own classifier where the file's has another number of classes.
    classes: those of the model's outputs; the file's classifier is then kept only for the same classes, its rows are
    reordered where their order differs, and it is left out where they are others. entry: take this entry of a
    checkpoint that holds several models. A model without classifier (num_classes=0) leaves the file's out, a feature
    extractor the last norm too. Floating-point tensors of another precision are converted; a warning says where float64
    loses digits. Returns what was found and decided, a line each, without the file's name. Raises ValueError naming the
    file and the tensors that do not fit, whose type cannot be converted, or whose values are not finite.
    """
    path = Path(path)
    return _fill(path, read_weights(path, entry), model, replace_head, classes)


def load_model(path: str | Path, *, entry: str | None = None) -> FAT:
    """Make the model of a file, in eval mode: of one that `save_weights` wrote, or of one of the variants' weights.

    Dimensions come from the file's header, else from its tensors. A warning says what was chosen among several models.
    """
    path = Path(path)
    weights = read_weights(path, entry)
    config = weights.info.config or _recognised(weights.tensors)
    if config is None:
        raise ValueError(
            f"{path}: no config in it, and its tensors are not those of {', '.join(VARIANTS)}; use "
            f"create_model(CONFIG, weights={str(path)!r})"
        )
    with torch.device("meta"):  # a config may ask for more memory than its file has tensors for
        _fitting(path, weights, FAT(config))
    model = FAT(config)
    warn(path, _fill(path, weights, model))
    return model.eval()


def warn(path: str | Path, notes: tuple[str, ...]) -> None:
    """Issue what `load_weights` returned as warnings of the code that called the caller."""
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=3)


def read_info(path: str | Path) -> WeightsInfo:
    """Read what a weights file says of its model; a `torch.save` file says nothing. Reads the header alone.

    Raises ValueError naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return WeightsInfo()
    from safetensors import SafetensorError, safe_open

    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return WeightsInfo.from_header(path, file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({printable(str(error))})") from error


@dataclass(frozen=True)
class Weights:
    """Content of a weights file."""

    info: WeightsInfo
    tensors: dict[str, Tensor]
    """Under the file's names, without prefixes of wrappers."""
    notes: tuple[str, ...]
    """What was chosen and left out."""


def read_weights(path: str | Path, entry: str | None = None) -> Weights:
    """Read the tensors of one model; takes about as much memory as the file.

    entry: which one, where a checkpoint holds several.
    Raises ValueError naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        with open_checkpoint(path) as checkpoint:
            chosen = select(path, checkpoint.names, entry)
            return Weights(WeightsInfo(), checkpoint.read(chosen.names), chosen.notes)
    from safetensors import SafetensorError, safe_open

    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            info = WeightsInfo.from_header(path, file.metadata() or {})
            chosen = select(path, {"": list(file.keys())}, entry)
            tensors = {name: file.get_tensor(original) for name, (_, original) in chosen.names.items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({printable(str(error))})") from error
    return Weights(info, tensors, chosen.notes)


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > min(MAX_HEADER, path.stat().st_size):
        raise ValueError(
            f"{path}: not a readable safetensors file (a header of {header_bytes:,} bytes; "
            f"{min(MAX_HEADER, path.stat().st_size):,} at most)"
        )


def _fill(
    path: Path, weights: Weights, model: Trunk, replace_head: bool = False, classes: ClassList | None = None
) -> tuple[str, ...]:
    expected = model.state_dict()
    found, notes = _fitting(path, weights, model, replace_head, classes)
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
    return notes


def _fitting(
    path: Path, weights: Weights, model: Trunk, replace_head: bool = False, classes: ClassList | None = None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the file's tensors under the model's names, and notes. Takes no memory for the model, which may be on the
    meta device.

    Raises ValueError.
    """
    found, notes = weights.tensors, weights.notes
    if is_released(found):
        found = from_released(found, model.config)
    if isinstance(model, FAT):
        try:
            found, note = match_classifier(found, model, replace_head, known=weights.info.classes, wanted=classes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        notes += (note,) if note else ()
    else:
        found = {name: t for name, t in found.items() if not name.startswith((HEAD, "norm."))}
    _check_fit(path, found, model.state_dict())
    return found, notes


def _recognised(tensors: Mapping[str, Tensor]) -> FATConfig | None:
    """Return the variant whose tensors these are, with the number of classes of their classifier."""
    head = tensors.get(f"{HEAD}weight")
    classes = len(head) if head is not None and head.ndim == 2 else 0
    if classes > MAX_COUNT:
        return None
    for config in VARIANTS.values():
        with torch.device("meta"):
            model = FAT(dataclasses.replace(config, num_classes=classes))
        named = from_released(tensors, model.config) if is_released(tensors) else tensors
        expected = model.state_dict()
        if named.keys() == expected.keys() and all(named[name].shape == t.shape for name, t in expected.items()):
            return model.config
    return None


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
    missing = [name for name in expected if name not in found]
    faults = [
        _some("missing", missing),
        _some("unknown", [name for name in found if name not in expected]),
        _some("of another shape", shapes),
        _some("of another type", types),
    ]
    if any(faults):
        headless = missing and all(name.startswith(HEAD) for name in missing)
        hint = (
            "; they have no classifier: ask for num_classes=0, or a fresh head by replace_head=True" if headless else ""
        )
        raise ValueError(f"{path}: not this model's weights; {'; '.join(filter(None, faults))}{hint}")


_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def _convertible(found: torch.dtype, expected: torch.dtype) -> bool:
    """Whether values keep their meaning: integers in place of weights have lost their fractions or lack their scale."""
    return found == expected or any(found in kind and expected in kind for kind in (_FLOATS, _INTEGERS))


def _some(fault: str, names: list[str]) -> str:
    return f"{fault}: {listed(names)}" if names else ""
