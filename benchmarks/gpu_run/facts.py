"""Facts about a GPU machine on which other parts depend: driver, decoder library, compiler, headers, environment.

python benchmarks/gpu_run/facts.py [--out FILE.json]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import psutil

LIBRARIES = {
    "libcuda.so.1": "the driver",
    "libnvcuvid.so.1": "without it JPEGs cannot be decoded in hardware, and hw_decoder_load has no effect",
    "libnvidia-ml.so.1": "nvidia-smi's library",
}
PROGRAMS = ("gcc", "g++", "nvcc", "xz")
PREFIXES = ("TRITON", "CUDA", "TORCH", "NVIDIA", "OMP_", "LD_LIBRARY_PATH")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the facts as JSON")
    options = parser.parse_args()
    found = facts()
    for name, value in found.items():
        print(f"{name}: {value}")
    if options.out:
        options.out.write_text(json.dumps({"facts": found}, indent=1) + "\n")


def facts() -> dict[str, str]:
    """Facts by name, for people."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    memory = psutil.virtual_memory()
    return {
        "GPUs": output("nvidia-smi", "-L"),
        "GPU state": output(
            "nvidia-smi",
            "--query-gpu=driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.mem",
            "--format=csv,noheader",
        ),
        **{name: f"{presence(name)} ({meaning})" for name, meaning in LIBRARIES.items()},
        **{name: shutil.which(name) or "not found" for name in PROGRAMS},
        "Python": f"{platform.python_version()}, {sys.executable}",
        "Python.h": f"{header}: {'there' if header.exists() else 'missing, so Triton cannot compile its launchers'}",
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "memory": f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB available",
        "/dev/shm": f"{psutil.disk_usage('/dev/shm').free / 2**30:.1f} GiB free",
        "environment": ", ".join(
            f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)
        ),
    }


def presence(library: str) -> str:
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return f"missing: {error}"
    return "there"


def output(*command: str) -> str:
    """What a program prints, in a line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no answer: {error}"
    return "; ".join((done.stdout or done.stderr).strip().splitlines())


if __name__ == "__main__":
    main()
