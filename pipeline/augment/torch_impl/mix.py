"""Mixup and CutMix: each row is mixed with its partner, the other row of the pair (2i, 2i + 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.augment.params import MixParams
from pipeline.augment.transfer import upload


def mix(images: Tensor, params: MixParams) -> Tensor:
    """Mix a batch: lam * image + (1 - lam) * partner for mixup, or the image with the partner's box for CutMix.

    Args:
        images: floating-point [B, 3, H, W], channels-last, B even.
        params: mixing parameters of the B rows.

    Returns:
        A new tensor of the same shape, dtype and strides.

    Raises:
        ValueError: B is odd, or there are not B parameters.
    """
    batch, channels, height, width = images.shape
    check_pairs(batch, params)
    lam, cut, box = upload([params.lam, params.use_cutmix, params.box], images.device)
    own = torch.where(cut, 1.0, lam).view(-1, 2, 1, 1)
    y, x, high, wide = box.view(-1, 2, 4, 1).unbind(2)
    # Merge width and channels, because broadcasting along three channels is slow.
    pairs = images.permute(0, 2, 3, 1).reshape(-1, 2, height, width * channels)
    line = torch.arange(height, device=images.device)
    column = torch.arange(width * channels, device=images.device)
    vertical = (line >= y) & (line < y + high)
    horizontal = (column >= x * channels) & (column < (x + wide) * channels)
    inside = vertical[..., None] & horizontal[..., None, :]
    mixed = torch.mul(pairs, own, out=torch.empty_like(pairs))
    for side in (0, 1):  # in place, because memory traffic limits the speed
        mine, partner = mixed[:, side], pairs[:, 1 - side]
        mine.addcmul_(partner, 1.0 - own[:, side])
        torch.where(inside[:, side], partner, mine, out=mine)
    return mixed.view(batch, height, width, channels).permute(0, 3, 1, 2)


def check_pairs(batch: int, params: MixParams) -> None:
    """Check that the images of a batch are pairs and have parameters.

    Raises:
        ValueError: the number of images is odd, or there are not as many parameters.
    """
    if batch % 2 or len(params.lam) != batch:
        raise ValueError(
            f"expected an even number of images and as many parameters, got {batch} images and {len(params.lam)} "
            "parameters"
        )


def mix_targets(labels: Tensor, lam: Tensor | None, num_classes: int, smoothing: float) -> Tensor:
    """Return the soft targets of mixed or smoothed rows, float32 [B, num_classes]; each row sums to 1.

    Args:
        labels: int64 [B].
        lam: float32 [B], B even: weight of a row's own label; its partner's label has weight 1 - lam. None: no row is
            mixed.
        num_classes: number of classes.
        smoothing: label smoothing, 0 to 1, distributed evenly over all classes.
    """
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    own = torch.ones(len(labels), device=labels.device) if lam is None else lam
    targets.scatter_add_(1, labels[:, None], (own * (1.0 - smoothing))[:, None])
    if lam is None:
        return targets
    partner = labels.view(-1, 2).flip(1).reshape(-1)
    return targets.scatter_add_(1, partner[:, None], ((1.0 - lam) * (1.0 - smoothing))[:, None])
