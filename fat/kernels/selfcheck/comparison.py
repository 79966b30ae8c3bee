"""Run the checks of a self-check one by one, and decide when a result passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fat.kernels.families import disabled

SUMMING = 2.0**-18  # tolerance for float32 sums, relative to the largest result


class KernelFault(Exception):
    """A kernel has made the device unusable for this process."""


@dataclass(frozen=True)
class Failure:
    """A failed check. The kernel family that failed is switched off."""

    family: str
    operator: str
    shape: str
    """Shape of the first feature map, and the kernel size of a convolution."""
    dtype: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator} on {self.shape} {self.dtype}: {self.reason}"


class Check(Protocol):
    """A comparison of one kernel family with PyTorch. `Case` checks the model's operators; augmentation has its own."""

    @property
    def families(self) -> tuple[str, ...]:
        """Families whose kernels are launched; the last one is the one that is checked."""

    @property
    def operator(self) -> str: ...

    @property
    def shape(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    def compare(self, device: torch.device) -> tuple[str, str] | None:
        """Return the family at fault and a description, or None if the results are correct.

        Raises whatever the kernels raise.
        """

    def launch(self) -> object:
        """Launch the kernels on uninitialized CPU tensors, to record the launches (`fat.kernels.prefill`)."""


def run(checks: Iterable[Check], device: torch.device) -> list[Failure]:
    """Run the checks, and return the first failure of each family that fails. Synchronizes the device after each check.

    After a family has failed, all other checks that launch its kernels are skipped.

    Raises:
        KernelFault: a kernel has made the device unusable, for example by an illegal memory access.
    """
    failures: dict[str, Failure] = {}
    with disabled():
        for check in checks:
            if not failures.keys().isdisjoint(check.families):
                continue
            try:
                fault = check.compare(device)
                _synchronize(device)  # raises asynchronous errors in the check that caused them
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                fault = check.families[-1], f"{type(error).__name__}: {_first_line(error)}"
                _check_device(device, Failure(fault[0], check.operator, check.shape, check.dtype, fault[1]))
            if fault is not None:
                failures[fault[0]] = Failure(fault[0], check.operator, check.shape, check.dtype, fault[1])
    return list(failures.values())


def mismatch(actual: Tensor, expected: Tensor) -> str | None:
    """Describe how `actual` differs from `expected`; None if it is within the tolerance. NaN and infinity never are.

    Args:
        actual: result of a kernel.
        expected: result of the reference, float64 for floating-point results.
    """
    eps = torch.finfo(actual.dtype).eps if actual.dtype.is_floating_point else 0.0
    expected = expected.double()
    allowed = eps * expected.abs() + SUMMING * expected.abs().max()
    error = (actual.double() - expected).abs()
    within = error <= allowed  # a comparison with NaN is False
    if bool(within.all()):
        return None
    if count := int((~actual.isfinite()).sum()):
        return f"{count} of {actual.numel()} values are NaN or infinite"
    worst = int((error - allowed).argmax())
    return (
        f"error {float(error.flatten()[worst]):.3g} exceeds the tolerance of {float(allowed.flatten()[worst]):.3g} "
        f"({int((~within).sum())} of {actual.numel()} values are out of tolerance)"
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialized memory with NaN, so that missing writes and premature reads are detected."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_device(device: torch.device, failure: Failure) -> None:
    """Raise KernelFault if the device is unusable after a failure."""
    try:
        _synchronize(device)
    except Exception as error:
        raise KernelFault(
            f"the {failure.family} kernels have made {device} unusable for this process ({failure})"
        ) from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, without the source code with which Triton's compile errors begin."""
    text = getattr(error, "error_message", None) or str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")
