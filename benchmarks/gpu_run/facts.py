"""Print facts about a GPU machine that affect the other parts: driver, libraries, compiler, headers, environment.

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
    "libcuda.so.1": "driver",
    "libnvcuvid.so.1": "required for hardware JPEG decoding; without it, hw_decoder_load has no effect",
    "libnvidia-ml.so.1": "library of nvidia-smi",
}
PROGRAMS = ("gcc", "g++", "nvcc", "xz")
PREFIXES = ("TRITON", "CUDA", "TORCH", "NVIDIA", "OMP_", "LD_LIBRARY_PATH")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the facts to this JSON file")
    options = parser.parse_args()
    found = facts()
    for name, value in found.items():
        print(f"{name}: {value}")
    if options.out:
        options.out.write_text(json.dumps({"facts": found}, indent=1) + "\n")


def facts() -> dict[str, str]:
    """Return facts by name, as text."""
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
        "Python.h": f"{header}: {'found' if header.exists() else 'missing, so Triton cannot compile its launchers'}",
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
    return "found"


def output(*command: str) -> str:
    """Run a program and return its output in one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    return "; ".join((done.stdout or done.stderr).strip().splitlines())


if __name__ == "__main__":
    main()
