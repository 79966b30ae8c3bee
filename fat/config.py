"""The dimensions of a FAT, and the four variants of the paper (arXiv 2306.00396, table 1 and released code)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

STAGES = 4


@dataclass(frozen=True, kw_only=True)
class FATConfig:
    """Every dimension of one network of the family. Per-stage fields hold one entry for each of the four stages."""

    widths: tuple[int, ...]
    """Channels of each stage; the stem's first convolution has half of the first."""
    depths: tuple[int, ...]
    """Blocks of each stage; the last block of stages 1 to 3 halves the resolution."""
    heads: tuple[int, ...]
    """Attention heads of each stage; they divide its width."""
    kernels: tuple[int, ...] = (3, 5, 7, 9)
    """Side of the depthwise kernels of positional encoding and local branch; odd."""
    windows: tuple[int, ...] = (8, 4, 2, 1)
    """How much smaller, per side, the map is from which keys and values are taken; powers of two."""
    ffn_ratio: int = 4
    """Hidden channels of the feed-forward network per channel."""
    ffn_kernel: int = 5
    """Side of the feed-forward network's depthwise kernel; odd."""
    drop_path: float = 0.0
    """Drop probability of the last block's branches; rises linearly from 0 at the first. In [0, 1)."""
    num_classes: int = 1000
    """Outputs of the classifier; 0 leaves it out."""
    in_chans: int = 3
    """Channels of the input image."""

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "heads", "kernels", "windows"):
            values = tuple(getattr(self, name))  # JSON gives lists
            object.__setattr__(self, name, values)
            if len(values) != STAGES or min(values) < 1:
                raise ValueError(f"{name}: {STAGES} positive integers expected, one per stage, not {values}")
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"heads: {heads} heads do not divide a width of {width}")
        if self.widths[0] % 2:
            raise ValueError(f"widths: the first must be even (the stem starts at its half), not {self.widths[0]}")
        for kernel in (*self.kernels, self.ffn_kernel):
            if kernel % 2 == 0:
                raise ValueError(f"kernels: odd sides expected, not {kernel}")
        for window in self.windows:
            if window & (window - 1):
                raise ValueError(f"windows: powers of two expected, not {window}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: a probability in [0, 1) expected, not {self.drop_path}")
        for name, least in (("num_classes", 0), ("in_chans", 1), ("ffn_ratio", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: at least {least} expected, not {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them; `FATConfig(**d)` is the way back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


# Parameters and multiply-accumulates at 224x224 (attention products included) beside each; `python -m fat.table`.
VARIANTS: Mapping[str, FATConfig] = {
    "fat_b0": FATConfig(  # 4.49 M, 0.754 G
        widths=(32, 80, 160, 256), depths=(2, 2, 6, 2), heads=(2, 5, 10, 16), drop_path=0.05
    ),
    "fat_b1": FATConfig(  # 7.82 M, 1.243 G
        widths=(48, 96, 192, 384), depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), drop_path=0.10
    ),
    "fat_b2": FATConfig(  # 13.47 M, 2.131 G
        widths=(64, 128, 256, 512), depths=(2, 2, 6, 2), heads=(2, 4, 8, 16), drop_path=0.10
    ),
    "fat_b3": FATConfig(  # 29.20 M, 4.632 G
        widths=(64, 128, 256, 512), depths=(4, 4, 16, 4), heads=(2, 4, 8, 16), drop_path=0.15
    ),
}
