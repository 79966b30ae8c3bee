"""BatchNorm in training without a separate pass over memory.

In FAT every BatchNorm, except in the stem, is directly between a depthwise and a 1x1 convolution. With known batch
statistics, BatchNorm is an affine transform per channel, which can be folded into the 1x1 convolution's weights (a few
thousand numbers) instead of being applied to the feature map (hundreds of megabytes). Only two things remain: one read
of the feature map for the statistics, which FAT's kernels compute while they write it, and one correction of the
gradient. For inference, `fat.fuse` folds BatchNorm into the depthwise convolution instead.

The running mean is subtracted from the stored feature map, through the depthwise convolution's bias. This does not
change BatchNorm's result, but it keeps half precision accurate: where a channel's mean is many times its standard
deviation, rounding errors of products with the mean would be larger than the deviations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that can be folded into the 1x1 convolution that follows it."""

    ranks = 1
    """Number of ranks over which the batch statistics are computed."""
    running_mean: Tensor  # None only if `can_fold` is False
    running_var: Tensor

    @property
    def can_fold(self) -> bool:
        """Whether BatchNorm normalizes with batch statistics and has an affine transform, as it does in training."""
        return self.training and self.momentum is not None and self.affine and self.track_running_stats

    def sync_stats(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance over all ranks that share statistics, differentiably. This class uses one rank."""
        return mean, var

    def sync_sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all ranks that share statistics."""
        return values

    @torch.no_grad()
    def update_running_stats(self, drift: Tensor, var: Tensor, count: int) -> None:
        """Update the running statistics with those of a batch.

        Args:
            drift: [C], the batch's mean minus the running mean.
            var: [C], the batch's biased variance.
            count: values per channel on each rank.
        """
        correction = self.correction(count)
        assert self.momentum is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        self.running_mean.add_(drift.to(self.running_mean.dtype), alpha=self.momentum)
        self.running_var.lerp_((var * correction).to(self.running_var.dtype), self.momentum)

    def correction(self, count: int) -> float:
        """Return Bessel's correction, n / (n - 1), for a variance over n = `count` values per channel on each rank.

        Raises:
            ValueError: n is 1; a single value has no variance.
        """
        count *= self.ranks
        if count < 2:
            raise ValueError("BatchNorm has one value per channel in training; use larger images or a larger batch")
        return count / (count - 1)


def fold_into_conv(
    after: nn.Conv2d, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return weights [O, C, 1, 1] and bias [O], in dtype, of `after(norm(x))` as one 1x1 convolution.

    The mean is subtracted with the rounded weights, so that their rounding does not shift the result.
    """
    weight, bias = after.weight, after.bias
    assert bias is not None
    matrix = weight.flatten(1)
    rounded = (matrix * (norm.weight * (var + norm.eps).rsqrt())).to(dtype)
    # Not a matrix product: autocast would round its operands.
    total = bias + (matrix * norm.bias - rounded.to(mean.dtype) * mean).sum(1)
    return rounded.view_as(weight), total.to(dtype)


def with_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, and its mean and biased variance per channel: [C], in float32 or wider.

    It is one autograd function, so that the gradients of all three results reach x in one pass.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Statistics.apply(x)
    return result


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = statistics(x)
        ctx.save_for_backward(x, mean)
        return x.view_as(x), mean, var

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = grad_var * (2 / count)
        shift = grad_mean / count - slope * mean
        slope, shift = slope.view(-1, 1, 1), shift.view(-1, 1, 1)
        return (grad_x + (x * slope + shift)).to(x.dtype)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance per channel: [C], in float32 or wider. Not differentiable."""
    if x.is_cuda and not torch.compiler.is_compiling():  # torch.compile fuses var_mean itself
        eps = 1e-12
        mean, inverse = torch.batch_norm_stats(x, eps)
        return mean, (inverse.double().pow(-2) - eps).to(mean.dtype)
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(0, 2, 3), correction=0)
    return mean, var
