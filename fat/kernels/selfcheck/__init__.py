"""Self-check: compare every kernel family with PyTorch before a model is trained with the kernels.

    failures = selfcheck.run(selfcheck.cases(model, size, torch.bfloat16), device)

The operator calls are traced from the model's forward and backward pass, with a batch size of 2, at its image size and
at an odd image size. So they have the model's channels, kernel sizes and resolutions. Inputs are random with a fixed
seed, and the memory for results is filled with NaN beforehand. A result passes if it differs from the reference in
float64 (`fat.kernels.reference`) by at most

    one unit in the last place of its dtype  +  2^-18 of the largest result

The first term allows for rounding the result. The second allows for float32 sums in another order and approximated
exponentials: 32 units in float32's last place. It is 4 times the tolerance of the tests
(tests/support/kernel_checks.py), because a false alarm costs throughput, while the error of a wrong kernel is far
larger. Results that an operator computes from its stored result, such as a feature map's statistics or a folded bias,
are compared with a reference that is computed from this stored result.
"""

from fat.kernels.selfcheck.case import Case
from fat.kernels.selfcheck.comparison import Check, Failure, KernelFault, run
from fat.kernels.selfcheck.trace import cases

__all__ = ["Case", "Check", "Failure", "KernelFault", "cases", "run"]
