"""The kernels as PyTorch operators `fat::*`, with shapes for tracing and gradients for autograd.

Feature maps are [B, C, H, W] in channels-last memory, in float32, bfloat16 or float16; weights have any floating-point
dtype. All sums are fp32. Results are rounded once, to the feature map's dtype; weight gradients to the weight's dtype.
Operators raise ValueError for other memory formats, dtypes or devices, which `fat.kernels.can_use` checks beforehand.
Triton is imported by the first call. Second derivatives are not supported.

In this package `grad_out` is the gradient of the loss with respect to an operator's result.
"""

from fat.kernels.ops.attention import attend, attend_gradient
from fat.kernels.ops.batchnorm import (
    depthwise_stats,
    depthwise_stats_gradient,
    fold,
    fold_gradient,
    update_running_stats,
)
from fat.kernels.ops.channel_sums import channel_sums, pointwise
from fat.kernels.ops.depthwise import (
    depthwise,
    depthwise_gate,
    depthwise_gate_gradient,
    depthwise_input_gradient,
    depthwise_weight_gradient,
)
from fat.kernels.ops.gate import gate, gate_gradient
from fat.kernels.ops.norm import add, add_norm, add_norm_gradient, depthwise_norm, norm, norm_gradient, scaled
from fat.kernels.ops.norm_relu import (
    batch_norm_relu,
    channel_stats,
    norm_relu,
    norm_relu_gradient,
    norm_relu_sums,
)

__all__ = [
    "add",
    "add_norm",
    "add_norm_gradient",
    "attend",
    "attend_gradient",
    "batch_norm_relu",
    "channel_stats",
    "channel_sums",
    "depthwise",
    "depthwise_gate",
    "depthwise_gate_gradient",
    "depthwise_input_gradient",
    "depthwise_norm",
    "depthwise_stats",
    "depthwise_stats_gradient",
    "depthwise_weight_gradient",
    "fold",
    "fold_gradient",
    "gate",
    "gate_gradient",
    "norm",
    "norm_gradient",
    "norm_relu",
    "norm_relu_gradient",
    "norm_relu_sums",
    "pointwise",
    "scaled",
    "update_running_stats",
]
