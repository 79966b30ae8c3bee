"""Read clocks, throttle reasons and memory errors of a GPU with nvidia-smi."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Mapping
from types import TracebackType

from launch.doctor.measurements.report import GpuState

TIMEOUT_SECONDS = 10.0  # after the block of `GpuQuery`
# Since driver 535 throttle reasons are called event reasons; the first query that nvidia-smi accepts is used.
REASON_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
FIELDS = (
    "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
)  # fmt: skip
# Bits of the throttle reasons in nvml.h. Not listed: idle, and clocks that were set by the administrator.
REASONS: Mapping[int, str] = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
EXPECTED_REASONS = frozenset({"power cap"})
"""Reasons that are normal during a large matrix multiplication."""


class GpuQuery:
    """nvidia-smi, running while the block works: clocks are those under load. `state` is set after the block.

    Args:
        address: PCI address of the GPU.
    """

    def __init__(self, address: str) -> None:
        self._address, self._running = address, list[subprocess.Popen[str]]()
        self.state: GpuState | None = None
        self.timed_out = False
        """Whether nvidia-smi did not end in time, as it does if a GPU or its driver no longer responds."""

    def __enter__(self) -> GpuQuery:
        program = shutil.which("nvidia-smi")
        if program is None:
            return self
        for reasons in REASON_FIELDS:
            query = ",".join((*FIELDS, reasons))
            command = [program, f"--id={self._address}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
            with contextlib.suppress(OSError):
                self._running.append(
                    subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                )
        return self

    def done(self) -> bool:
        """Return whether nvidia-smi has ended."""
        return all(process.poll() is not None for process in self._running)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        end = time.monotonic() + TIMEOUT_SECONDS
        for process in self._running:
            try:
                out, _ = process.communicate(timeout=max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()  # without waiting for its end: no signal ends a process that is blocked in the driver
                self.timed_out = True
                continue
            if process.returncode == 0 and self.state is None:
                self.state = parse(out)


def parse(line: str) -> GpuState | None:
    """Parse a line of nvidia-smi's CSV output with `FIELDS` and the throttle reasons; None if it has another form.

    Fields that a GPU does not have are '[N/A]' or '[Not Supported]'.
    """
    values = [value.strip() for value in line.strip().split(",")]
    if len(values) != len(FIELDS) + 1 or not values[0] or values[0].startswith("["):
        return None
    numbers = [int(value) if value.isdecimal() else None for value in values[1:-1]]
    clock, max_clock, memory_clock, max_memory_clock, temperature, ecc = numbers
    try:
        bits = int(values[-1], 16)
    except ValueError:
        bits = 0
    return GpuState(
        driver=values[0],
        clock=clock,
        max_clock=max_clock,
        memory_clock=memory_clock,
        max_memory_clock=max_memory_clock,
        temperature=temperature,
        throttle_reasons=tuple(name for bit, name in REASONS.items() if bits & bit),
        ecc_uncorrected=ecc,
    )
