"""What a benchmark's figures mean: ratios, the one-line verdict, the table."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

from launch.roofline import Roofline

# Less waiting than this is noise: both together then count as fast as the model alone.
SATURATED = 0.98
# Training cannot be faster than the model alone; by more than this, the device has changed its speed in between.
UNSTEADY = 1.03
# A host that takes this share of a step's time to hand it over is what the device waits for.
HOST_BOUND = 0.9
# A stage that is not this much faster than the whole loader is what holds it up.
SLACK = 1.15

TRY = {
    "reading": "try faster storage or a local copy, or more --read-threads and a larger --read-ahead",
    "decode": "try more --decode-threads (or cores), --loader ffcv, or smaller images: pipeline shard --short-side 256",
    "decode on the GPU": "try smaller images: pipeline shard --short-side 256",
    "augmentation": "try more cores per rank, or --augment light to see what it costs",
    "contention": "alone the loader is fast enough: give the rank more cores, or fewer --decode-threads",
}


@dataclass(frozen=True)
class Phase:
    """One of the three measurements."""

    rate: float
    """Images per second."""
    cpu: float
    """CPU seconds per image, of all threads of this process, until the last step was handed over."""
    waiting: float
    """Fraction of the time in which the device (a CPU: the host) had no work because the next batch was not ready."""
    host: float = 0.0
    """On a GPU: seconds that the host takes to hand over a step, lower quartile; 0 where nothing is trained."""
    times: tuple[float, ...] = ()
    """On a GPU: milliseconds of each step there, round after round."""


@dataclass(frozen=True)
class Figures:
    """What `pipeline bench` found."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    reading: float
    """Images per second, reading alone (from the page cache, where the set fits into it)."""
    decoding: float
    """Images per second, reading and decoding without augmentation."""
    loader: Phase
    """The whole loader alone."""
    model: Phase
    """The training step alone, on batches that are on the device already."""
    both: Phase
    """Training."""
    predicted: float
    """Images per second that both should reach, from each alone."""
    roofline: Roofline
    """What the device allows, the model's blocks perfectly fused."""
    memory: dict[str, int]
    """Bytes of GPU memory; empty on a CPU."""

    @property
    def both_of_model(self) -> float:
        """1 = the device never waits."""
        return self.both.rate / self.model.rate

    @property
    def model_of_roofline(self) -> float:
        """How much of the device the model itself uses."""
        return self.model.rate / self.roofline.rate

    @property
    def mfu(self) -> float:
        """Model FLOP utilization of the model alone."""
        return self.roofline.mfu(self.model.rate)

    @property
    def taking_turns(self) -> float:
        """Images per second if a GPU worked on batches and training steps one after the other, never on both."""
        return 1 / (1 / self.model.rate + 1 / self.loader.rate)

    @property
    def host_share(self) -> float:
        """Fraction of a training step's time that the host takes to hand it over."""
        return self.both.host * self.both.rate / self.settings["batch"]

    @property
    def both_of_predicted(self) -> float:
        return self.both.rate / self.predicted

    @property
    def verdict(self) -> str:
        """One line: what limits training here, by how much, and what to try."""
        ratio, waiting = self.both_of_model, self.both.waiting
        used = f"the model uses {self.model_of_roofline:.0%} of what the device allows"
        if self.memory and ratio > UNSTEADY:
            return (
                f"unsteady: training was faster than the model alone (both/model {ratio:.2f}), which cannot be: the "
                "device has changed its speed, or does other work; see the times of the steps (--json), and use more "
                "--steps"
            )
        if ratio >= SATURATED:
            return f"model-bound: the device never waits (both/model {ratio:.2f}); {used}"
        stage = bottleneck(self)
        # Loader and model contend for the device, where there are cores enough and they are no slower than by turns.
        idle = self.both.cpu * self.both.rate < self.machine["cores"] / 2
        on_device = self.memory and idle and self.both.rate >= SATURATED * self.taking_turns
        if waiting > 1 - SATURATED and not (stage == "contention" and on_device):
            return (
                f"input-bound: {stage}, {waiting:.0%} of the time spent waiting (both/model {ratio:.2f}); {TRY[stage]}"
            )
        if self.memory and self.host_share >= HOST_BOUND:
            return (
                f"host-bound: batches are ready, but beside the loader the host starts kernels too slowly "
                f"(both/model {ratio:.2f}); try fewer --decode-threads, and --compile cudagraphs if it is off"
            )
        if self.memory:
            return (
                f"device-bound: the loader's work on the GPU takes {1 - ratio:.0%} of the device "
                f"(both/model {ratio:.2f}); smaller images (pipeline shard --short-side 256) and --augment light take "
                f"less; {used}"
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
    """The stage that holds the loader up: the first that alone is hardly faster than the whole."""
    if figures.loader.rate > SLACK * figures.model.rate:
        return "contention"
    if figures.reading <= SLACK * figures.loader.rate:
        return "reading"
    if figures.decoding <= SLACK * figures.loader.rate:
        return "decode on the GPU" if "dali on the GPU" in figures.settings.get("loader", "") else "decode"
    return "augmentation"


def table(figures: Figures) -> str:
    """The figures as text."""
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
        ("roofline of the model", f.roofline.rate, "perfectly fused blocks"),
    )
    peaks = f.roofline.peaks
    peak = f"{peaks.arithmetic / 1e12:,.3g} TFLOP/s {'as stated by the maker' if peaks.stated else 'measured'}"
    moved = f.model.rate * f.roofline.bytes / 1e9
    lines = [
        f"{f.machine['device']}, {f.machine['cores']} cores, load {f.machine['load']}",
        ", ".join(f"{name} {value}" for name, value in f.settings.items()),
        *(f"{name:24s}{rate:12,.1f} images/s   {note}".rstrip() for name, rate, note in speeds),
        f"both/model {f.both_of_model:.3f}   model/roofline {f.model_of_roofline:.3f}   both/predicted "
        f"{f.both_of_predicted:.3f}",
        f"MFU {f.mfu:.1%} of {peak}; {moved:,.1f} GB/s of {peaks.bandwidth / 1e9:,.1f} GB/s copied",
    ]
    if f.memory:
        peak_gib, used_gib, total_gib = (f.memory[name] / 2**30 for name in ("torch_peak", "in_use", "total"))
        lines.append(f"GPU memory: {peak_gib:.1f} GiB by torch at most, {used_gib:.1f} of {total_gib:.1f} GiB in use")
    return "\n".join([*lines, f.verdict])


def _step(phase: Phase) -> str:
    """Of a phase on a GPU: its steps' times there, and what each takes the host."""
    if not phase.times:
        return ""
    times = phase.times
    spread = f"{statistics.median(times):.1f} ms ({min(times):.1f} to {max(times):.1f})"
    return f"; a step: {spread}, handed over by the host in {1e3 * phase.host:.1f} ms"
