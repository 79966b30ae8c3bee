"""BatchNorm with statistics over all ranks or over groups of ranks."""

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
from launch.stragglers.collective_wait import collective
from pipeline.batch_shape import divisors, nearest

# Minimum image size in pixels if a batch has one image: attention pools it to ceil(size / 32) pixels per side, and
# BatchNorm needs more than one pixel.
MIN_SIZE_OF_ONE_IMAGE = 33


def convert_sync_batchnorm(model: nn.Module, sync_bn: str, world: World) -> nn.Module:
    """Replace BatchNorm layers by layers whose statistics are over all ranks, or over groups of consecutive ranks.

    Each of them adds a small collective to the forward and to the backward pass. Groups within a node avoid network
    traffic. If `sync_bn` resolves to off, the model is returned unchanged.

    Args:
        sync_bn: auto, on, off or group:N (`ParallelConfig.sync_bn`).

    Raises:
        RecipeError: see `group_size` and `check_batch_norms`.
    """
    if not syncs_over_ranks(sync_bn, world.size, world.device):
        return model
    size = group_size(sync_bn, world.size)
    check_batch_norms(model, sync_bn, world)
    # Separate process groups, because on the communicator that reduces gradients, these small all-reduces would queue
    # behind gradient buckets, and captured collectives (`launch.engine.cuda_graphs`) would mix with eager ones, which
    # NCCL_GRAPH_MIXING_SUPPORT may forbid. Every rank must call `new_group` for every group.
    groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world.size, size)]
    group = groups[world.rank // size]
    assert group is not None
    return _replace(model, group)


def syncs_over_ranks(sync_bn: str, ranks: int, device: torch.device) -> bool:
    """Return whether BatchNorm statistics are computed over several ranks (resolves `ParallelConfig.sync_bn`)."""
    return sync_bn != "off" and (sync_bn != "auto" or (ranks > 1 and device.type == "cuda"))


def group_size(sync_bn: str, ranks: int) -> int:
    """Return over how many ranks BatchNorm statistics are computed, if `syncs_over_ranks`.

    Raises:
        RecipeError: there is only one rank, or N of group:N does not divide the number of ranks.
    """
    if ranks == 1:
        raise RecipeError(f"--sync-bn {sync_bn}: requires several ranks, but there is only one; use auto")
    size = int(sync_bn.removeprefix("group:")) if sync_bn.startswith("group:") else ranks
    if ranks % size:
        raise RecipeError(
            f"--sync-bn {sync_bn}: {size} does not divide the world size {ranks}; the nearest that do: "
            f"{nearest(size, divisors(ranks))}"
        )
    return size


def check_batch_norms(model: nn.Module, sync_bn: str, world: World) -> None:
    """Check that all BatchNorm layers can be synchronized, if `sync_bn` resolves to that.

    Raises:
        RecipeError: a layer is of an unknown class, or has no parameters or running statistics.
    """
    if not syncs_over_ranks(sync_bn, world.size, world.device):
        return
    for name, norm in model.named_modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and _synchronized_class(norm) is None:
            raise RecipeError(
                f"--sync-bn {sync_bn}: the statistics of {name} ({type(norm).__name__}) cannot be computed over "
                "several ranks; use --sync-bn off"
            )


def check_values_per_channel(recipe: Recipe, size: int, rows: int, world: World) -> None:
    """Raise RecipeError if a BatchNorm layer would have only one value per channel.

    Args:
        size: height and width of the images in pixels.
        rows: images per forward pass of a rank.

    Raises:
        RecipeError: a forward pass has one image, whose pooled feature maps have one pixel.
    """
    smallest = MIN_SIZE_OF_ONE_IMAGE
    alone = rows == 1 and size < smallest and not recipe.model.frozen_norms
    if alone and not syncs_over_ranks(recipe.parallel.sync_bn, world.size, world.device):
        raise RecipeError(
            f"--size {size}: one image per forward pass gives BatchNorm one value per channel, which has "
            f"no variance; use at least two images (--global-batch, --micro-batch), or --size {smallest} or more"
        )


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return all BatchNorm layers, synchronized or not."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


class GlobalBatchNorm(BatchNorm):
    """BatchNorm whose training statistics are over all ranks of a group, which all have the same number of values.

    PyTorch's SyncBatchNorm supports ranks with different numbers of values. For that it makes the host wait for the
    device in every layer, and it cannot be compiled as one graph. The plan gives all ranks equal numbers, so that one
    all-reduce in the forward and one in the backward pass are sufficient.

    images: float [B, C, ...], such as [B, C, H, W], in any memory format and dtype. Statistics are float32. They are
    combined over ranks in float64, because the mean of squares minus the square of the mean is inexact in float32.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, group: dist.ProcessGroup) -> None:
        """Use the parameters and buffers of `norm`."""
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self._parameters.update(norm._parameters)
        self._buffers.update(norm._buffers)
        self.train(norm.training)
        self.group = group
        self.ranks = dist.get_world_size(group)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 4:
            return self._normalize(input)
        return self._normalize(input.reshape(*input.shape[:2], -1, 1)).view_as(input)  # of BatchNorm1d or 3d

    def _normalize(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        output, mean, var = _Normalize.apply(input, self.weight, self.bias, self.eps, self.group, self.ranks)
        assert self.running_mean is not None
        self.update_running_stats(mean - self.running_mean, var, input.numel() // input.shape[1])
        return output

    def sync_stats(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _SyncStatistics.apply(mean, var, self.group, self.ranks)
        return result

    def sync_sum(self, values: Tensor) -> Tensor:
        return _sum_over_ranks(values, self.group)


class GlobalBatchNormAct(GlobalBatchNorm):
    """`GlobalBatchNorm` for timm's BatchNormAct2d, which applies dropout and an activation after BatchNorm."""

    drop: nn.Module
    act: nn.Module

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, group: dist.ProcessGroup) -> None:
        super().__init__(norm, group)
        self.drop, self.act = norm.get_submodule("drop"), norm.get_submodule("act")

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


class _SyncStatistics(torch.autograd.Function):
    """(mean, biased variance, group, ranks) of a rank -> mean and biased variance over all ranks; [C] float32."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, group: dist.ProcessGroup, ranks: int) -> tuple[Tensor, Tensor]:
        total_mean, total_var = _combine_over_ranks(mean, var, group, ranks)
        ctx.save_for_backward(mean, total_mean)
        ctx.group, ctx.ranks = group, ranks
        return total_mean, total_var

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        mean, total_mean = ctx.saved_tensors
        grad_mean, grad_var = (_sum_over_ranks(torch.cat([grad_mean, grad_var]), ctx.group) / ctx.ranks).chunk(2)
        return grad_mean + 2 * (mean - total_mean) * grad_var, grad_var, None, None


class _Normalize(torch.autograd.Function):
    """(input, weight, bias, eps, group, ranks) -> normalized input, and the mean and biased variance over all ranks."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes arguments by position
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup, ranks: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        input = input.contiguous(memory_format=_memory_format(input))
        mean, var = _combine_over_ranks(*statistics(input), group, ranks)
        output = F.batch_norm(input, mean, var, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(input, weight, mean, (var + eps).rsqrt())
        ctx.group, ctx.ranks = group, ranks
        ctx.mark_non_differentiable(mean, var)
        return output, mean, var

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, inverse = ctx.saved_tensors
        # PyTorch's BatchNorm kernels expect equal strides of input and gradient.
        grad_out = grad_out.contiguous(memory_format=_memory_format(input))
        # Compiled code is faster with plain operations, which the compiler fuses, than with these kernels.
        fused = input.is_cuda and not torch.compiler.is_compiling()
        if fused:
            sums = torch.batch_norm_backward_reduce(grad_out, input, mean, inverse, weight, True, False, False)[:2]
        else:
            grads, centered = grad_out.float(), input.float() - _per_channel(mean)
            sums = grads.sum(dim=(0, 2, 3)), (grads * centered).sum(dim=(0, 2, 3))
        # Gradients of this rank only: DDP or DeepSpeed averages them over ranks with all other gradients.
        grad_weight, grad_bias = (sums[1] * inverse).to(weight.dtype), sums[0].to(weight.dtype)
        total, total_centered = _sum_over_ranks(torch.cat(sums), ctx.group).chunk(2)
        count = ctx.ranks * (input.numel() // input.shape[1])
        if fused:
            counts = torch.full((1,), count, dtype=torch.int32, device=input.device)
            grad_input = torch.batch_norm_backward_elemt(
                grad_out, input, mean, inverse, weight, total, total_centered, counts
            )
        else:
            slope = inverse * weight
            toward = total_centered * inverse * inverse * slope / count
            shift = total * slope / count - mean * toward
            grad_input = grads * _per_channel(slope) - input.float() * _per_channel(toward) - _per_channel(shift)
        return grad_input.to(input.dtype), grad_weight, grad_bias, None, None, None


def _combine_over_ranks(mean: Tensor, var: Tensor, group: dist.ProcessGroup, ranks: int) -> tuple[Tensor, Tensor]:
    dtype, mean, var = mean.dtype, mean.double(), var.double()
    mean, second = (_sum_over_ranks(torch.cat([mean, var + mean * mean]), group) / ranks).chunk(2)
    return mean.to(dtype), (second - mean * mean).clamp_(min=0).to(dtype)


def _sum_over_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    if torch.compiler.is_compiling():  # compiled code cannot measure how long it waits
        return collectives.wait_tensor(collectives.all_reduce(values, "sum", group))
    with collective(frequent=True):
        return collectives.wait_tensor(collectives.all_reduce(values, "sum", group))


def _memory_format(input: Tensor) -> torch.memory_format:
    last = input.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _per_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def _replace(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Replace every BatchNorm by a `GlobalBatchNorm`, in place; return the model."""
    if isinstance(model, nn.modules.batchnorm._BatchNorm) and (synchronized := _synchronized_class(model)):
        return synchronized(model, group)
    for name, child in model.named_children():
        setattr(model, name, _replace(child, group))
    return model


def _synchronized_class(norm: nn.modules.batchnorm._BatchNorm) -> type[GlobalBatchNorm] | None:
    """Return the class that replaces a BatchNorm layer; None if there is none."""
    if not (norm.affine and norm.track_running_stats and norm.momentum is not None):
        return None
    kind = type(norm)
    if kind in (BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        return GlobalBatchNorm
    # Other subclasses may compute something else. timm is not imported here, because it is optional.
    return GlobalBatchNormAct if kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.") else None
