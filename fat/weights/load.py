"""Load weights from safetensors files, and from checkpoints of the released code and other tools."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fat.config import VARIANTS, FATConfig
from fat.features import with_preprocessing
from fat.model import FAT, FATFeatures, Trunk
from fat.weights.classes import MAX_COUNT, ClassList
from fat.weights.classifier import HEAD, match_classifier
from fat.weights.entries import listed, select
from fat.weights.header import WeightsInfo
from fat.weights.released_names import from_released, is_released
from fat.weights.safe_pickle import open_checkpoint, printable
from fat.weights.variant import check_model

MAX_HEADER = 16 * 2**20
"""Maximum bytes of a safetensors header. The header of fat_b3 has 0.1 MB; parsing needs ten times as much memory."""


def load_weights(
    model: Trunk,
    path: str | Path,
    *,
    replace_head: bool = False,
    classes: ClassList | None = None,
    entry: str | None = None,
) -> tuple[str, ...]:
    """Load weights from a file into a model, strictly: the file must have exactly the model's tensors and shapes.

    The names may be those of this implementation or of the released one. Wrappers' prefixes are removed. If the file
    has several state dicts, one is chosen (`fat.weights.entries.select`). Pickles are interpreted, never executed.

    The file's classifier is ignored if the model has none (num_classes=0). A feature extractor also ignores the last
    norm and the layers after its last feature map. Floating-point tensors are converted to the model's precision, with
    a warning if float64 values lose digits.

    Args:
        model: the model to fill.
        path: .safetensors file, or a file written by `torch.save`.
        replace_head: keep the model's own classifier if the file's has another number of classes.
        classes: classes of the model's outputs. The file's classifier is then loaded only if it has the same classes,
            with its rows reordered if their order differs; otherwise the model's own classifier is kept.
        entry: load this entry of a checkpoint that contains several models.

    Returns:
        Messages on what was found and decided, one line each, without the file's name.

    Raises:
        ValueError: tensors are missing, unknown, of another shape or dtype, or not finite; the message names some of
            them, or the model to which they belong, if that is recognized.
    """
    path = Path(path)
    return _fill(path, read_weights(path, entry), model, replace_head, classes)


def load_model(path: str | Path, *, entry: str | None = None) -> FAT:
    """Create the model of a weights file, in eval mode.

    path: a file that `save_weights` wrote, whose header has the model's dimensions, or weights of one of the variants,
    which is recognized by its tensors. If the file contains several models, a warning says which one was loaded.
    """
    path = Path(path)
    weights = read_weights(path, entry)
    config = weights.info.config or _recognized(weights.tensors)
    if config is None:
        raise ValueError(
            f"{path}: contains no config, and its tensors are not those of {', '.join(VARIANTS)}; load it with "
            f"create_model(CONFIG, weights={str(path)!r})"
        )
    with torch.device("meta"):  # no memory is allocated before a file's config is checked
        _fitting(path, weights, FAT(config))
    model = FAT(config)
    warn(path, _fill(path, weights, model))
    return model.eval()


def warn(path: str | Path, notes: tuple[str, ...]) -> None:
    """Issue the messages of `load_weights` as warnings, attributed to the caller of the calling function."""
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=3)


def read_info(path: str | Path) -> WeightsInfo:
    """Read the metadata of a weights file from its header. Files written by `torch.save` have none.

    Raises ValueError that names the file and what is wrong with it.
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
    """Tensors by their names in the file, without wrappers' prefixes."""
    notes: tuple[str, ...]
    """Messages on what was chosen and what was not used."""


def read_weights(path: str | Path, entry: str | None = None) -> Weights:
    """Read the tensors of one model; uses about as much memory as the file has bytes.

    entry: entry to read if a checkpoint contains several models.
    Raises ValueError that names the file and what is wrong with it.
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
            f"{path}: not a readable safetensors file (header of {header_bytes:,} bytes; at most "
            f"{min(MAX_HEADER, path.stat().st_size):,} are accepted)"
        )


def _fill(
    path: Path, weights: Weights, model: Trunk, replace_head: bool = False, classes: ClassList | None = None
) -> tuple[str, ...]:
    found, notes = _fitting(path, weights, model, replace_head, classes)
    model.pretrained_cfg.update(with_preprocessing(model.pretrained_cfg, vars(weights.info)))
    load_tensors(path, found, model)
    return notes


def load_tensors(path: Path, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Load the tensors of a file into any model, strictly, and converted to the model's precision.

    Raises ValueError if tensors are missing, unknown, of another shape or dtype, or not finite.
    """
    expected, found, rounded = model.state_dict(), dict(tensors), []
    _check_fit(path, found, expected)
    for name, tensor in found.items():
        wanted = expected[name].dtype
        if tensor.dtype == torch.float64 and wanted == torch.float32:
            found[name] = tensor.float()
            if not torch.equal(found[name].double(), tensor):
                rounded.append(name)
        if tensor.is_floating_point() and not torch.isfinite(found[name]).all():
            raise ValueError(
                f"{path}: {printable(name)} contains NaN or infinite values; use an earlier checkpoint"
            )
    if rounded:
        warnings.warn(f"{path}: float64 weights are rounded to float32: {listed(rounded)}", stacklevel=4)
    model.load_state_dict(found)


def _fitting(
    path: Path, weights: Weights, model: Trunk, replace_head: bool = False, classes: ClassList | None = None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the file's tensors under the model's names, and messages. The model may be on the meta device.

    Raises ValueError if the tensors do not fit the model.
    """
    found, notes = weights.tensors, weights.notes
    check_model(path, weights.info, found, model.config)
    if is_released(found):
        found = from_released(found, model.config)
    if isinstance(model, FAT):
        try:
            found, note = match_classifier(
                found, model, replace_head, file_classes=weights.info.classes, model_classes=classes
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        notes += (note,) if note else ()
    elif isinstance(model, FATFeatures):
        found = {name: t for name, t in found.items() if not name.startswith(model.unused)}
    _check_fit(path, found, model.state_dict())
    return found, notes


def _recognized(tensors: Mapping[str, Tensor]) -> FATConfig | None:
    """Return the config of the variant that has these tensors, with their number of classes; None if there is none."""
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
        f"{name} has {list(found[name].shape)}, expected {list(t.shape)}"
        for name, t in expected.items()
        if name in found and found[name].shape != t.shape
    ]
    dtypes = [
        f"{name} has {found[name].dtype}, expected {t.dtype}"
        for name, t in expected.items()
        if name in found and not _convertible(found[name].dtype, t.dtype)
    ]
    missing = [name for name in expected if name not in found]
    faults = [
        _fault("missing", missing),
        _fault("unknown", [name for name in found if name not in expected]),
        _fault("wrong shape", shapes),
        _fault("wrong dtype", dtypes),
    ]
    if any(faults):
        headless = missing and all(name.startswith(HEAD) for name in missing)
        hint = (
            "; the file has no classifier: create the model with num_classes=0, or pass replace_head=True"
            if headless
            else ""
        )
        raise ValueError(f"{path}: not this model's weights; {'; '.join(filter(None, faults))}{hint}")


_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def _convertible(found: torch.dtype, expected: torch.dtype) -> bool:
    """Return whether both dtypes are floating-point or both integers. Integers as weights may be quantized values."""
    return found == expected or any(found in kind and expected in kind for kind in (_FLOATS, _INTEGERS))


def _fault(fault: str, names: list[str]) -> str:
    return f"{fault}: {listed(names)}" if names else ""
