"""The kernels as torch operators `fat::*`: shapes for tracing, gradients for autograd.

Maps are [B, C, H, W] in channels-last memory, float32, bfloat16 or float16; weights any float dtype. Every sum is in
fp32 and every result is rounded once, to the dtype of the map it belongs to; gradients of weights are summed in fp32
and returned in the weight's dtype. An operator that is called with another layout or device raises ValueError;
`fat.kernels` asks first. Triton is imported by the first call. There is no second derivative.
"""

from fat.kernels.attention_ops import attend, attend_gradient
from fat.kernels.batchnorm_ops import depthwise_moments, depthwise_moments_gradient, fold, fold_gradient, follow
from fat.kernels.convolution_ops import (
    depthwise,
    depthwise_gate,
    depthwise_gate_gradient,
    depthwise_input_gradient,
    depthwise_weight_gradient,
)
from fat.kernels.gate_ops import gate, gate_gradient
from fat.kernels.norm_ops import add, add_norm, add_norm_gradient, depthwise_norm, norm, norm_gradient, scaled
from fat.kernels.normrelu_ops import (
    batch_norm_relu,
    channel_moments,
    norm_relu,
    norm_relu_gradient,
    norm_relu_sums,
)
from fat.kernels.sum_ops import channel_sums, pointwise

__all__ = [
    "add",
    "add_norm",
    "add_norm_gradient",
    "attend",
    "attend_gradient",
    "batch_norm_relu",
    "channel_moments",
    "channel_sums",
    "depthwise",
    "depthwise_gate",
    "depthwise_gate_gradient",
    "depthwise_input_gradient",
    "depthwise_moments",
    "depthwise_moments_gradient",
    "depthwise_norm",
    "depthwise_weight_gradient",
    "fold",
    "fold_gradient",
    "follow",
    "gate",
    "gate_gradient",
    "norm",
    "norm_gradient",
    "norm_relu",
    "norm_relu_gradient",
    "norm_relu_sums",
    "pointwise",
    "scaled",
]
