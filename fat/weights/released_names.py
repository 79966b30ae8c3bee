"""Convert parameter names between the released implementation and this one. The tensors are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fat.config import FATConfig


def from_released(state: Mapping[str, Tensor], config: FATConfig) -> dict[str, Tensor]:
    """Convert released names to the names of this implementation.

    A name that the released model of this `config` does not have is kept, so that strict loading reports it.
    """
    names = {released: name for name, released in _modules(config)}
    return {_rename(name, names): tensor for name, tensor in state.items()}


def to_released(state: Mapping[str, Tensor], config: FATConfig) -> dict[str, Tensor]:
    """Convert the names of this implementation to released names."""
    released = dict(_modules(config))
    return {_rename(name, released): tensor for name, tensor in state.items()}


def is_released(state: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of the released implementation."""
    return any(name.startswith(("patch_embed.", "layers.")) for name in state)


def _rename(name: str, modules: Mapping[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{modules.get(module, module)}.{leaf}" if module else name


def _modules(config: FATConfig) -> Iterator[tuple[str, str]]:
    """Yield (name, released name) of every module that has parameters or buffers."""
    for i in range(4):
        yield f"stem.convs.{i}.conv", f"patch_embed.conv{i + 1}.conv.0"
        yield f"stem.convs.{i}.bn", f"patch_embed.conv{i + 1}.conv.1"
    yield "stem.proj", "patch_embed.conv5"
    yield "stem.norm", "patch_embed.layernorm"
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            prefix, released_prefix = f"stages.{stage}.blocks.{block}", f"layers.{stage}.blocks.{block}"
            for name, released in _block_modules(config.windows[stage]):
                yield f"{prefix}.{name}", f"{released_prefix}.{released}"
    yield "norm", "norm"
    yield "head", "head"


def _block_modules(window: int) -> Iterator[tuple[str, str]]:
    yield from ((name, name) for name in ("cpe", "norm1", "norm2", "attn.q", "attn.kv", "ffn.fc1", "ffn.fc2"))
    yield "attn.local", "attn.local_mixer"
    yield "attn.proj", "attn.mixer"
    for step in range(window.bit_length() - 1):
        yield f"attn.pool.{2 * step}.conv", f"attn.pool.conv{step}"
        yield f"attn.pool.{2 * step}.bn", f"attn.pool.bn{step}"
        yield f"attn.pool.{2 * step + 1}", f"attn.pool.linear{step}"
    yield "shortcut.0.conv", "downsample.0"
    yield "shortcut.0.bn", "downsample.1"
    yield "shortcut.1", "downsample.2"
    yield "ffn.dw.conv", "ffn.dwconv"
    yield "ffn.dw.bn", "ffn.bn"
