"""The tensors of a `torch.save` file, read without executing its pickle.

A pickle is a program: it may import any name and call it. The released training script saves its settings, a yacs
object, beside the weights, so `torch.load(weights_only=True)` refuses its files, and allowing the class is not enough
(a dict subclass is refused again when filled). Here nothing is imported at all: four harmless names have a meaning of
our own, every other one becomes an inert object that swallows whatever is done to it.
"""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a file written by `torch.save` (torch 1.6 or newer): the saved object itself, or its "model".

    Only the tensors asked for are read. Raises ValueError when the file is not such a file or holds no state dict.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = _root(archive)
            with archive.open(f"{root}/data.pkl") as program:
                saved = _Unpickler(program).load()
            if isinstance(saved, dict) and isinstance(saved.get("model"), dict):
                saved = saved["model"]
            entries = saved.items() if isinstance(saved, dict) else ()
            state = {name: entry.read(archive, root) for name, entry in entries if isinstance(entry, _TensorEntry)}
    except OSError:
        raise
    except Exception as error:  # a pickle can be wrong in every way
        raise ValueError(f"{path}: not a checkpoint that torch.save has written ({error})") from error
    if not state:
        raise ValueError(f'{path}: no weights in it, neither at the top nor under "model"')
    return state


@dataclass(frozen=True)
class _TensorEntry:
    """Where a tensor lies in the archive."""

    key: str
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self, archive: zipfile.ZipFile, root: str) -> Tensor:
        flat = torch.frombuffer(bytearray(archive.read(f"{root}/data/{self.key}")), dtype=self.dtype)
        return flat.as_strided(self.size, self.stride, self.offset).clone()


class _Unpickler(pickle.Unpickler):
    """Knows storages, tensors and dicts. Bound methods stand for functions, so that no pickle can alter them."""

    def __init__(self, program: IO[bytes]) -> None:
        super().__init__(program)
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): _Dict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }
        self._known |= {("torch", name): dtype for name, dtype in DTYPES.items()}

    def find_class(self, module: str, name: str) -> Any:
        return self._known.get((module, name), _Inert)

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        _, dtype, key, *_ = pid  # ("storage", type, key, device, elements)
        return key, dtype

    def _tensor(self, storage: tuple[str, torch.dtype], offset: int, size: Any, stride: Any, *_: Any) -> _TensorEntry:
        return _TensorEntry(*storage, offset, tuple(size), tuple(stride))

    def _parameter(self, data: _TensorEntry, *_: Any) -> _TensorEntry:
        return data


class _Dict(dict[Any, Any]):
    def __setstate__(self, state: object) -> None:
        """A state dict carries its modules' versions as an attribute: of no use here."""


class _Inert:
    """An object of a class that was not imported."""

    def __new__(cls, *_: object, **__: object) -> _Inert:
        return super().__new__(cls)

    def __call__(self, *_: object, **__: object) -> _Inert:
        return self

    def _swallow(self, *_: object) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _swallow


def _root(archive: zipfile.ZipFile) -> str:
    """The folder inside the archive; torch names it after the file that it wrote."""
    roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("no data.pkl in it")
    order = f"{roots[0]}/byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise ValueError("written on a big-endian machine")
    return roots[0]
