"""Compute how many CPU cores a GPU needs for each variant and decode path, and print the table of docs/performance.md.

    python benchmarks/cores_per_gpu.py

Nothing is measured: all figures are read from benchmarks/results/. For a path that costs c CPU seconds per image, and a
variant that trains r images/s on the GPU, the cores are r * c + 1. The 1 is the thread that launches the training step.

- rates: the fastest training step of each variant on the GPU (gpu.json: CUDA graphs, resident batches)
- decoding on the GPU: CPU time of DALI's operators on that machine's host (gpu.json, part `decode`)
- decoding on the CPU: decode_paths.json, from another machine
- reading, hashes, random draws and launches of the augmentation: interpreter_lock.json, added to all paths of DALI
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
GPU = "NVIDIA H200"
VARIANTS = ("b0", "b1", "b2", "b3")
LAUNCHING_CORES = 1.0
DALI_CALLS = "external_source and DALI's run"  # part of the decoding costs
DALI_DEFAULT_LOAD = 0.65  # DALI 2.4


@dataclass(frozen=True)
class HostCost:
    """Host cost of one decode path."""

    name: str
    cost: float
    """CPU seconds per image."""
    measured: float | None
    """Images/s that the decoder reached on the GPU's machine; None: not measured there."""

    def cores(self, rate: float) -> float:
        """Return the CPU cores that a GPU needs which trains `rate` images/s."""
        return rate * self.cost + LAUNCHING_CORES


def training_rates(gpu: Mapping[str, Any]) -> dict[str, float]:
    """Return the images/s of each variant's training step on the GPU, the fastest that was measured."""
    found = {}
    for variant in VARIANTS:
        steps = [row["images/s"] for row in gpu[f"step-{variant}"]["figures"]["results"] if row["way"] == "graph"]
        bench = gpu.get(f"bench-{variant}")
        found[variant] = max([*steps, *([bench["figures"]["model"]["rate"]] if bench else [])])
    return found


def decode_paths(gpu: Mapping[str, Any], lock: Mapping[str, Any], paths: Mapping[str, Any]) -> list[HostCost]:
    """Return the host cost of each decode path."""
    parts = lock["cpu_ms_per_batch"]
    preparation = sum(ms for name, ms in parts.items() if name not in ("batch", DALI_CALLS)) / parts["batch"] / 1e3
    decoders = gpu["decode"]["figures"]["medians"]
    engine, cuda = (decoders[f"slice, hardware {load}"] for load in (1, 0))
    divided = DALI_DEFAULT_LOAD * engine["cpu"] + (1 - DALI_DEFAULT_LOAD) * cuda["cpu"]

    def on_gpu(load: str, cost: float, rate: float | None) -> HostCost:
        return HostCost(f"window, `--hw-decoder-load {load}", preparation + cost, rate)

    most = decoders["slice, hardware 0.9"]
    cpu = {name: each["cpu"] for name, each in paths["medians"].items()}
    return [
        on_gpu("1`: JPEG engine", engine["cpu"], engine["rate"]),
        on_gpu("0.9`", most["cpu"], most["rate"]),
        on_gpu(f"{DALI_DEFAULT_LOAD}`, DALI's default: interpolated", divided, None),
        on_gpu("0`: CUDA decoder", cuda["cpu"], cuda["rate"]),
        HostCost("window, `--cpu-decode 1`", preparation + cpu["decode only, window"], None),
        HostCost("whole image, `--cpu-decode 1`", preparation + cpu["decode only, whole"], None),
        HostCost("`--loader ffcv`: decoding and resizing on the CPU", cpu["whole, FFCV"], None),
    ]


def table(rates: Mapping[str, float], paths: list[HostCost]) -> str:
    """Return the table in Markdown."""
    names = [f"{variant.upper()}, {rate:,.0f} images/s" for variant, rate in rates.items()]
    lines = [["decode path", "ms of CPU per image", "images/s of the decoder", *names]]
    for path in paths:
        measured = "-" if path.measured is None else f"{path.measured:,.0f}"
        cores = [f"{path.cores(rate):.1f}" for rate in rates.values()]
        lines.append([path.name, f"{1e3 * path.cost:.2f}", measured, *cores])
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "-|" * len(lines[0]), *rows[1:]])


def table_of_results(results: Path = RESULTS) -> str:
    """Return the table for the stored results."""
    gpu = _read(results / "gpu.json")["devices"][GPU]
    lock, paths = _read(results / "interpreter_lock.json"), _read(results / "decode_paths.json")
    return table(training_rates(gpu), decode_paths(gpu, lock, paths))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    print(table_of_results())
