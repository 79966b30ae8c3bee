"""Results of `pipeline bench`: the ratios among them, the one-line verdict, and the table."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

from launch.monitor.roofline import Roofline

# If training reaches this fraction of the throughput of the model alone, the difference is measurement noise.
SATURATED = 0.98
# Training cannot be faster than the model alone: a ratio above this one means that the device changed its clock.
UNSTEADY = 1.03
# If launching kernels takes at least this fraction of a step's time, the device waits for the host.
HOST_BOUND = 0.9
# A stage whose rate is at most this many times the whole loader's rate is the bottleneck.
SLACK = 1.15

# Remedy for each bottleneck.
TRY = {
    "reading": "try faster storage or a local copy, or more --read-threads and a larger --read-ahead",
    "decode": "try more --decode-threads (or cores), --loader ffcv, or smaller images: pipeline shard --short-side 256",
    "decode on the GPU": "try pipeline tune, which varies the decoders, or pipeline shard --short-side 256",
    "augmentation": "try more cores per rank; --augment light shows how much augmentation costs",
    "contention": "the loader alone is fast enough: try more cores per rank, or fewer --decode-threads",
}


@dataclass(frozen=True)
class Phase:
    """Result of one measurement: loader alone, model alone, or both."""

    rate: float
    """Images per second."""
    cpu: float
    """CPU seconds per image of all threads of this process, up to the launch of the last step."""
    waiting: float
    """Fraction of the time in which the device (on a CPU, the host) was idle because the next batch was not ready."""
    host: float = 0.0
    """On a GPU: seconds that the host takes to launch a step (lower quartile); 0 for the loader alone."""
    times: tuple[float, ...] = ()
    """On a GPU: duration of each step on the device, in milliseconds, over all rounds."""


@dataclass(frozen=True)
class PathCost:
    """Measurement of one decode path (`launch.bench.decode_paths`)."""

    rate: float
    """Images per second."""
    cpu: float
    """CPU seconds per image, of all threads; nothing runs in a feed process."""


@dataclass(frozen=True)
class Figures:
    """All results of one `pipeline bench`."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    reading: float
    """Images per second of reading alone (from the page cache if the set fits into it)."""
    decoding: float
    """Images per second of reading and decoding without augmentation."""
    decode_paths: dict[str, PathCost]
    """Rate and CPU time of each decode path, without augmentation, by name."""
    loader: Phase
    """Measurements of the complete loader, without training."""
    model: Phase
    """Measurements of the training step alone, on batches that are already on the device."""
    both: Phase
    """Measurements of training, that is, of loader and training step together."""
    predicted: float
    """Images per second of both together, predicted from loader alone and model alone."""
    roofline: Roofline
    """Upper bound on the model's throughput on this device if its blocks were perfectly fused."""
    memory: dict[str, int]
    """Bytes of GPU memory by name: "torch_peak", "in_use" and "total"; empty on a CPU."""
    read: float = 1.0
    """Fraction of the images that the loader reads; the others are in the memory cache."""

    @property
    def both_of_model(self) -> float:
        """Training throughput relative to the model alone; 1: the device never waits."""
        return self.both.rate / self.model.rate

    @property
    def model_of_roofline(self) -> float:
        """Throughput of the model alone relative to the roofline."""
        return self.model.rate / self.roofline.rate

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization of the model alone."""
        return self.roofline.mfu(self.model.rate)

    @property
    def taking_turns(self) -> float:
        """Images per second if a GPU alternated between preparing batches and training, without overlap."""
        return 1 / (1 / self.model.rate + 1 / self.loader.rate)

    @property
    def host_fraction(self) -> float:
        """Fraction of a training step's time that the host spends launching the step."""
        return self.both.host * self.both.rate / self.settings["batch"]

    @property
    def both_of_predicted(self) -> float:
        """Training throughput relative to the prediction."""
        return self.both.rate / self.predicted

    @property
    def verdict(self) -> str:
        """One line that says what limits training, by how much, and what to try."""
        ratio, waiting = self.both_of_model, self.both.waiting
        used = f"the model reaches {self.model_of_roofline:.0%} of its roofline on this device"
        if self.memory and ratio > UNSTEADY:
            return (
                f"unsteady: training was faster than the model alone (both/model {ratio:.2f}), so the device changed "
                "its clock or does other work; compare the step times in the --json file, and use more --steps"
            )
        if ratio >= SATURATED:
            return f"model-bound: the device never waits (both/model {ratio:.2f}); {used}"
        stage = bottleneck(self)
        # If cores are idle and training is as fast as without overlap, loader and model contend for the device only.
        idle = self.both.cpu * self.both.rate < self.machine["cores"] / 2
        on_device = self.memory and idle and self.both.rate >= SATURATED * self.taking_turns
        if waiting > 1 - SATURATED and not (stage == "contention" and on_device):
            return (
                f"input-bound: {stage}, {waiting:.0%} of the time spent waiting (both/model {ratio:.2f}); {TRY[stage]}"
            )
        if self.memory and self.host_fraction >= HOST_BOUND:
            return (
                f"host-bound: batches are ready, but while the loader runs the host launches kernels too slowly "
                f"(both/model {ratio:.2f}); try fewer --decode-threads, and --compile cudagraphs if it is off"
            )
        if self.memory:
            return (
                f"device-bound: the loader's work on the GPU takes {1 - ratio:.0%} of the device "
                f"(both/model {ratio:.2f}); try smaller images (pipeline shard --short-side 256) or --augment light; "
                f"{used}"
            )
        return (
            f"model-bound: batches are always ready; loader and model share {self.machine['cores']} cores "
            f"(both/model {ratio:.2f}, {self.both_of_predicted:.2f} of what their CPU times predict); {used}"
        )

    def to_dict(self) -> dict[str, Any]:
        names = ("both_of_model", "model_of_roofline", "both_of_predicted", "mfu")
        ratios = {name: getattr(self, name) for name in names}
        return {"verdict": self.verdict, **ratios, **dataclasses.asdict(self)}


def bottleneck(figures: Figures) -> str:
    """Return the loader's bottleneck: the first stage that alone is hardly faster than the whole loader."""
    if figures.loader.rate > SLACK * figures.model.rate:
        return "contention"
    if figures.reading <= SLACK * figures.loader.rate * figures.read:
        return "reading"
    if figures.decoding <= SLACK * figures.loader.rate:
        return "decode on the GPU" if "dali on the GPU" in figures.settings.get("loader", "") else "decode"
    return "augmentation"


def table(figures: Figures) -> str:
    """Format the results as text."""
    f = figures
    speeds = (
        ("reading", f.reading, ""),
        ("+ decode, crop, flip", f.decoding, ""),
        ("loader alone", f.loader.rate, f"{1e3 * f.loader.cpu:.2f} ms of CPU per image"),
        ("model alone", f.model.rate, f"{1e3 * f.model.cpu:.2f} ms of CPU per image{_step(f.model)}"),
        ("both, predicted", f.predicted, ""),
        (
            "both",
            f.both.rate,
            f"waiting for data {f.both.waiting:.1%}, {1e3 * f.both.cpu:.2f} ms of CPU per image{_step(f.both)}",
        ),
        ("roofline of the model", f.roofline.rate, "if all blocks were perfectly fused"),
    )
    peaks = f.roofline.peaks
    peak = f"{peaks.arithmetic / 1e12:,.3g} TFLOP/s {'by the data sheet' if peaks.stated else 'measured'}"
    moved = f.model.rate * f.roofline.bytes / 1e9
    paths = (
        (f"decode: {name}", cost.rate, f"{1e3 * cost.cpu:.2f} ms of CPU per image, reading included")
        for name, cost in f.decode_paths.items()
    )
    lines = [
        f"{f.machine['device']}, {f.machine['cores']} cores, load {f.machine['load']}",
        ", ".join(f"{name} {value}" for name, value in f.settings.items()),
        *(f"{name:24s}{rate:12,.1f} images/s   {note}".rstrip() for name, rate, note in (*speeds, *paths)),
        f"both/model {f.both_of_model:.3f}   model/roofline {f.model_of_roofline:.3f}   both/predicted "
        f"{f.both_of_predicted:.3f}",
        f"MFU {f.mfu:.1%} of {peak}; {moved:,.1f} GB/s of {peaks.bandwidth / 1e9:,.1f} GB/s (measured copy)",
    ]
    if f.memory:
        peak_gib, used_gib, total_gib = (f.memory[name] / 2**30 for name in ("torch_peak", "in_use", "total"))
        lines.append(f"GPU memory: torch peak {peak_gib:.1f} GiB, {used_gib:.1f} of {total_gib:.1f} GiB in use")
    return "\n".join([*lines, f.verdict])


def _step(phase: Phase) -> str:
    """Format a phase's step times on the GPU, and the time to launch a step; empty on a CPU."""
    if not phase.times:
        return ""
    times = phase.times
    spread = f"{statistics.median(times):.1f} ms ({min(times):.1f} to {max(times):.1f})"
    return f"; step {spread}, launched by the host in {1e3 * phase.host:.1f} ms"
