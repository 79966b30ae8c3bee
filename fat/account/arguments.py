"""Arguments of the modules that are run with `python -m`."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with --help and --version for `python -m MODULE`."""
    found = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    try:
        project = f"fat-pipeline {version('fat-pipeline')}"
    except PackageNotFoundError:  # a source checkout, or a copy of this folder
        project = "fat, not installed as a package"
    versions = f"{project} (torch {torch.__version__}, Python {platform.python_version()})"
    found.add_argument("--version", action="version", version=versions)
    return found


def number(kind: type[float], low: float, high: float) -> Callable[[str], float]:
    """Return an argparse type for numbers of type int or float from `low` to `high`."""
    name = "an integer" if kind is int else "a number"

    def parse(text: str) -> float:
        try:
            if low <= (value := kind(text)) <= high:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text[:60]}: expected {name} from {low:,} to {high:,}")

    return parse
