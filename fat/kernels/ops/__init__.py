"""The kernels as torch operators `fat::*`: shapes for tracing, gradients for autograd.

Maps are [B, C, H, W] in channels-last memory, float32, bfloat16 or float16; weights any float dtype. Every sum is in
fp32 and every result is rounded once, to the dtype of the map it belongs to; gradients of weights are summed in fp32
and returned in the weight's dtype. An operator that is called with another layout or device raises ValueError;
`fat.kernels` asks first. Triton is imported by the first call. There is no second derivative.
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
