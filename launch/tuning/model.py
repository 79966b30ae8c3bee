"""Measure how a model runs fastest: memory format, FAT's own kernels, optimizer implementation, torch.compile mode.

One option after the other, each with the best values of those before it; a value must beat the default clearly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

import fat.kernels
from launch.config.engine import OptimizerImpl
from launch.config.optim import OptimConfig
from launch.engine.cuda_graph_capture import RECORDERS
from launch.engine.cuda_graphs import GraphedModel
from launch.engine.execution import Execution
from launch.engine.optimizers import OPTIMIZERS, Updater, create_state, parameter_groups
from launch.machine.device_peaks import synchronize
from launch.tuning.trials import Choice, choose

STEPS = 10
SLICE = 1.0  # seconds that a turn may take beside its warm-up, if fewer steps are enough for that
ROUNDS = 3
WARM_UP = {"cuda": 3, "cpu": 1}  # a mode with CUDA graphs records at its second call


@dataclass(frozen=True)
class Bench:
    """What is measured."""

    model: nn.Module
    """As it will train, on its device, neither compiled nor wrapped; afterwards as before."""
    images: Tensor
    """A micro-batch: float [B, 3, H, W], channels-last, on the model's device."""
    bf16: bool
    """Run under autocast."""
    optim: OptimConfig
    shares: int = 0
    """Ranks that share the optimizer's work (ZeRO), each with flat partitions; 0 = no ZeRO."""


def tune(
    bench: Bench,
    start: Execution,
    options: Mapping[str, Sequence[str]],
    *,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, Choice]:
    """Choose the values of some options of `Execution`, in the order given.

    Args:
        seconds: approximate duration without `compile`, which takes minutes and is always measured.
        start: values of all options at first.
        options: name -> values, the default first. An option that has one value is not measured.
        say: receives a line before each turn, and one with each result.
    """
    deadline, found, now = time.monotonic() + seconds, dict[str, Choice](), start
    waiting = [name for name, values in options.items() if len(values) > 1]
    while waiting:
        name = waiting.pop(0)
        until = math.inf if "compile" in (name, *found) else deadline
        choice = _choose(bench, now, name, options[name], until=until, say=say)
        if choice.value is None:
            found.setdefault(name, choice)
            continue
        now, found[name] = replace(now, **{name: choice.value}), choice
        if name == "compile" and now.uses_compiler and "kernels" in found:
            waiting.append("kernels")  # a compiled model may be faster without them
    return found


def _choose(
    bench: Bench, now: Execution, name: str, values: Sequence[str], *, until: float, say: Callable[[str], None]
) -> Choice:
    """Measure one option: clipping and update of the optimizer, or forward and backward of the model. The model, random
    generators and memory are afterwards as before."""
    label = name.replace("_", "-")
    if name == "optimizer_impl":
        rate = partial(_updates_per_second, bench)
        return choose(label, values, rate, rounds=ROUNDS, until=until, say=say, unit="updates/s")
    ways = {value: replace(now, **{name: value}) for value in values}  # type: ignore[arg-type]
    rounds = 1 if any(way.uses_compiler for way in ways.values()) else ROUNDS  # each turn compiles anew
    with _unchanged(bench.model), torch.random.fork_rng(devices=_generators(bench.model)):
        return choose(
            label,
            values,
            lambda value: _images_per_second(bench, ways[value]),
            rounds=rounds,
            until=until,
            say=say,
        )


def _images_per_second(bench: Bench, way: Execution) -> float:
    with fat.kernels.use(way.kernels):
        return _trained_per_second(bench, way)


def _trained_per_second(bench: Bench, way: Execution) -> float:
    model, images = way.lay_out(bench.model).train(), bench.images
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


def _updates_per_second(bench: Bench, impl: str) -> float:
    """Of clipping and update, on stand-ins for what the optimizer of a rank works on."""
    groups = parameter_groups(bench.model, weight_decay=bench.optim.weight_decay)
    for group in groups:
        owners = group["params"]
        if bench.shares:  # flat, and this rank's part of them only
            size = -(-sum(p.numel() for p in owners) // bench.shares)
            owners = [torch.empty(size, device=owners[0].device)] if owners else []
        group["params"] = [nn.Parameter(torch.zeros_like(owner)) for owner in owners]
    stand_ins = [p for group in groups for p in group["params"]]
    for p in stand_ins:
        p.grad = torch.full_like(p, 1e-3)
    kind, optim = OPTIMIZERS[bench.optim.optimizer], bench.optim
    optimizer = kind.build(groups, optim.betas, optim.eps, cast(OptimizerImpl, impl))
    create_state(optimizer, stand_ins, kind.moments)
    update = Updater(optimizer, stand_ins)
    return _rate(lambda: update(optim.clip_grad), stand_ins[0].device)


def _rate(step: Callable[[], object], device: torch.device) -> float:
    """Steps per second."""
    _seconds(step, WARM_UP[device.type], device)
    took = _seconds(step, 1, device)
    steps = min(STEPS, int(SLICE / took))
    return steps / _seconds(step, steps, device) if steps > 1 else 1 / took


def _seconds(step: Callable[[], object], steps: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return time.perf_counter() - start


def _generators(model: nn.Module) -> list[torch.device]:
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever happens in here to the model, afterwards it is as before."""
    layouts = [(p, p.data) for p in model.parameters()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    training = model.training
    try:
        yield
    finally:
        for parameter, data in layouts:
            parameter.data = data
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
        model.train(training)
        if torch.cuda.is_available():  # trials' graphs would keep their memory, which may be most of the device's
            torch._dynamo.reset()
            torch.cuda.empty_cache()
