"""A wall clock for each simulated host, which can be stepped without touching the clock of this machine."""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.c")


def build_library(folder: Path) -> Path:
    """Compile clock.c into `folder`, and return the library for LD_PRELOAD."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("error: the soak needs a C compiler for its clock steps; on Debian: apt-get install gcc")
    library = folder / "clock.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    subprocess.run(command, check=True, timeout=120)
    return library


class Clock:
    """The wall clock of a host: that of this machine plus an offset.

    Args:
        file: file that holds the offset; it is created.
    """

    def __init__(self, file: Path) -> None:
        file.write_bytes(bytes(8))
        self.file = file
        with file.open("r+b") as opened:
            self._offset = mmap.mmap(opened.fileno(), 8)

    @property
    def offset(self) -> float:
        """Seconds by which this clock is ahead."""
        return float(struct.unpack("<q", self._offset[:])[0] / 1e9)

    def step(self, seconds: float) -> None:
        """Step the clock of all processes of the host, now."""
        self.set(self.offset + seconds)

    def set(self, offset: float) -> None:
        self._offset[:] = struct.pack("<q", round(offset * 1e9))

    def environment(self, library: Path) -> dict[str, str]:
        """Return the environment variables of processes that use this clock."""
        return {"LD_PRELOAD": str(library), "SOAK_CLOCK": str(self.file)}
