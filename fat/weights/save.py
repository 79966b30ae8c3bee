"""Save weights as a safetensors file whose header describes the model."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fat.model import Trunk
from fat.weights.header import WeightsInfo


def save_weights(
    model: nn.Module, path: str | Path, *, state: Mapping[str, Tensor] | None = None, info: WeightsInfo | None = None
) -> None:
    """Write parameters and buffers to a safetensors file, with a FAT's config in its header.

    The file is written atomically. Requires the safetensors package.

    Args:
        model: the model whose parameters and buffers are saved.
        path: file to write; an existing file is replaced.
        state: tensors to write instead of the model's own, under the same names, such as their moving average.
        info: classes, image size and other facts for the header. The config of a FAT is that of `model`.
    """
    config = model.config if isinstance(model, Trunk) else None
    write_weights(path, state or model.state_dict(), dataclasses.replace(info or WeightsInfo(), config=config))


def write_weights(
    path: str | Path, tensors: Mapping[str, Tensor], info: WeightsInfo, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, atomically. The file gets the permissions that the umask allows.

    metadata: further entries for the header.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        save_file(tensors, temporary, {**(metadata or {}), "format": "pt", **info.to_header()})
        temporary.chmod(mode)  # safetensors creates files with mode 0600 and ignores the umask
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename must survive a power failure
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)
