"""BatchNorm over several ranks: synchronised, in groups, or frozen."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional as F

from fat.batchnorm import BatchNorm, statistics
from launch.config.errors import RecipeError
from launch.config.recipe import Recipe
from launch.machine.world import World
from pipeline.batch_shape import divisors, nearest

# Attention pools to a 32nd of the image's side, rounded up.
MIN_SIZE_OF_ONE_IMAGE = 33


def convert_sync_batchnorm(model: nn.Module, wanted: str, world: World) -> nn.Module:
    """BatchNorm's statistics over all ranks, or over groups of N neighbours (`group:N`), where there are several ranks.

    Each layer then costs a small collective forward and one backward; groups inside a node keep those off the network.

    Args:
        wanted: auto, on, off or group:N (`RunConfig.sync_bn`).

    Raises:
        RecipeError: asked for what cannot be.
    """
    if not over_ranks(wanted, world.size, world.device):
        return model
    if world.size == 1:
        raise RecipeError(f"--sync-bn {wanted}: needs several ranks, here is one; use auto")
    size = int(wanted.removeprefix("group:")) if wanted.startswith("group:") else world.size
    if world.size % size:
        raise RecipeError(
            f"--sync-bn {wanted}: {size} does not divide the world size {world.size}; the nearest that do: "
            f"{nearest(size, divisors(world.size))}"
        )
    # Groups of their own, not the default one that reduces gradients: on one communicator these small all-reduces would
    # queue behind buckets of gradients in the backward pass, and captured collectives (`launch.engine.cuda_graphs`)
    # would mix with eager ones, which depends on NCCL_GRAPH_MIXING_SUPPORT. Every rank takes part in making every
    # group.
    groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world.size, size)]
    group = groups[world.rank // size]
    assert group is not None
    return _replace(model, group)


def over_ranks(wanted: str, ranks: int, device: torch.device) -> bool:
    """Whether statistics are to be those of several ranks (`RunConfig.sync_bn`, resolved)."""
    return wanted != "off" and (wanted != "auto" or (ranks > 1 and device.type == "cuda"))


def check_values_per_channel(recipe: Recipe, rows: int, world: World) -> None:
    """Reject batches whose BatchNorm statistics would be those of one value.

    Args:
        rows: images per forward pass of a rank.

    Raises:
        RecipeError: one image in a forward pass, of a size whose pooled maps have one pixel.
    """
    smallest = MIN_SIZE_OF_ONE_IMAGE
    alone = rows == 1 and recipe.data.size < smallest and not recipe.model.freeze_bn
    if alone and not over_ranks(recipe.parallel.sync_bn, world.size, world.device):
        raise RecipeError(
            f"--size {recipe.data.size}: one image per forward pass leaves BatchNorm one value per channel, which has "
            f"no variance; use two images or more (--global-batch, --micro-batch), or --size {smallest} or more"
        )


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """All BatchNorm layers, synchronised or not."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


class GlobalBatchNorm(BatchNorm):
    """BatchNorm whose training statistics are those of all ranks of a group, each with the same number of values.

    torch's SyncBatchNorm allows for ranks with different numbers, and to leave out those without any it makes the host
    wait for the device in every layer; nor can it be compiled whole. Here ranks have equal numbers by plan, so one
    all-reduce forward and one backward are all there is.

    images: float [B, C, H, W], any memory layout and dtype; statistics are float32, and combined over ranks in float64,
    where the mean of squares less the square of the mean keeps its digits.
    """

    def __init__(self, norm: nn.BatchNorm2d, group: dist.ProcessGroup) -> None:
        """Take over the parameters and buffers of `norm`."""
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self._parameters.update(norm._parameters)
        self._buffers.update(norm._buffers)
        self.train(norm.training)
        self.group = group
        self.ranks = dist.get_world_size(group)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        output, mean, var = _Normalise.apply(input, self.weight, self.bias, self.eps, self.group, self.ranks)
        assert self.running_mean is not None
        self.update_running_stats(mean - self.running_mean, var, input.numel() // input.shape[1])
        return output

    def sync_stats(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _Share.apply(mean, var, self.group, self.ranks)
        return result

    def sync_sum(self, values: Tensor) -> Tensor:
        return _sum_over_ranks(values, self.group)


class _Share(torch.autograd.Function):
    """(mean, biased variance, group, ranks), [C] float32 -> the same of all ranks' values together."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, group: dist.ProcessGroup, ranks: int) -> tuple[Tensor, Tensor]:
        total_mean, total_var = _over_ranks(mean, var, group, ranks)
        ctx.save_for_backward(mean, total_mean)
        ctx.group, ctx.ranks = group, ranks
        return total_mean, total_var

    @staticmethod
    def backward(ctx: Any, by_mean: Tensor, by_var: Tensor) -> tuple[Tensor | None, ...]:
        mean, total_mean = ctx.saved_tensors
        by_mean, by_var = (_sum_over_ranks(torch.cat([by_mean, by_var]), ctx.group) / ctx.ranks).chunk(2)
        return by_mean + 2 * (mean - total_mean) * by_var, by_var, None, None


class _Normalise(torch.autograd.Function):
    """(input, weight, bias, eps, group, ranks) -> normalised input, and the mean and biased variance over all ranks."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd hands them over by position
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup, ranks: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        input = input.contiguous(memory_format=_layout(input))
        mean, var = _over_ranks(*statistics(input), group, ranks)
        output = F.batch_norm(input, mean, var, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(input, weight, mean, (var + eps).rsqrt())
        ctx.group, ctx.ranks = group, ranks
        ctx.mark_non_differentiable(mean, var)
        return output, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, inverse = ctx.saved_tensors
        grad = grad.contiguous(memory_format=_layout(input))  # kernels walk both alike
        # torch has kernels for the parts, but the compiler fuses plain operations better.
        fused = input.is_cuda and not torch.compiler.is_compiling()
        if fused:
            sums = torch.batch_norm_backward_reduce(grad, input, mean, inverse, weight, True, False, False)[:2]
        else:
            grads, centred = grad.float(), input.float() - _per_channel(mean)
            sums = grads.sum(dim=(0, 2, 3)), (grads * centred).sum(dim=(0, 2, 3))
        # Weights' gradients are averaged with all others afterwards: those of this rank's rows are wanted here.
        grad_weight, grad_bias = (sums[1] * inverse).to(weight.dtype), sums[0].to(weight.dtype)
        total, total_centred = _sum_over_ranks(torch.cat(sums), ctx.group).chunk(2)
        count = ctx.ranks * (input.numel() // input.shape[1])
        if fused:
            counts = torch.full((1,), count, dtype=torch.int32, device=input.device)
            grad_input = torch.batch_norm_backward_elemt(
                grad, input, mean, inverse, weight, total, total_centred, counts
            )
        else:
            slope = inverse * weight
            towards = total_centred * inverse * inverse * slope / count
            shift = total * slope / count - mean * towards
            grad_input = grads * _per_channel(slope) - input.float() * _per_channel(towards) - _per_channel(shift)
        return grad_input.to(input.dtype), grad_weight, grad_bias, None, None, None


def _over_ranks(mean: Tensor, var: Tensor, group: dist.ProcessGroup, ranks: int) -> tuple[Tensor, Tensor]:
    dtype, mean, var = mean.dtype, mean.double(), var.double()
    mean, second = (_sum_over_ranks(torch.cat([mean, var + mean * mean]), group) / ranks).chunk(2)
    return mean.to(dtype), (second - mean * mean).clamp_(min=0).to(dtype)


def _sum_over_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(values, "sum", group))


def _layout(input: Tensor) -> torch.memory_format:
    last = input.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _per_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def _replace(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Put a `GlobalBatchNorm` in the place of every BatchNorm2d; the model itself is changed and returned."""
    if isinstance(model, nn.BatchNorm2d):
        return GlobalBatchNorm(model, group)
    for name, child in model.named_children():
        setattr(model, name, _replace(child, group))
    return model
