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
"""Smallest and largest value of each dimension. They are far larger than those of the variants, and small enough that
`fat.load_model` computes all shapes of the network in seconds before it allocates memory."""


@dataclass(frozen=True, kw_only=True)
class FATConfig:
    """All dimensions of a FAT model. Per-stage fields have one entry for each of the four stages."""

    widths: tuple[int, ...]
    """Channels of each stage. The stem's first convolution has half as many as the first stage."""
    depths: tuple[int, ...]
    """Blocks of each stage; the last block of stages 1 to 3 halves the resolution."""
    heads: tuple[int, ...]
    """Attention heads of each stage; a divisor of its width."""
    kernels: tuple[int, ...] = (3, 5, 7, 9)
    """Size of the depthwise kernels of the positional encoding and of FASA's local branch; odd."""
    windows: tuple[int, ...] = (8, 4, 2, 1)
    """Downsampling factor, per side, of the feature map from which keys and values are computed; powers of two."""
    ffn_ratio: int = 4
    """Hidden channels of the feed-forward network, as a multiple of the stage's width."""
    ffn_kernel: int = 5
    """Size of the feed-forward network's depthwise kernel; odd."""
    drop_path: float = 0.0
    """Drop path probability of the last block, in [0, 1). It rises linearly from 0 at the first block."""
    num_classes: int = 1000
    """Outputs of the classifier; 0: no classifier."""
    in_chans: int = 3
    """Channels of the input image."""

    def __post_init__(self) -> None:
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if name in _PER_STAGE:
                if not isinstance(value, tuple | list) or len(value) != STAGES:
                    raise ValueError(
                        f"{name}: expected {STAGES} positive integers (one per stage), got {_shortened(value)}"
                    )
                checked: Any = tuple(_integer(name, entry, least, most) for entry in value)  # JSON has no tuples
            else:
                checked = _integer(name, value, least, most)
            object.__setattr__(self, name, checked)
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"heads: a width of {width} is not divisible by {heads} heads")
        if self.widths[0] % 2:
            raise ValueError(
                f"widths: expected an even first width (the stem starts with half of it), got {self.widths[0]}"
            )
        for kernel in (*self.kernels, self.ffn_kernel):
            if kernel % 2 == 0:
                raise ValueError(f"kernels: expected odd sizes, got {kernel}")
        for window in self.windows:
            if window & (window - 1):
                raise ValueError(f"windows: expected powers of two, got {window}")
        drop_path = self.drop_path
        if not isinstance(drop_path, Real) or isinstance(drop_path, bool) or not 0 <= drop_path < 1:
            raise ValueError(f"drop_path: expected a probability in [0, 1), got {_shortened(drop_path)}")

    @classmethod
    def from_dict(cls, values: object) -> FATConfig:
        """Build a config from the result of `to_dict`. Every field is checked, since it may come from any file.

        Raises ValueError that names the field.
        """
        if not isinstance(values, dict):
            raise ValueError(f"expected a mapping of fields, got {_shortened(values)}")
        known = {field.name: field for field in fields(cls)}
        unknown = [name for name in values if name not in known]
        missing = [name for name, field in known.items() if field.default is MISSING and name not in values]
        if unknown or missing:
            fault, names = ("unknown", unknown) if unknown else ("missing", missing)
            raise ValueError(f"{fault} field {_shortened(names[0])}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-serializable values, which `FATConfig.from_dict` accepts."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


_PER_STAGE = frozenset({"widths", "depths", "heads", "kernels", "windows"})


def _integer(name: str, value: object, least: int, most: int) -> int:
    # Integral includes NumPy's integers, but also bool.
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        raise ValueError(f"{name}: expected integers from {least} to {most:,}, got {_shortened(value)}")
    return int(value)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# Numbers of parameters and multiply-accumulates (MACs, including attention products) at 224x224 are printed by
# `python -m fat.account.table`.
VARIANTS: Mapping[str, FATConfig] = {
    "fat_b0": FATConfig(  # 4.49 M parameters, 0.754 GMACs
        widths=(32, 80, 160, 256), depths=(2, 2, 6, 2), heads=(2, 5, 10, 16), drop_path=0.05
    ),
    "fat_b1": FATConfig(  # 7.82 M parameters, 1.243 GMACs
        widths=(48, 96, 192, 384), depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), drop_path=0.10
    ),
    "fat_b2": FATConfig(  # 13.47 M parameters, 2.131 GMACs
        widths=(64, 128, 256, 512), depths=(2, 2, 6, 2), heads=(2, 4, 8, 16), drop_path=0.10
    ),
    "fat_b3": FATConfig(  # 29.20 M parameters, 4.632 GMACs
        widths=(64, 128, 256, 512), depths=(4, 4, 16, 4), heads=(2, 4, 8, 16), drop_path=0.15
    ),
}
