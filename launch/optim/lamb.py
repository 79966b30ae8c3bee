"""LAMB, an optimizer for large batches (You et al., ICLR 2020, arXiv 1904.00962), as timm implements it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """Parameter groups and state of LAMB. `launch.optim.optimizers.Updater` computes the update."""

    def __init__(self, groups: Any, *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0, "fused": True})


def lamb_update(
    options: dict[str, Any], gradients: list[Tensor], states: dict[str, list[Tensor]], skip: Tensor
) -> None:
    """Update the parameters of a group, without waiting for the device.

    The update of each parameter is AdamW's direction r = m / (sqrt(v) + eps) + weight_decay * p, times the learning
    rate and the trust ratio |p| / |r|. As in timm, the ratio is 1 without weight decay (biases and norms), and where a
    norm is 0.

    Args:
        options: parameters and hyperparameters of the group.
        states: exp_avg, exp_avg_sq and step of the parameters.
        skip: float32 scalar, 1 = change nothing.
    """
    parameters, weight_decay = options["params"], options["weight_decay"]
    # A step of Adam from 0 with learning rate -1 is Adam's direction. Its kernel updates the moments too, or nothing.
    directions = list(torch._foreach_mul(parameters, 0.0))
    torch._fused_adam_(
        directions,
        gradients,
        states["exp_avg"],
        states["exp_avg_sq"],
        [],
        states["step"],
        lr=-1.0,
        beta1=options["betas"][0],
        beta2=options["betas"][1],
        weight_decay=0.0,
        eps=options["eps"],
        amsgrad=False,
        maximize=False,
        found_inf=skip,
    )
    scale = (skip - 1) * options["lr"]
    if weight_decay:
        torch._foreach_add_(directions, parameters, alpha=weight_decay)
        norms, lengths = (torch.stack(torch._foreach_norm(tensors)) for tensors in (parameters, directions))
        ratios = torch.where((norms > 0) & (lengths > 0), norms / lengths, 1.0)
        torch._foreach_mul_(directions, list((ratios * scale).unbind()))
    else:
        torch._foreach_mul_(directions, scale)
    torch._foreach_add_(parameters, directions)
