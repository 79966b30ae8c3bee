"""The dimensions of a FAT, and the four variants of the paper (arXiv 2306.00396, table 1 and released code)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any

STAGES = 4
LIMITS = {
    "widths": (1, 16_384),
    "depths": (1, 64),
    "heads": (1, 1_024),
    "kernels": (1, 63),
    "windows": (1, 64),
    "ffn_ratio": (1, 64),
    "ffn_kernel": (1, 63),
    "num_classes": (0, 10_000_000),
    "in_chans": (1, 4_096),
}
"""Smallest and largest value of each dimension: far beyond the variants, and small enough that the shapes of the whole
network can be computed in seconds (`fat.load_model` does so before it takes memory)."""


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
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if name in _PER_STAGE:
                if not isinstance(value, tuple | list) or len(value) != STAGES:
                    raise ValueError(f"{name}: {STAGES} positive integers expected, one per stage, not {_shown(value)}")
                checked: Any = tuple(_integer(name, entry, least, most) for entry in value)  # JSON gives lists
            else:
                checked = _integer(name, value, least, most)
            object.__setattr__(self, name, checked)
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
        drop_path = self.drop_path
        if not isinstance(drop_path, Real) or isinstance(drop_path, bool) or not 0 <= drop_path < 1:
            raise ValueError(f"drop_path: a probability in [0, 1) expected, not {_shown(drop_path)}")

    @classmethod
    def from_dict(cls, values: object) -> FATConfig:
        """Build a config from what `to_dict` gave, read from outside: every field is checked.

        Raises ValueError naming the field.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a mapping of fields expected, not {_shown(values)}")
        known = {field.name: field for field in fields(cls)}
        unknown = [name for name in values if name not in known]
        missing = [name for name, field in known.items() if field.default is MISSING and name not in values]
        if unknown or missing:
            fault, names = ("unknown", unknown) if unknown else ("missing", missing)
            raise ValueError(f"{fault} field {_shown(names[0])}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them; `FATConfig.from_dict` is the way back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


_PER_STAGE = frozenset({"widths", "depths", "heads", "kernels", "windows"})


def _integer(name: str, value: object, least: int, most: int) -> int:
    # Not `int` alone: NumPy's integers are as good. A bool is an integer to Python.
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        raise ValueError(f"{name}: integers from {least} to {most:,} expected, not {_shown(value)}")
    return int(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# Parameters and multiply-accumulates at 224x224 (attention products included) beside each; `python -m
# fat.account.table`.
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
