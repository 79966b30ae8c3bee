"""Reference implementation of the operators `fat::*` in plain PyTorch: one function per operator, with its arguments.

The functions have two uses:

- Fallback: an operator whose kernel family is switched off (`fat.kernels.families`) runs them instead of the Triton
  kernels. Sums are float32, results are rounded once to the operator's dtypes, feature maps are channels-last.
- Self-check: `fat.kernels.selfcheck` compares the kernels with them in float64. It passes `kernel_out`, the kernel's
  first result. Then nothing is rounded, and whatever an operator computes from its stored first result is computed from
  `kernel_out`.

They are not differentiable, because the operators have their own autograd formulas.
"""

from fat.kernels.reference.attention import attend, attend_gradient
from fat.kernels.reference.batchnorm import (
    depthwise_stats,
    depthwise_stats_gradient,
    fold,
    fold_gradient,
    update_running_stats,
)
from fat.kernels.reference.channel_sums import channel_sums
from fat.kernels.reference.depthwise import (
    depthwise,
    depthwise_gate,
    depthwise_gate_gradient,
    depthwise_input_gradient,
    depthwise_weight_gradient,
)
from fat.kernels.reference.gate import gate, gate_gradient
from fat.kernels.reference.norm import add, add_norm, add_norm_gradient, depthwise_norm, norm, norm_gradient, scaled
from fat.kernels.reference.norm_relu import channel_stats, norm_relu, norm_relu_gradient, norm_relu_sums

__all__ = [
    "add",
    "add_norm",
    "add_norm_gradient",
    "attend",
    "attend_gradient",
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
    "scaled",
    "update_running_stats",
]
