"""Launch Triton kernels without a GPU: Triton's launch code compiles each kernel for a given compute capability, but
does not run it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock


class OfflineDriver:
    """Replacement for Triton's CUDA driver, which also stores what was launched."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.kernels: dict[str, Any] = {}
        self.launched: list[str] = []
        self.utils: Any = None
        """Loader of machine code; None, since nothing is loaded."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def registers(self, name: str, folder: Path) -> tuple[int, int]:
        """Return the registers per thread and the bytes of spilled registers of a kernel."""
        import triton

        binary = folder / f"{name}.cubin"
        binary.write_bytes(self.kernels[name].asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found, usage
        return int(found[1]), int(found[2])


@contextmanager
def launches_only_compile(capability: int) -> Iterator[OfflineDriver]:
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    offline = OfflineDriver(capability)
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        assert kernel is not None
        name = self.fn.__name__
        offline.kernels[name if name not in offline.kernels else f"{name}-{len(offline.kernels)}"] = kernel
        offline.launched.append(name)

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(driver, "_active", offline):
        yield offline
