"""Provenance of a result: library versions, devices and the state of the source tree."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

LIBRARIES = ("torch", "nvidia-dali-cuda120", "accelerate", "deepspeed", "numpy")


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the libraries that affect results; None: not installed."""
    return {"python": platform.python_version(), **{name: installed_version(name) for name in LIBRARIES}}


def libraries() -> str:
    """Return `versions` as one line."""
    return ", ".join(f"{name} {found}" if found else f"no {name}" for name, found in versions().items())


def cpu_name() -> str:
    """Return the model name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def git_state() -> str | None:
    """Return `git describe` of the source tree; None outside of a git checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def installed_version(library: str) -> str | None:
    """Return a library's version from its package metadata; None: not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
