"""`pipeline tune`: the fastest value of each open option is measured and written as a recipe file."""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fat
from launch.cli import main as pipeline
from launch.config.command_line import parse
from launch.config.engine import CompileConfig, ParallelConfig
from launch.config.optim import OptimConfig
from launch.config.recipe import Recipe
from launch.engine.execution import Execution, alternatives
from launch.engine.optimizers import OPTIMIZERS
from launch.tuning.fragment import FIRST_LINE, check_fragment_output, fragment
from launch.tuning.model import Bench
from launch.tuning.model import tune as tune_model
from launch.tuning.trials import Choice, Trial, choose, fastest, take_turns
from shards.errors import ShardSetError, UserError

SMALL = ("--size", "32", "--global-batch", "4", "--augment", "light", "--epochs", "1", "--warmup-epochs", "0")
CANARY = "hunter2"
CPU = torch.device("cpu")


def ignore(_: str) -> None:
    return None


# -- trials ----


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"a": (10, 10), "b": (12, 12), "c": (11, 11)}, "b"),
        ({"a": (10, 10), "b": (10.1, 10.1)}, "a"),  # within the margin
        ({"a": (10, 20), "b": (12, 15), "c": (11, 22)}, "c"),  # by ratios within a round
        ({"a": (), "b": (3, 3), "c": (4, 4)}, "c"),  # the default has failed
        ({"a": (10, 10), "b": ()}, "a"),
    ],
)
def test_the_fastest_beats_the_default_clearly_in_most_rounds(
    rates: dict[str, tuple[float, ...]], expected: str
) -> None:
    best = fastest([Trial(value, measured) for value, measured in rates.items()])
    assert best is not None
    assert best.value == expected


def test_without_a_measurement_nothing_is_chosen() -> None:
    assert fastest([Trial("a", (), "failed"), Trial("b")]) is None


def test_values_take_turns_and_a_failure_ends_that_value_alone() -> None:
    turns: list[str] = []

    def rate(value: str) -> float:
        turns.append(value)
        if value == "b":
            raise MemoryError("none left")
        return 1.0

    trials = take_turns("abc", rate, rounds=2)
    assert turns == ["a", "b", "c", "a", "c"]
    assert [trial.rates for trial in trials] == [(1.0, 1.0), (), (1.0, 1.0)]
    assert trials[1].failure == "failed (MemoryError: none left)"


def test_no_round_begins_when_time_is_up() -> None:
    trials = take_turns("ab", lambda _: pytest.fail("measured"), rounds=2, until=-math.inf)
    assert fastest(trials) is None


def test_damaged_data_ends_the_measurement() -> None:
    def rate(_: str) -> float:
        raise ShardSetError("damaged")

    with pytest.raises(ShardSetError):
        take_turns("ab", rate, rounds=1)


def test_a_choice_says_what_was_measured() -> None:
    said: list[str] = []
    rates = {"a": 10.0, "b": 20.0}
    choice = choose("read-threads", "ab", rates.__getitem__, rounds=1, until=math.inf, say=said.append)
    assert choice == Choice("b", "a 10 images/s, b 20 images/s")
    assert said == [
        "trying read-threads a, round 1 of 1",
        "trying read-threads b, round 1 of 1",
        "read-threads: b (a 10 images/s, b 20 images/s)",
    ]


# -- the model ----


def test_the_model_is_as_before_after_measuring_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1), nn.Linear(8 * 30 * 30, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strides = [p.stride() for p in model.parameters()]
    state = torch.get_rng_state()
    monkeypatch.setattr("launch.tuning.model.STEPS", 2)
    bench = Bench(model, torch.randn(2, 3, 32, 32), bf16=False, optim=OptimConfig())
    torch.set_rng_state(state)
    start = Execution.of(
        replace(Recipe(), compile=CompileConfig(compile="off"), parallel=ParallelConfig(zero=0)),
        CPU,
        accumulation=1,
        ranks=1,
    )
    options = {"memory_format": ("channels-last", "contiguous"), "optimizer_impl": ("fused", "foreach")}
    found = tune_model(bench, start, options, seconds=60.0, say=ignore)
    assert found.keys() == options.keys()
    assert all(found[name].value in values for name, values in options.items())
    assert "updates/s" in found["optimizer_impl"].reason
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.stride() for p in model.parameters()] == strides
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_each_way_runs_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, str]] = []
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(1), nn.Linear(8 * 30 * 30, 4))

    def look(module: nn.Module, *_: object) -> None:
        layout = module[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index, operator]
        seen.append((layout, fat.kernels.mode()))

    model.register_forward_hook(look)
    bench = Bench(model, torch.randn(2, 3, 32, 32), bf16=False, optim=OptimConfig())
    start = Execution.of(Recipe(), CPU, accumulation=1, ranks=1)
    monkeypatch.setattr("launch.tuning.model.STEPS", 1)
    options = {"memory_format": ("channels-last", "contiguous"), "kernels": ("auto", "off")}
    tune_model(bench, start, options, seconds=600.0, say=ignore)
    assert {layout for layout, _ in seen} == {True, False}
    assert {mode for _, mode in seen} == {"auto", "off"}
    assert fat.kernels.mode() == "auto"


@pytest.mark.parametrize(("best", "again"), [("cudagraphs", False), ("default", True)])
def test_kernels_are_tried_again_only_for_a_compiled_model(
    monkeypatch: pytest.MonkeyPatch, best: str, again: bool
) -> None:
    monkeypatch.setattr("launch.tuning.model._images_per_second", lambda _, way: 2.0 if way.compile == best else 1.0)
    said: list[str] = []
    bench = Bench(nn.Linear(1, 1), torch.zeros(1), bf16=False, optim=OptimConfig())
    start = Execution.of(Recipe(), CPU, accumulation=1, ranks=1)
    options = {"kernels": ("auto", "off"), "compile": ("off", "cudagraphs", "default")}
    found = tune_model(bench, start, options, seconds=60.0, say=said.append)
    assert found["compile"].value == best
    assert sum(line.startswith("kernels: ") for line in said) == 1 + again


@pytest.mark.parametrize("shares", [0, 2])
def test_the_optimizer_is_timed_on_what_it_would_work_on(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7))
    sizes: list[list[int]] = []
    kind = OPTIMIZERS["adamw"]

    def build(groups: list[dict[str, Any]], *args: Any) -> torch.optim.Optimizer:
        sizes.append([p.numel() for group in groups for p in group["params"]])
        return kind.build(groups, *args)

    monkeypatch.setitem(OPTIMIZERS, "adamw", replace(kind, build=build))
    bench = Bench(model, torch.zeros(1, 5), bf16=False, optim=OptimConfig(), shares=shares)
    start = Execution.of(Recipe(), CPU, accumulation=1, ranks=1)
    tune_model(bench, start, {"optimizer_impl": ("fused", "foreach")}, seconds=60.0, say=ignore)
    # 15 + 21 weights with decay, 3 + 7 biases without.
    assert sorted(sizes[0]) == (sorted([15, 21, 3, 7]) if not shares else [5, 18])


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
def test_only_possible_values_are_tried(
    device: str, training: dict[str, int], formats: int, modes: tuple[str, ...]
) -> None:
    found = alternatives(torch.device(device), **training)
    assert len(found["memory_format"]) == formats
    assert found["compile"] == modes
    assert found["optimizer_impl"] == ("fused", "foreach")


def test_what_there_is_no_time_for_stays_open() -> None:
    bench = Bench(fat.create_model("fat_b0"), torch.zeros(1, 3, 32, 32), bf16=False, optim=OptimConfig())
    start = Execution.of(Recipe(), CPU, accumulation=1, ranks=1)
    found = tune_model(bench, start, {"optimizer_impl": ("fused", "foreach")}, seconds=-1.0, say=ignore)
    assert found["optimizer_impl"].value is None


# -- the file ----

CHOICES = {
    "memory_format": Choice("contiguous", "channels-last 1 images/s, contiguous 2 images/s"),
    "compile": Choice(None, "off no time"),
    "read_threads": Choice(8, "32 1 images/s, 8 2 images/s"),
    "preallocate_width": Choice(640, "0 x 0 1 images/s, 640 x 480 2 images/s"),
    "preallocate_height": Choice(480, "0 x 0 1 images/s, 640 x 480 2 images/s"),
}


def test_a_fragment_is_a_recipe_with_the_values_that_were_chosen(tmp_path: Path) -> None:
    file = tmp_path / "tuned.toml"
    file.write_text(fragment(CHOICES, ["device: a GPU"]))
    recipe = parse(["--recipe", str(file)])
    assert recipe.compile == CompileConfig(memory_format="contiguous")
    loader = recipe.data.loader
    assert (loader.read_threads, loader.dali.preallocate_width, loader.dali.preallocate_height) == (8, 640, 480)
    text = file.read_text()
    assert text.startswith(FIRST_LINE + "\n# device: a GPU\n")
    assert "# channels-last 1 images/s, contiguous 2 images/s\n" in text
    assert "# compile: left open\n" in text


def test_a_fragment_holds_no_credentials_and_no_second_line() -> None:
    text = fragment({}, [f"command: pipeline tune https://me:{CANARY}@host/set\nevil = 1"])
    assert CANARY not in text
    assert not tomllib.loads(text)


def test_only_an_earlier_fragment_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "tuned.toml"
    check_fragment_output(file)
    file.write_text(fragment({}, []))
    check_fragment_output(file)
    file.write_text("[optim]\nepochs = 3\n")
    with pytest.raises(UserError, match="exists and was not written by 'pipeline tune'; name another file"):
        check_fragment_output(file)


# -- the command ----


def run(*args: object) -> int:
    return pipeline([str(arg) for arg in args])


def test_tune_writes_what_training_takes(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = itertools.count(1)
    monkeypatch.setattr("launch.tuning.loader.rate", lambda *_, **__: float(next(rates)))
    file = tmp_path / "tuned.toml"
    training = (*SMALL, "--read-threads", "3")
    assert run("tune", digits, "--what", "input", "--seconds", "60", "--out", file, "--", *training) == 0
    found = tomllib.loads(file.read_text())
    assert found.keys() == {"data"}
    assert found["data"]["loader"].keys() == {"decode_threads", "decode_ahead", "read_ahead"}, "read_threads was given"
    recipe = parse(["--recipe", str(file), *SMALL])
    assert recipe.data.loader.read_ahead == found["data"]["loader"]["read_ahead"]
    assert f"-- {' '.join(training)}" in file.read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_micro_batch_of_a_rank_is_measured(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    seen: list[Any] = []

    def measured(*args: Any, **_: Any) -> dict[str, Choice]:
        seen.append(args[0])
        return {}

    monkeypatch.setattr("launch.tuning.command.tune_model", measured)
    assert run("tune", digits, "--what", "model", "--ranks", ranks, "--out", tmp_path / "t.toml", "--", *SMALL) == 0
    (bench,) = seen
    assert bench.images.shape == (4 // ranks, 3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "SET", "--", "--size", "32"), "-- --size 32: only 'bench' and 'tune' take training options"),
        (("tune", "SET", "--", "--data", "other"), "--data other: not the set SET that was named first"),
        (("bench", "SET", "--", "--data", "other"), "--data other: not the set SET that was named first"),
        (("tune", "SET", "--", "--read-threads", "0"), "--read-threads 0: a whole number from 1 to 1,024 expected"),
    ],
)
def test_options_in_the_wrong_place_are_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("option", ["--tuned", "--tune", "--batch-size"])
@pytest.mark.parametrize("command", [lambda o: run("tune", "SET", o, "x"), lambda o: parse([o, "x"])])
def test_there_is_no_store_of_measured_options(command: Callable[[str], object], option: str) -> None:
    with pytest.raises(SystemExit):
        command(option)
