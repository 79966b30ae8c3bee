"""Compare every family of kernels with torch before a model is trained with them.

    found = selfcheck.run(selfcheck.cases(model, size, torch.bfloat16), device)

The operator calls are the model's own, traced from its forward and backward pass: its channels, kernel sizes and maps
at a batch of 2, once at its image size and once at an odd one. Inputs are drawn from a seed, the memory that kernels
write to is NaN beforehand. A result passes if it is within

    one unit in the last place of its dtype  +  2^-18 of the largest result

of the same in float64 (`fat.kernels.reference`). The first term is the rounding of the result. The second is for sums
in float32 in another order, with approximated exponentials: 32 units in float32's last place, 4 times what the tests
allow (tests/support/kernel_checks.py), because a false alarm costs speed, and a wrong kernel is wrong by far more. What
an operator computes from its stored result (a map's statistics, a folded bias) is compared with the same of that
result.
"""

from fat.kernels.selfcheck.case import Case
from fat.kernels.selfcheck.comparison import Check, Failure, KernelFault, run
from fat.kernels.selfcheck.trace import cases

__all__ = ["Case", "Check", "Failure", "KernelFault", "cases", "run"]
