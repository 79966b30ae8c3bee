"""Save weights as safetensors that describe themselves."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fat.model import Trunk
from fat.weights.header import WeightsInfo


def save_weights(
    model: Trunk, path: str | Path, *, state: Mapping[str, Tensor] | None = None, info: WeightsInfo | None = None
) -> None:
    """Write parameters and buffers as safetensors, with the config in the header, so that the file describes itself.

    state: tensors to write in place of the model's own under the same names, for example an average of them. info:
    classes, image size and other facts for the header; its config is the model's. The file appears whole or not at all.
    Needs the safetensors package.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {name: t.detach().cpu().contiguous() for name, t in (state or model.state_dict()).items()}
    header = dataclasses.replace(info or WeightsInfo(), config=model.config).to_header()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        save_file(tensors, temporary, {"format": "pt", **header})
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
