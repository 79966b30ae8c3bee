"""Complete a torchvision whose compiled operators cannot be loaded, with non-maximum suppression in Python.

    python -m tests.support.torchvision_nms FOLDER

PyPI's torchvision is built for CUDA. With a CPU build of torch its operators cannot be loaded, and importing it
fails. `make` installs it for the tests into a FOLDER of its own, and this program adds a copy of itself there, which
torchvision/extension.py then imports. It changes nothing if torchvision can load its operators.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

CALL = """

if not _has_ops():  # added by this project's `make`, see torchvision_nms.py
    from torchvision_nms import define

    define()

    def _assert_has_ops():
        pass
"""


def define() -> None:
    """Define the operators that torchvision's import expects; only `nms` is implemented."""
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.impl("torchvision::nms", "CPU", nms)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices of the boxes [N, 4] (x1, y1, x2, y2) that overlap no box of a higher score too much."""
    boxes, order = boxes.detach(), scores.argsort(descending=True, stable=True)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    kept = []
    while len(order):
        first, rest = order[0], order[1:]
        kept.append(first)
        sides = torch.minimum(boxes[first, 2:], boxes[rest, 2:]) - torch.maximum(boxes[first, :2], boxes[rest, :2])
        shared = sides.clamp(min=0).prod(dim=1)
        order = rest[shared <= iou_threshold * (areas[first] + areas[rest] - shared)]
    return torch.stack(kept) if kept else order


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    shutil.copy(__file__, folder / "torchvision_nms.py")
    extension = folder / "torchvision" / "extension.py"
    if CALL not in extension.read_text():
        extension.write_text(extension.read_text() + CALL)
