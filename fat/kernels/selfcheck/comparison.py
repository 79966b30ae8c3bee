"""Make comparisons with torch one by one: what they are, when a result passes, and what a failure means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fat.kernels.families import disabled

SUMMING = 2.0**-18  # of the largest result


class KernelFault(Exception):
    """A kernel has left the device unusable for this process."""


@dataclass(frozen=True)
class Failure:
    """Why a family is switched off."""

    family: str
    operator: str
    shape: str
    """Of the first map and, where there is one, the kernel."""
    dtype: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator} on {self.shape} {self.dtype}: {self.reason}"


class Check(Protocol):
    """One comparison of one family with torch; `Case` is one, augmentation has others."""

    @property
    def families(self) -> tuple[str, ...]:
        """The families whose kernels are launched, the one that is checked last."""

    @property
    def operator(self) -> str: ...

    @property
    def shape(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    def compare(self, device: torch.device) -> tuple[str, str] | None:
        """Return the family that is wrong and how, or None. Raises whatever the kernels raise."""

    def launch(self) -> object:
        """Launch its kernels on CPU tensors of any values, for a recorder of launches (`fat.kernels.prefill`)."""


def run(checks: Iterable[Check], device: torch.device) -> list[Failure]:
    """Compare, and return the first failure of each family that fails. Synchronises the device after every check.

    A family that has failed is not checked further, nor are operators that launch its kernels too.

    Raises:
        KernelFault: a kernel has made the device unusable (an illegal address, for instance).
    """
    failures: dict[str, Failure] = {}
    with disabled():
        for check in checks:
            if not failures.keys().isdisjoint(check.families):
                continue
            try:
                wrong = check.compare(device)
                _wait(device)  # so that a fault is this check's
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                wrong = check.families[-1], f"{type(error).__name__}: {_first_line(error)}"
                _expect_usable(device, Failure(wrong[0], check.operator, check.shape, check.dtype, wrong[1]))
            if wrong is not None:
                failures[wrong[0]] = Failure(wrong[0], check.operator, check.shape, check.dtype, wrong[1])
    return list(failures.values())


def mismatch(own: Tensor, exact: Tensor) -> str | None:
    """Describe how `own` is out of bounds; None if it is within them. NaN and infinity never are.

    Args:
        exact: what is expected, float64 for floating results.
    """
    eps = torch.finfo(own.dtype).eps if own.dtype.is_floating_point else 0.0
    exact = exact.double()
    allowed = eps * exact.abs() + SUMMING * exact.abs().max()
    error = (own.double() - exact).abs()
    fine = error <= allowed  # NaN is not
    if bool(fine.all()):
        return None
    if missing := int((~own.isfinite()).sum()):
        return f"{missing} of {own.numel()} values are NaN or infinite"
    worst = int((error - allowed).argmax())
    return (
        f"off by {float(error.flatten()[worst]):.3g} where the bound is {float(allowed.flatten()[worst]):.3g} "
        f"({int((~fine).sum())} of {own.numel()} values out of bounds)"
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that missing writes and early reads show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _expect_usable(device: torch.device, failure: Failure) -> None:
    try:
        _wait(device)
    except Exception as error:
        raise KernelFault(
            f"the {failure.family} kernels have made {device} unusable for this process ({failure})"
        ) from error


def _first_line(error: Exception) -> str:
    """Return the error's first line; of Triton's compilation errors, which begin with the source, the message's."""
    text = getattr(error, "error_message", None) or str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")
