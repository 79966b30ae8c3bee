"""BatchNorm in training without a pass of its own over memory.

In FAT every BatchNorm but the stem's stands between a depthwise and a 1x1 convolution, with nothing in between. Once
the statistics are known it is one affine map per channel, and that can be had by changing the 1x1 convolution's weights
(a few thousand numbers) instead of the map (hundreds of megabytes). What is left is one read for the statistics, which
our kernels have at hand when they write the map, and one correction of the gradient. `fat.fuse` does the same for
inference, to the other neighbour and for good.

The map is stored less the running mean, which goes into the depthwise convolution's bias: a norm does not see what is
added to a whole channel, but half precision does, where products with a mean of many deviations drown in its rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that can leave the work on the map to the 1x1 convolution behind it."""

    ranks = 1
    """Over how many ranks the statistics are taken."""
    running_mean: Tensor  # None only where `can_fold` is false
    running_var: Tensor

    @property
    def can_fold(self) -> bool:
        """Whether it stands for the statistics of the batch and a known affine map, as it does while training."""
        return self.training and self.momentum is not None and self.affine and self.track_running_stats

    def sync_stats(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The same over all ranks that share statistics, differentiable; here there is one."""
        return mean, var

    def sync_sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks that share statistics."""
        return values

    @torch.no_grad()
    def update_running_stats(self, drift: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics towards a batch's.

        Args:
            drift: [C], the batch's mean less the running mean.
            var: [C], without correction.
            count: as for `correction`.
        """
        correction = self.correction(count)
        assert self.momentum is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        self.running_mean.add_(drift.to(self.running_mean.dtype), alpha=self.momentum)
        self.running_var.lerp_((var * correction).to(self.running_var.dtype), self.momentum)

    def correction(self, count: int) -> float:
        """What makes an unbiased variance of one that was taken from `count` values per channel on each rank.

        Raises:
            ValueError: of a single value, which has no variance.
        """
        count *= self.ranks
        if count < 2:
            raise ValueError("BatchNorm in training on one value per channel: use larger images or more of them")
        return count / (count - 1)


def fold_into_conv(
    after: nn.Conv2d, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The weights [O, C, 1, 1] and bias [O] with which `after`, a 1x1 convolution, does the norm's work too, in dtype.

    The mean is taken out with the weights as they are rounded: their rounding does not shift the result.
    """
    weight, bias = after.weight, after.bias
    assert bias is not None
    matrix = weight.flatten(1)
    rounded = (matrix * (norm.weight * (var + norm.eps).rsqrt())).to(dtype)
    # Sums of products, not matrix products: autocast would round those.
    total = bias + (matrix * norm.bias - rounded.to(mean.dtype) * mean).sum(1)
    return rounded.view_as(weight), total.to(dtype)


def with_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x itself, its mean and its variance without correction over all but the channels: [C], float32 at least.

    One operator for autograd, so that the gradients by all three reach x in one pass.
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
    """Mean and variance without correction over all but the channels: [C], float32 at least. Not differentiable."""
    if x.is_cuda and not torch.compiler.is_compiling():  # the compiler fuses plain operations better
        eps = 1e-12
        mean, inverse = torch.batch_norm_stats(x, eps)
        return mean, (inverse.double().pow(-2) - eps).to(mean.dtype)
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(0, 2, 3), correction=0)
    return mean, var
