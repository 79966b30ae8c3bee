"""What every operator `fat::*` returns, in plain torch: one function per operator, with the operator's arguments.

It has two uses. An operator whose kernel family is switched off (`fat.kernels.families`) runs these functions instead
of the Triton kernels: sums in float32, results rounded once to the operator's dtypes, maps in channels-last memory. The
self-check (`fat.kernels.selfcheck`) compares the kernels with them in float64: with `own`, the operator's own first
result, nothing is rounded, and what the operator computes from its stored first result is computed from `own`.

None of the functions is differentiable: the operators have autograd formulas of their own.
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
