"""Measuring how model and loader run fastest, and choosing by it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
import types
from pathlib import Path

import pytest
import torch

import fat
from launch.config.command_line import parse
from launch.engine.execution import Execution, alternatives
from launch.engine.graphs import RECORDERS
from launch.engine.optimizers import OPTIMIZERS, parameter_groups
from launch.feed import Feed
from launch.machine.world import World
from launch.tuning import loader as input_tuning
from launch.tuning import model as tuning
from launch.tuning.model import Bench, measure, time_optimizer
from launch.tuning.trials import LATE, Trial, best_of, take_turns
from shards.errors import ShardSetError
from tests.support.recorders import ReplayOnCpu
from tests.unit.test_fat_parity import TINY

pytestmark = pytest.mark.timed

CPU = torch.device("cpu")
START = Execution(memory_format="channels-last", kernels="auto", compile="off", optimizer_form="fused")


def bench(**changes: object) -> Bench:
    made = Bench(fat.FAT(TINY), lambda: torch.randn(2, 3, 32, 32), bf16=False, optimizer=OPTIMIZERS["adamw"])
    return dataclasses.replace(made, **changes)


# -- choosing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        (((900,), (1200,), (1000,)), "b"),
        (((900,), (910,), (100,)), "a"),  # no clear winner: the default
        (((900, 90, 900), (1000, 100, 1000), (1100, 80, 850)), "b"),  # in pairs: the second round was disturbed
        (((), (100,), (120,)), "c"),  # the default failed
        (((), (), ()), "a"),
    ],
)
def test_the_fastest_by_pairs_is_taken(rates: tuple[tuple[float, ...], ...], expected: str) -> None:
    trials = [Trial(name, own, "" if own else "failed") for name, own in zip("abc", rates, strict=True)]
    assert best_of(trials).value == expected


def test_all_figures_and_failures_are_told() -> None:
    choice = best_of([Trial("off", (900.0,)), Trial("default", (1200.0,)), Trial("x", (), "failed (no room)")])
    assert choice.reason == "off 900 images/s, default 1,200 images/s, x failed (no room)"


def test_values_have_their_turns_and_failures_no_second_one() -> None:
    turns: list[str] = []

    def rate(value: str) -> float:
        turns.append(value)
        if value == "bad":
            raise RuntimeError("\n  no such thing\nat all")
        return 1.0

    found = take_turns(["good", "bad", "other"], rate, rounds=2, until=math.inf)
    assert turns == ["good", "bad", "other", "good", "other"]
    assert [trial.rates for trial in found] == [(1.0, 1.0), (), (1.0, 1.0)]
    assert found[1].failure == "failed (RuntimeError: no such thing)"
    with pytest.raises(RuntimeError):
        take_turns(["bad"], rate, rounds=1, until=math.inf, passed_on=RuntimeError)


def test_no_turn_begins_when_the_time_is_over_and_half_rounds_do_not_count() -> None:
    until = time.monotonic() + 0.25

    def rate(value: str) -> float:
        time.sleep(0.1)
        return 1.0

    found = take_turns(["a", "b"], rate, rounds=5, until=until)
    assert [len(trial.rates) for trial in found] == [1, 1]
    assert [trial.failure for trial in take_turns(["a", "b"], rate, rounds=1, until=until)] == [LATE, LATE]


# -- the model ---------------------------------------------------------------------------------------------------


def test_measuring_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAT_KERNELS", raising=False)
    monkeypatch.setitem(RECORDERS, "cpu", ReplayOnCpu)
    made = bench()
    model = made.model.eval()
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    ways = [
        START,
        dataclasses.replace(START, memory_format="contiguous"),
        dataclasses.replace(START, kernels="off"),
        dataclasses.replace(START, compile="cudagraphs"),
        dataclasses.replace(START, compile="no-such-mode"),  # type: ignore[arg-type]
    ]
    *good, bad = measure(made, ways, "compile")
    time_optimizer(made, ["fused", "foreach"])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(trial.rates[0] > 0 for trial in good)
    assert bad.failure.startswith("failed (")
    assert not model.training
    assert model._compiled_call_impl is None
    assert "forward" not in vars(model)
    assert not [name for name in os.environ if name.startswith("FAT_") and name.endswith("KERNELS")]
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.stride() == before[name][1]


def test_each_way_runs_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, str | None]] = []
    made = bench()

    def look(module: torch.nn.Module, *_: object) -> None:
        weight = next(p for p in module.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1)
        seen.append((weight.is_contiguous(memory_format=torch.channels_last), os.environ.get("FAT_KERNELS")))

    made.model.register_forward_hook(look)
    monkeypatch.setenv("FAT_KERNELS", "auto")
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    measure(made, [START, dataclasses.replace(START, memory_format="contiguous", kernels="off")], "memory_format")
    assert set(seen) == {(True, "auto"), (False, "off")}
    assert seen.index((True, "auto")) < seen.index((False, "off"))


def test_a_slow_way_is_not_taken_and_time_is_kept() -> None:
    """Weights in another format than the first are made to cost time."""
    made, slow = bench(), 0.3

    def delay(module: torch.nn.Module, *_: object) -> None:
        weight = next(p for p in module.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1)
        if weight.is_contiguous(memory_format=torch.channels_last):
            time.sleep(slow)

    made.model.register_forward_hook(delay)
    told: list[str] = []
    options = {"memory_format": ("channels-last", "contiguous"), "kernels": ("auto",)}
    found = tuning.tune(made, START, options, seconds=60, say=told.append)
    assert found.keys() == {"memory_format"}, "one value is no choice"
    assert found["memory_format"].value == "contiguous"
    assert told[:2] == [f"trying memory-format {way}, round 1 of 3" for way in ("channels-last", "contiguous")]
    assert told[6:] == [f"memory-format: contiguous ({found['memory_format'].reason})"]
    assert tuning.tune(made, START, options, seconds=-1) == {}


def test_modes_without_a_compiler_have_all_their_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs are the default on GPUs, and capturing them takes no longer than a few steps."""
    monkeypatch.setattr(tuning, "_images_per_second", lambda _, way: 2.0 if way.compile == "cudagraphs" else 1.0)
    modes = ("off", "cudagraphs")
    trials = measure(bench(), [dataclasses.replace(START, compile=mode) for mode in modes], "compile")
    assert [len(trial.rates) for trial in trials] == [3, 3]
    compiled = measure(bench(), [dataclasses.replace(START, compile=mode) for mode in (*modes, "default")], "compile")
    assert [len(trial.rates) for trial in compiled] == [1, 1, 1]


@pytest.mark.parametrize(("fastest", "again"), [("cudagraphs", False), ("default", True)])
def test_kernels_are_tried_again_only_for_a_compiled_model(
    monkeypatch: pytest.MonkeyPatch, fastest: str, again: bool
) -> None:
    monkeypatch.setattr(tuning, "_images_per_second", lambda _, way: 2.0 if way.compile == fastest else 1.0)
    told: list[str] = []
    options = {"kernels": ("auto", "off"), "compile": ("off", "cudagraphs", "default")}
    found = tuning.tune(bench(), START, options, seconds=60, say=told.append)
    assert found["compile"].value == fastest
    assert sum(line.startswith("kernels: ") for line in told) == 1 + again


def late(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the time be over when so many turns have begun."""
    from launch.tuning.model import trials

    turns = itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: 0.0 if next(turns) < after else math.inf)
    monkeypatch.setattr(trials, "time", clock)


@pytest.mark.parametrize(
    ("name", "values", "turns", "kept"),
    [
        ("memory_format", ("channels-last", "contiguous"), 1, False),  # the default alone is no choice
        ("memory_format", ("channels-last", "contiguous"), 2, True),
        ("optimizer_form", ("fused", "foreach"), 1, False),
        ("compile", ("off", "no-such-mode", "nor-this"), 2, False),  # the mode without a turn might be the best
        ("compile", ("off", "no-such-mode", "nor-this"), 3, True),
    ],
)
def test_what_there_is_no_time_for_stays_open(
    name: str, values: tuple[str, ...], turns: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    late(turns, monkeypatch)
    if name == "memory_format":  # one sample of each would be a race
        monkeypatch.setattr(tuning, "_images_per_second", lambda *_: 1.0)
    told: list[str] = []
    found = tuning.tune(bench(), START, {name: values}, seconds=60, say=told.append)
    assert (name in found) is kept
    assert told[-1].startswith(f"{name.replace('_', '-')}: {values[0] if kept else 'left open'} (")


@pytest.mark.parametrize("wish", ["auto", "off"])
def test_switching_the_model_s_kernels_off_leaves_augmentation_s_alone(
    monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    from pipeline.augment import kernels

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FAT_KERNELS", wish)
    monkeypatch.setenv("FAT_AUGMENT_KERNELS", wish)  # so that it goes with the test
    del os.environ["FAT_AUGMENT_KERNELS"]
    assert kernels.available(CPU) is (wish == "auto")
    dataclasses.replace(START, kernels="off").lay_out(torch.nn.Identity())
    assert os.environ["FAT_KERNELS"] == "off"
    assert kernels.available(CPU) is (wish == "auto")


@pytest.mark.parametrize("shares", [0, 2])
def test_the_optimiser_is_timed_on_what_it_would_work_on(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench(shares=shares)
    built: list[list[int]] = []
    kind = OPTIMIZERS["adamw"]

    def build(groups: list[dict[str, object]], *args: object) -> torch.optim.Optimizer:
        built.append([p.numel() for group in groups for p in group["params"]])  # type: ignore[attr-defined]
        return kind.build(groups, *args)  # type: ignore[arg-type]

    made = dataclasses.replace(made, optimizer=dataclasses.replace(kind, build=build))
    found = time_optimizer(made, ["fused", "foreach"])
    assert all(trial.rates for trial in found)
    groups = [[p.numel() for p in group["params"]] for group in parameter_groups(made.model, 0.05)]
    whole = [size for group in groups for size in group]
    assert built[0] == (whole if not shares else [-(-sum(group) // shares) for group in groups])


@pytest.mark.parametrize(
    ("device", "training", "formats", "modes"),
    [
        ("cpu", {"zero": 0, "accumulation": 1, "ranks": 1}, 2, ("off",)),
        ("cpu", {"zero": 1, "accumulation": 1, "ranks": 1}, 1, ("off",)),
        ("cuda", {"zero": 0, "accumulation": 1, "ranks": 1}, 2, ("cudagraphs", "off", "default", "reduce-overhead")),
        ("cuda", {"zero": 0, "accumulation": 1, "ranks": 2}, 2, ("cudagraphs", "off", "default")),
        ("cuda", {"zero": 1, "accumulation": 2, "ranks": 1}, 1, ("cudagraphs", "off", "default")),
        ("cuda", {"zero": 3, "accumulation": 1, "ranks": 1}, 1, ("off",)),
    ],
)
def test_only_what_can_be_is_tried(device: str, training: dict[str, int], formats: int, modes: tuple[str, ...]) -> None:
    found = alternatives(torch.device(device), **training)
    assert len(found["memory_format"]) == formats
    assert found["compile"] == modes
    assert found["optimizer_form"] == ("fused", "foreach")


# -- the loader --------------------------------------------------------------------------------------------------


def feed_of(data: Path, *options: str) -> Feed:
    small = ("--size", "32", "--global-batch", "16", "--epochs", "1", "--warmup-epochs", "0", "--augment", "light")
    return Feed.of(parse(["--data", str(data), *small, *options]), World(0, 1, 0, 1, CPU, cores=2))


@pytest.mark.slow
def test_the_loader_s_options_are_tried_on_the_real_set_and_the_slow_ones_left(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding is made to take time that more threads share."""
    from pipeline.decode.dali import DaliDecoder

    real = DaliDecoder._inputs

    def slowed(decoder: DaliDecoder, job: object) -> object:
        time.sleep(0.2 / decoder.threads)
        return real(decoder, job)  # type: ignore[arg-type]

    monkeypatch.setattr(DaliDecoder, "_inputs", slowed)
    told: list[str] = []
    begun = time.monotonic()
    found = input_tuning.tune(
        feed_of(digits, "--read-ahead", "3"),
        {"read_ahead": 3, "read_threads": 32},
        dtype=torch.float32,
        seconds=15,
        say=told.append,
    )
    assert time.monotonic() - begun < 60
    assert found.keys() == {"decode_threads", "decode_ahead"}, "what is given is not tried"
    assert found["decode_threads"].value == 4
    assert told[0] == "trying decode-threads 2, round 1 of 2"
    assert next(line for line in told if not line.startswith("trying")).startswith("decode-threads: 4 (2 ")


def test_a_loader_s_option_that_there_is_no_time_for_stays_open(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late(1, monkeypatch)
    assert input_tuning.tune(feed_of(digits), {}, dtype=torch.float32, seconds=0.5) == {}


def test_a_damaged_set_ends_the_measuring(digits: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(digits, tmp_path / "set"))
    feed = feed_of(copy)
    shard = feed.dataset.split("train").shards[0]
    content = bytearray((copy / shard.name).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)
    (copy / shard.name).write_bytes(content)
    with pytest.raises(ShardSetError, match=shard.name):
        input_tuning.tune(feed, {}, dtype=torch.float32, seconds=30)
