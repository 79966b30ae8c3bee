"""Read a checkpoint's state.safetensors with one copy in memory.

`safetensors.torch.load` would hold the file's bytes and a copy of every tensor at the same time.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from launch.run.files import open_regular
from shards.schema import Count, parse_json

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_METADATA = "__metadata__"
_LENGTH = 8  # bytes of the header's length
_MAX_HEADER = 16 << 20


@dataclass(frozen=True)
class _Entry:
    """Description of a tensor in the header."""

    dtype: str
    shape: Annotated[list[Count], Field(max_length=8)]
    data_offsets: tuple[Count, Count]
    """First byte, and the byte after the last one, counted from the end of the header."""


_HEADER: TypeAdapter[dict[str, _Entry | dict[str, str]]] = TypeAdapter(dict[str, _Entry | dict[str, str]])


def read_bytes(path: Path, size: int) -> bytearray:
    """Read a regular file of `size` bytes; return nothing if it has another size.

    Raises:
        OSError: the file is missing, not a regular file, or cannot be read.
    """
    with open(open_regular(path), "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != size:
            return bytearray()
        content = bytearray(size)
        done = 0
        with memoryview(content) as view:
            while done < size and (count := file.readinto(view[done:])):
                done += count
    return content


def tensors_of(content: bytearray) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file as views of its content.

    Args:
        content: the complete file; it must not be resized while the tensors are used.

    Raises:
        ValueError: the content is not a valid safetensors file.
    """
    length = int.from_bytes(content[:_LENGTH], "little")
    start = _LENGTH + length
    if not 0 < length <= min(_MAX_HEADER, len(content) - _LENGTH):
        raise ValueError(f"header of {length:,} bytes")
    entries = parse_json(bytes(content[_LENGTH:start]), _HEADER, limit=_MAX_HEADER)
    return {name: _view(name, entry, content, start) for name, entry in entries.items() if name != _METADATA}


def _view(name: str, entry: _Entry | dict[str, str], content: bytearray, start: int) -> Tensor:
    dtype = _DTYPES.get(entry.dtype) if isinstance(entry, _Entry) else None
    if not isinstance(entry, _Entry) or dtype is None:
        raise ValueError(f"{name}: not a tensor of a known dtype")
    begin, end = (start + offset for offset in entry.data_offsets)
    count = math.prod(entry.shape)
    if not begin <= end <= len(content) or end - begin != count * dtype.itemsize or begin % dtype.itemsize:
        raise ValueError(f"{name}: its bytes do not match its shape")
    if not count:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=begin).reshape(entry.shape)
