"""How a model runs fastest here: memory format, FAT's own kernels, optimiser, torch.compile mode, one after the other.

Not the full product: each is timed with the best of those before it, and a value must beat the default clearly.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

import fat.kernels
from launch.config.engine import OptimizerImpl
from launch.engine.execution import AUGMENT_SWITCH, Execution
from launch.engine.graph_recorder import RECORDERS
from launch.engine.graphs import GraphedModel
from launch.engine.optimizers import Kind, Updater, parameter_groups
from launch.machine.device_peaks import settle
from launch.tuning.open_options import option_name
from launch.tuning.trials import Choice, Trial, best_of, decided, take_turns

STEPS = 10
SLICE = 1.0  # seconds that a turn may take beside its warm-up, if fewer steps are enough for that
ROUNDS = 3
WARM_UP = {"cuda": 3, "cpu": 1}  # a mode with CUDA graphs records at its second call
# Compiling a model takes minutes, which no clock of ours can cut short.
COMPILING_SECONDS = 600.0
CLIP = 5.0


@dataclass(frozen=True)
class Bench:
    """What is timed."""

    model: nn.Module
    """As it will train, on its device, neither compiled nor wrapped; comes back as it was."""
    images: Callable[[], Tensor]
    """Makes a micro-batch: float [B, 3, H, W], channels-last, as loaders give it."""
    bf16: bool
    """Run under autocast."""
    optimizer: Kind
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    shares: int = 0
    """Ranks that share the optimiser's work (ZeRO), each holding flat parts; 0 = plain."""


def tune(
    bench: Bench,
    start: Execution,
    open_options: Mapping[str, Sequence[str]],
    *,
    seconds: float,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Choice]:
    """Choose the values of some options of `Execution`, in the order given, within about `seconds`; those that there is
    no time for (torch.compile: of one mode), or that fail in every way, are left out.

    Args:
        start: the values of all others, and the first to be tried of these.
        open_options: name -> values, of which there are several; the first is the default.
        say: is told each turn before it begins, and what was found, line by line.
    """
    deadline, chosen, now = time.monotonic() + seconds, dict[str, Choice](), start
    stages = [(name, values) for name, values in open_options.items() if len(values) > 1]
    while stages:
        name, values = stages.pop(0)
        end = deadline + COMPILING_SECONDS if "compile" in (name, *chosen) else deadline
        if name == "optimizer_impl":
            trials, unit = time_optimizer(bench, values, end, say), "updates/s"
        else:
            ways = [replace(now, **{name: value}) for value in values]  # type: ignore[arg-type]
            trials, unit = measure(bench, ways, name, end, say), "images/s"
        choice = best_of(trials, unit)
        if not decided(trials, whole=name == "compile"):  # kept, it would never be measured again
            say(f"{option_name(name)}: left open ({choice.reason})")
            continue
        say(f"{option_name(name)}: {choice.value} ({choice.reason})")
        now, chosen[name] = replace(now, **{name: choice.value}), choice
        if name == "compile" and now.uses_compiler and "kernels" in chosen:
            stages.append(("kernels", open_options["kernels"]))  # the compiler may do better without them
    return chosen


def measure(
    bench: Bench,
    ways: Sequence[Execution],
    name: str,
    until: float = math.inf,
    say: Callable[[str], None] = lambda line: None,
) -> list[Trial]:
    """Time forward and backward in each way. Weights, statistics, generators, switches and memory are put back.

    Args:
        name: of the option in which the ways differ.
        until: no turn begins after this time (`time.monotonic`).
    """
    rounds = 1 if any(way.uses_compiler for way in ways) else ROUNDS  # each turn compiles anew
    with _unchanged(bench.model), torch.random.fork_rng(devices=_generators(bench.model)):
        trials = take_turns(
            ways,
            lambda way: _images_per_second(bench, way),
            rounds=rounds,
            until=until,
            announce=lambda way, turn: say(f"trying {option_name(name)} {getattr(way, name)}, {turn}"),
        )
        return [replace(trial, value=getattr(trial.value, name)) for trial in trials]


def time_optimizer(
    bench: Bench, forms: Sequence[str], until: float = math.inf, say: Callable[[str], None] = lambda line: None
) -> list[Trial]:
    """Time clipping and update in each form, on stand-ins for what the optimiser would work on."""
    return take_turns(
        forms,
        lambda form: _updates_per_second(bench, form),
        rounds=ROUNDS,
        until=until,
        announce=lambda form, turn: say(f"trying optimizer-impl {form}, {turn}"),
    )


def _images_per_second(bench: Bench, way: Execution) -> float:
    model, images = way.lay_out(bench.model).train(), bench.images()
    autocast = torch.autocast(images.device.type, torch.bfloat16) if bench.bf16 else nullcontext()

    def step() -> None:
        with autocast:
            loss = model(images).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    graphs = None
    try:
        way.compile_whole(model)
        if way.compile == "cudagraphs":
            graphs = GraphedModel(model, RECORDERS[images.device.type](images.device))
            dtype = torch.bfloat16 if bench.bf16 else None
            graphs.warm_up(images, dtype)
            graphs.capture(images, dtype)
        return len(images) * _rate(step, images.device)
    finally:
        if graphs is not None:
            graphs.discard()
        model._compiled_call_impl = None
        model.zero_grad(set_to_none=True)
        if images.is_cuda:
            torch.cuda.empty_cache()


def _updates_per_second(bench: Bench, form: str) -> float:
    groups = parameter_groups(bench.model, weight_decay=0.05)
    for group in groups:
        owners = group["params"]
        if bench.shares:  # flat, and this rank's part of them only
            size = -(-sum(p.numel() for p in owners) // bench.shares)
            owners = [torch.empty(size, device=owners[0].device)] if owners else []
        group["params"] = [nn.Parameter(torch.zeros_like(owner)) for owner in owners]
    stand_ins = [p for group in groups for p in group["params"]]
    for p in stand_ins:
        p.grad = torch.full_like(p, 1e-3)
    optimizer = bench.optimizer.build(groups, bench.betas, bench.eps, cast(OptimizerImpl, form))
    update = Updater(optimizer, stand_ins)
    return _rate(lambda: update(CLIP), stand_ins[0].device)


def _rate(step: Callable[[], object], device: torch.device) -> float:
    """Steps per second."""
    _seconds(step, WARM_UP[device.type], device)
    took = _seconds(step, 1, device)
    steps = min(STEPS, int(SLICE / took))
    return steps / _seconds(step, steps, device) if steps > 1 else 1 / took


def _seconds(step: Callable[[], object], steps: int, device: torch.device) -> float:
    settle(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    settle(device)
    return time.perf_counter() - start


def _generators(model: nn.Module) -> list[torch.device]:
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever happens in here to the model and the kernels' switch, afterwards they are as before."""
    layouts = [(p, p.data) for p in model.parameters()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    training, switches = model.training, {name: os.environ.get(name) for name in (fat.kernels.SWITCH, AUGMENT_SWITCH)}
    try:
        yield
    finally:
        for parameter, data in layouts:
            parameter.data = data
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
        model.train(training)
        for name, wish in switches.items():
            os.environ.pop(name, None)
            if wish is not None:
                os.environ[name] = wish
        if torch.cuda.is_available():  # trials' graphs would keep their memory, which may be most of the device's
            torch._dynamo.reset()
            torch.cuda.empty_cache()
