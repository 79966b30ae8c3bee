"""What a run leaves to be chosen by measurement: the torch.compile mode, timed on this device with this model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from launch.limits import settle
from launch.world import World, share

MODES = ("off", "default", "reduce-overhead")
STEPS = 10
WARM_UP = 3  # a mode with CUDA graphs records at its second call


@dataclass(frozen=True)
class Trial:
    """How one mode did."""

    mode: str
    rate: float
    """Images per second, forward and backward; 0 if it failed."""
    failure: str = ""
    """Why it failed, in a line."""


@dataclass(frozen=True)
class Choice:
    """The fastest mode, and how it came to be chosen."""

    mode: str
    reason: str


def choose_mode(
    model: nn.Module, world: World, *, images: Callable[[], torch.Tensor], bf16: bool, whole: bool, graphs: bool
) -> Choice:
    """Which torch.compile mode trains this model fastest here. Rank 0 measures, and all ranks get its answer.

    Args:
        model: as it will train, on its device, not compiled yet; comes back as it was.
        images: makes a micro-batch, float [B, 3, H, W].
        bf16: run under autocast.
        whole: the model can be compiled at all (ZeRO 3's cannot).
        graphs: CUDA graphs may be tried: nothing keeps a graph's gradients beyond its next run.
    """
    if not whole:
        return Choice("off", "ZeRO 3 cannot be compiled whole")
    if world.device.type != "cuda":
        return Choice("off", "on CPUs compiled training is no faster (docs/performance.md)")
    modes = [mode for mode in MODES if graphs or mode != "reduce-overhead"]
    return share((lambda: best_of(measure(model, images(), modes, bf16=bf16))) if world.is_main else None, world)


def best_of(trials: Sequence[Trial]) -> Choice:
    """The fastest, with all figures as its reason; "off" where every other failed."""
    best = max(trials, key=lambda trial: trial.rate)
    shown = ", ".join(f"{t.mode} {t.failure or f'{t.rate:,.0f} images/s'}" for t in trials)
    return Choice(best.mode, f"measured: {shown}")


def measure(model: nn.Module, images: torch.Tensor, modes: Sequence[str], *, bf16: bool) -> list[Trial]:
    """Time forward and backward in each mode. Weights, statistics, generators and the mode itself are put back."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    trials = []
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        for mode in modes:
            try:
                if mode != "off":
                    model.compile(fullgraph=True, mode=None if mode == "default" else mode)
                trials.append(Trial(mode, _rate(model.train(), images, bf16)))
            except Exception as error:  # whatever a compiler stumbles over, the run can do without it
                reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
                trials.append(Trial(mode, 0.0, f"failed ({type(error).__name__}: {reason[:120]})"))
            finally:
                model._compiled_call_impl = None
                model.zero_grad(set_to_none=True)
    if images.is_cuda:  # the trials' graphs would keep their memory, which may be most of the device's
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
    model.train(training)
    return trials


def _rate(model: nn.Module, images: torch.Tensor, bf16: bool) -> float:
    device = images.device
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            settle(device)
            start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = model(images).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)
    settle(device)
    return STEPS * len(images) / (time.perf_counter() - start)
