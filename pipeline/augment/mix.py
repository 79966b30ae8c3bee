"""Mixup and CutMix: each row is mixed with the other of its pair, rows 2i and 2i + 1."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.augment.params import MixParams
from pipeline.augment.transfer import upload


def mix(images: Tensor, params: MixParams) -> Tensor:
    """The mixed batch: lam x + (1 - lam) partner, or the partner's box pasted in.

    Args:
        images: floating [B, 3, H, W], channels-last, B even.
        params: of these B rows.

    Returns:
        A new tensor of the same shape, dtype and strides; computed in float32.

    Raises:
        ValueError: an odd batch, or parameters of another length.
    """
    batch, channels, height, width = images.shape
    if batch % 2 or len(params.lam) != batch:
        raise ValueError(f"whole pairs expected: {batch} images, {len(params.lam)} parameters")
    lam, cut, box = upload([params.lam, params.use_cutmix, params.box], images.device)
    own = torch.where(cut, 1.0, lam)[:, None, None]
    y, x, high, wide = box[:, :, None].unbind(1)
    # Rows of pixels with their channels side by side, so that nothing is broadcast along three channels.
    rows = images.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
    line = torch.arange(height, device=images.device)
    column = torch.arange(width * channels, device=images.device)
    vertical = (line >= y) & (line < y + high)
    horizontal = (column >= x * channels) & (column < (x + wide) * channels)
    partner = rows.view(batch // 2, 2, height, width * channels).flip(1).view(rows.shape)
    blended = rows * own + partner * (1.0 - own)
    pasted = torch.where(vertical[:, :, None] & horizontal[:, None, :], partner, blended.to(images.dtype))
    return pasted.view(batch, height, width, channels).permute(0, 3, 1, 2)


def mix_targets(labels: Tensor, lam: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Soft targets of mixed rows, float32 [B, num_classes], each row summing to 1.

    Args:
        labels: int64 [B], B even.
        lam: float32 [B], the share of a row's own label; the rest goes to its partner's.
        smoothing: label smoothing, spread evenly over all classes.
    """
    partner = labels.view(-1, 2).flip(1).reshape(-1)
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    targets.scatter_add_(1, labels[:, None], (lam * (1.0 - smoothing))[:, None])
    return targets.scatter_add_(1, partner[:, None], ((1.0 - lam) * (1.0 - smoothing))[:, None])
