"""Triton kernel that finishes a batch: normalize, erase, mix and cast to the model's dtype in one pass.

The same in plain PyTorch takes about ten passes in fp32. A program reads both rows of a pair once, as bytes, and writes
both results.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from pipeline import rng
from pipeline.augment.params import MixParams, SampleParams
from pipeline.augment.recipe import Color, scale_and_offset
from pipeline.augment.torch_impl.mix import check_pairs
from pipeline.augment.transfer import upload

BLOCK, WARPS = 4096, 8  # values per program: 16 bytes of input per thread
CHANNELS = tl.constexpr(3)
BITS = tl.constexpr(16)  # bits of the hash per noise value
GOLDEN, MIX1, MIX2 = (tl.constexpr(int(word)) for word in (rng.GOLDEN, rng.MIX1, rng.MIX2))


@triton.jit
def _finish(
    images,
    erase_boxes,
    erase_keys,
    quantiles,
    lam,
    use_cutmix,
    mix_boxes,
    out,
    numel,
    width,
    scale0,
    scale1,
    scale2,
    offset0,
    offset1,
    offset2,
    MIX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finish BLOCK values of a sample, or of both samples of a pair if MIX.

    images is uint8 [B, numel] and out [B, numel], where numel = height * width * 3.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    channel = at % CHANNELS
    y, x = at // CHANNELS // width, at // CHANNELS % width
    scale = tl.where(channel == 0, scale0, tl.where(channel == 1, scale1, scale2))
    offset = tl.where(channel == 0, offset0, tl.where(channel == 1, offset1, offset2))
    row = tl.program_id(1).to(tl.int64)
    if MIX:
        first = _erased(
            images, erase_boxes, erase_keys, quantiles, 2 * row, at, mask, channel, y, x, scale, offset, numel
        )
        second = _erased(
            images, erase_boxes, erase_keys, quantiles, 2 * row + 1, at, mask, channel, y, x, scale, offset, numel
        )
        _store_mixed(first, second, lam, use_cutmix, mix_boxes, out, 2 * row, at, mask, y, x, numel)
        _store_mixed(second, first, lam, use_cutmix, mix_boxes, out, 2 * row + 1, at, mask, y, x, numel)
    else:
        own = _erased(images, erase_boxes, erase_keys, quantiles, row, at, mask, channel, y, x, scale, offset, numel)
        tl.store(out + row * numel + at, own.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _erased(images, boxes, keys, quantiles, row, at, mask, channel, y, x, scale, offset, numel):
    """Load values of a sample, normalize them and fill its erase box with noise.

    The noise is standard normal: the sample's key and the pixel's index in the box are hashed, and 16 bits of the hash
    per channel are the index into the table `quantiles`.
    """
    value = tl.load(images + row * numel + at, mask=mask, other=0).to(tl.float32) * scale + offset
    top, left = tl.load(boxes + row * 4), tl.load(boxes + row * 4 + 1)
    high, wide = tl.load(boxes + row * 4 + 2), tl.load(boxes + row * 4 + 3)
    if high > 0:
        inside = mask & (y >= top) & (y < top + high) & (x >= left) & (x < left + wide)
        pixel = ((y - top) * wide + (x - left)).to(tl.uint64)
        state = (tl.load(keys + row).to(tl.uint64, bitcast=True) ^ pixel) + GOLDEN
        state = (state ^ (state >> 30)) * MIX1
        state = (state ^ (state >> 27)) * MIX2
        state = state ^ (state >> 31)
        word = (state >> (channel * BITS).to(tl.uint64)) & 0xFFFF
        noise = tl.load(quantiles + word.to(tl.int32), mask=inside, other=0.0)
        value = tl.where(inside, noise, value)
    return value


@triton.jit
def _store_mixed(own, partner, lam, use_cutmix, boxes, out, row, at, mask, y, x, numel):
    """Mix values of a row with those of its partner by mixup or CutMix, and store them."""
    weight = tl.where(tl.load(use_cutmix + row) != 0, 1.0, tl.load(lam + row))
    top, left = tl.load(boxes + row * 4), tl.load(boxes + row * 4 + 1)
    high, wide = tl.load(boxes + row * 4 + 2), tl.load(boxes + row * 4 + 3)
    inside = (y >= top) & (y < top + high) & (x >= left) & (x < left + wide)
    mixed = tl.where(inside, partner, own * weight + partner * (1.0 - weight))
    tl.store(out + row * numel + at, mixed.to(out.dtype.element_ty), mask=mask)


def finish(
    images: Tensor,
    params: SampleParams,
    mixing: MixParams | None,
    quantiles: Tensor,
    mean: Color,
    std: Color,
    dtype: torch.dtype,
) -> Tensor:
    """Normalize, erase and mix a batch, like `normalize`, `Eraser` and `mix`, but with a single rounding at the end.

    Args:
        images: uint8 [B, H, W, 3], contiguous; B is even if rows are mixed.
        params: parameters of the B samples; only those of erasing are used.
        mixing: mixing parameters of the B rows. None: rows are not mixed.
        quantiles: quantiles of the standard normal, float32 [65536].
        mean, std: per channel, for values in 0 to 1.
        dtype: floating-point dtype of the result.

    Returns:
        dtype [B, 3, H, W] with channels-last strides.

    Raises:
        ValueError: rows are mixed and B is odd, or there are not B mixing parameters.
    """
    batch, height, width, _ = images.shape
    arrays: list[NDArray[Any]] = [params.erase_boxes, params.erase_keys]
    if mixing is not None:
        check_pairs(batch, mixing)
        arrays += [mixing.lam, mixing.use_cutmix.astype(np.uint8), mixing.box]
    boxes, keys, *mix = upload(arrays, images.device)
    lam, use_cutmix, mix_boxes = mix or (None, None, None)
    scale, offset = scale_and_offset(mean, std)
    out = torch.empty_like(images, dtype=dtype)
    numel = height * width * 3
    _finish[(triton.cdiv(numel, BLOCK), batch // 2 if mix else batch)](
        images,
        boxes,
        keys,
        quantiles,
        lam,
        use_cutmix,
        mix_boxes,
        out,
        numel,
        width,
        *scale.tolist(),
        *offset.tolist(),
        MIX=bool(mix),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return out.permute(0, 3, 1, 2)
