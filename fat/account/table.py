"""Print a table of the variants' dimensions and cost, counted from the models: `python -m fat.account.table [SIZE]`."""

from __future__ import annotations

import signal

import torch

from fat.account.arguments import number, parser
from fat.account.cost import count
from fat.config import VARIANTS
from fat.model import FAT, MIN_SIZE

PAPER_TOP1 = {"fat_b0": 77.6, "fat_b1": 80.1, "fat_b2": 81.9, "fat_b3": 83.6}  # percent on ImageNet-1K at 224 pixels
COLUMNS = (
    ("model", 7),
    ("widths", 15),
    ("depths", 9),
    ("heads", 10),
    ("kernels", 8),
    ("windows", 8),
    ("drop path", 9),
    ("parameters", 10),
    ("GMAC", 6),
    ("conv GMAC", 9),
    ("activation MB", 13),
    ("top-1", 5),
)


def table(size: int = 224) -> str:
    """Return one line per variant, for one image of `size` x `size` pixels.

    GMAC: 10^9 multiply-accumulates, with (GMAC) and without (conv GMAC) the attention products. activation MB: 10^6
    bytes that training in fp32 stores for the backward pass. top-1: from the paper.
    """
    lines = [_line([title for title, _ in COLUMNS]), _line(["-" * width for _, width in COLUMNS])]
    for name, config in VARIANTS.items():
        with torch.device("meta"):
            cost = count(FAT(config), size)
        lines.append(
            _line(
                [
                    name,
                    *(" ".join(map(str, getattr(config, field))) for field, _ in COLUMNS[1:6]),
                    f"{config.drop_path:.2f}",
                    f"{cost.parameters:,}",
                    f"{cost.macs / 1e9:.3f}",
                    f"{cost.conv_macs / 1e9:.3f}",
                    f"{cost.activation_bytes / 1e6:.1f}",
                    f"{PAPER_TOP1[name]}",
                ]
            )
        )
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)).rstrip()


def main() -> None:
    arguments = parser("fat.account.table", __doc__)
    size = number(int, MIN_SIZE, 8192)
    arguments.add_argument("size", metavar="SIZE", nargs="?", type=size, default=224, help="image size in pixels")
    print(table(arguments.parse_args().size))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly if the reader of the output has exited
    main()
