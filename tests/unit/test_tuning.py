"""`pipeline tune`: the fastest value of each unset option is measured and written to a recipe file."""

from __future__ import annotations

import itertools
import math
import os
import tomllib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import fat
from launch.bench.one_rank import one_rank
from launch.cli import main as pipeline
from launch.config.command_line import parse, parse_for_set
from launch.config.engine import CompileConfig
from launch.engine.engine import Engine, StepResult
from launch.feed import Feed
from launch.machine.world import World
from launch.tuning.model import candidates, tune_model
from launch.tuning.recipe_fragment import FIRST_LINE, check_fragment_output, recipe_fragment
from launch.tuning.trials import Choice, Trial, Values, fastest, tune
from pipeline.batch import Batch
from shards.errors import ShardSetError, UserError
from shards.progress import Phases
from tests.support.training_loop import CONFIG

SMALL = ("--size", "32", "--global-batch", "4", "--augment", "light", "--epochs", "1", "--warmup-epochs", "0")
CANARY = "hunter2"


class Recorded(Phases):
    """Phases and notes as a list of lines."""

    def __init__(self) -> None:
        super().__init__("tune")
        self.lines: list[str] = []

    def begin(self, phase: str) -> None:
        self.lines.append(phase)

    def note(self, line: str) -> None:
        self.lines.append(line)


# -- trials ----


def choose(stages: Sequence[Sequence[Values]], rate: Callable[[Values], float], **changes: Any) -> dict[str, Choice]:
    arguments: dict[str, Any] = {"rounds": 2, "margin": 1.02, "seconds": 60.0, "progress": Recorded()}
    return tune(stages, rate, **(arguments | changes))


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"a": [10, 10], "b": [12, 12], "c": [11, 11]}, "b"),
        ({"a": [10, 10], "b": [10.1, 10.1]}, "a"),  # within the margin
        ({"a": [10, 20], "b": [12, 15], "c": [11, 22]}, "c"),  # by the ratios within each round
        ({"a": [], "b": [3, 3], "c": [4, 4]}, "c"),  # the default has failed
        ({"a": [10, 10], "b": []}, "a"),
        ({"a": [], "b": []}, None),
    ],
)
def test_a_value_is_chosen_if_it_clearly_beats_the_default_in_most_rounds(
    rates: dict[str, list[float]], expected: str | None
) -> None:
    trials = [Trial({"x": value}, measured, "" if measured else "failed") for value, measured in rates.items()]
    best = fastest(trials, margin=1.02)
    assert (best and best.values["x"]) == expected


def test_values_alternate_and_a_failure_excludes_only_that_value() -> None:
    turns: list[str] = []

    def rate(values: Values) -> float:
        turns.append(values["x"])
        if values["x"] == "b":
            raise MemoryError("none left")
        return 1.0

    found = choose([[{"x": value} for value in "abc"]], rate)
    assert turns == ["a", "b", "c", "a", "c"]
    assert found == {"x": Choice("a", "a 1 images/s, b failed (MemoryError: none left), c 1 images/s")}


def test_if_every_value_fails_the_option_stays_unset() -> None:
    def rate(_: Values) -> float:
        raise RuntimeError("no")

    assert choose([[{"x": "a"}]], rate) == {"x": Choice(None, "a failed (RuntimeError: no)")}


def test_after_the_time_limit_every_value_is_still_measured_once() -> None:
    turns: list[Values] = []

    def rate(values: Values) -> float:
        turns.append(values)
        return 1.0

    choose([[{"x": 1}, {"x": 2}], [{"y": 1}, {"y": 2}]], rate, seconds=-math.inf)
    assert turns == [{"x": 1}, {"x": 2}, {"x": 1, "y": 1}, {"x": 1, "y": 2}]


def test_a_damaged_set_ends_the_measurement() -> None:
    def rate(_: Values) -> float:
        raise ShardSetError("damaged")

    with pytest.raises(ShardSetError):
        choose([[{"x": "a"}]], rate)


def test_a_choice_lists_the_measurements() -> None:
    said = Recorded()
    stage = [{"width": 0, "height": 0}, {"width": 640, "height": 480}]
    found = choose([stage], lambda values: 10.0 + values["width"], rounds=1, progress=said)
    figures = "0 x 0 10 images/s, 640 x 480 650 images/s"
    assert found == {"width": Choice(640, figures), "height": Choice(480, figures)}
    assert said.lines == [
        "trying width, height 0 x 0, round 1 of 1",
        "trying width, height 640 x 480, round 1 of 1",
        f"width, height: 640 x 480 ({figures})",
    ]


# -- the model ----


@contextmanager
def feed_of(data: Path, *options: str) -> Iterator[Feed]:
    threads = torch.get_num_threads()
    environment = mock.patch.dict(os.environ)  # DeepSpeed sets RANK and WORLD_SIZE in a single process
    try:
        with environment, one_rank(parse(["--data", str(data), *SMALL, *options]), ranks=1) as (feed, _):
            torch.set_num_threads(1)  # several would wait for each other while other processes use the cores
            yield feed
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("zero", "formats"), [(0, ["channels-last", "contiguous"]), (1, ["contiguous"])])
def test_each_value_is_measured_with_the_engine_of_training(
    digits: Path, monkeypatch: pytest.MonkeyPatch, zero: int, formats: list[str]
) -> None:
    """One process creates several engines and frees each of them."""
    engines: list[weakref.ref[Any]] = []
    seen: list[tuple[int, str, str, int]] = []
    real = Engine.step

    def step(self: Engine, batches: Sequence[Batch], **how: Any) -> StepResult:
        engines.append(weakref.ref(self.model))
        seen.append((self.zero, self.execution.memory_format, self.execution.optimizer_impl, len(batches)))
        return real(self, batches, **how)

    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr("launch.tuning.model.build_model", lambda _, classes: fat.create_model(CONFIG))
    monkeypatch.setattr("launch.tuning.model.STEPS", {"cpu": 1})
    monkeypatch.setattr("launch.tuning.model.ROUNDS", 1)
    with feed_of(digits, "--zero", str(zero), "--micro-batch", "2") as feed:
        found = tune_model(feed, ranks=1, seconds=60.0, progress=Recorded())
        reasons = {name: choice.reason for name, choice in found.items()}
        best = found["memory_format"].value
        expected = [(name, "fused") for name in formats] + [(best, "fused"), (best, "foreach")]
        assert list(dict.fromkeys(seen)) == list(dict.fromkeys((zero, *how, 2) for how in expected))
        assert best in formats
        assert ("channels-last failed (RecipeError: --memory-format" in reasons["memory_format"]) is bool(zero)
        assert reasons["optimizer_impl"].count("images/s") == 2
        assert not any(model() for model in engines)


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "options", "ranks", "expected"),
    [
        (CPU, (), 1, {"memory_format": "channels-last contiguous", "optimizer_impl": "fused foreach"}),
        (CPU, ("--optimizer-impl", "foreach"), 1, {"memory_format": "channels-last contiguous"}),
        (
            GPU,
            ("--memory-format", "contiguous", "--optimizer-impl", "fused"),
            1,
            {"compile": "cudagraphs off default reduce-overhead", "kernels": "auto off"},
        ),
        (
            GPU,
            ("--optimizer-impl", "fused", "--kernels", "off"),
            2,
            {"memory_format": "contiguous channels-last", "compile": "cudagraphs off default"},
        ),
    ],
)
def test_values_are_tried_for_unset_options_only(
    *,
    digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    options: tuple[str, ...],
    ranks: int,
    expected: dict[str, str],
) -> None:
    monkeypatch.setattr("fat.kernels.available", lambda kind: kind == "cuda")
    recipe = parse(["--data", str(digits), *SMALL, *options])
    feed = Feed.of(recipe, World(0, 1, 0, 1, device))
    found = candidates(feed, ranks=ranks)
    assert {name: " ".join(values[name] for values in stage) for stage in found for name in stage[0]} == expected


# -- the file ----

CHOICES = {
    "memory_format": Choice("contiguous", "channels-last 1 images/s, contiguous 2 images/s"),
    "compile": Choice(None, "off failed (RuntimeError: no)"),
    "read_threads": Choice(8, "32 1 images/s, 8 2 images/s"),
    "preallocate_width": Choice(640, "0 x 0 1 images/s, 640 x 480 2 images/s"),
    "preallocate_height": Choice(480, "0 x 0 1 images/s, 640 x 480 2 images/s"),
}


def test_a_fragment_is_a_recipe_with_the_chosen_values(tmp_path: Path) -> None:
    file = tmp_path / "tuned.toml"
    file.write_text(recipe_fragment(CHOICES, ["device: a GPU"]))
    recipe = parse(["--recipe", str(file)])
    assert recipe.compile == CompileConfig(memory_format="contiguous")
    loader = recipe.data.loader
    assert (loader.read_threads, loader.dali.preallocate_width, loader.dali.preallocate_height) == (8, 640, 480)
    text = file.read_text()
    assert text.startswith(FIRST_LINE + "\n# device: a GPU\n")
    assert "# channels-last 1 images/s, contiguous 2 images/s\n" in text
    assert "# compile: not set\n" in text


def test_comments_of_a_fragment_have_one_line_and_no_credentials() -> None:
    text = recipe_fragment({}, [f"command: pipeline tune https://me:{CANARY}@host/set\nevil = 1"])
    assert CANARY not in text
    assert not tomllib.loads(text)


def test_only_an_earlier_fragment_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "tuned.toml"
    check_fragment_output(file)
    file.write_text(recipe_fragment({}, []))
    check_fragment_output(file)
    file.write_text("[optim]\nepochs = 3\n")
    with pytest.raises(UserError, match="exists and was not written by 'pipeline tune'; name another file"):
        check_fragment_output(file)


# -- the command ----


def run(*args: object) -> int:
    return pipeline([str(arg) for arg in args])


def test_training_reads_what_tune_writes(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    seen: list[Feed] = []

    def measured(feed: Feed, **_: Any) -> dict[str, Choice]:
        seen.append(feed)
        return {}

    monkeypatch.setattr("launch.tuning.command.tune_model", measured)
    assert run("tune", digits, "--what", "model", "--ranks", ranks, "--out", tmp_path / "t.toml", "--", *SMALL) == 0
    assert seen[0].shape.micro_rows == 4 // ranks


def test_the_positional_set_takes_precedence_over_a_recipe_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('[data]\ndata = "other"\nsize = 32\nglobal_batch = 8\n')
    recipe = parse_for_set("SET", ["--recipe", str(file)], own=(), data={"global_batch": 4})
    assert (recipe.data.data, recipe.data.size, recipe.data.global_batch) == ("SET", 32, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("info", "SET", "--", "--size", "32"),
            "-- --size 32: only 'train', 'race', 'bench' and 'tune' accept training options",
        ),
        (("tune", "SET", "--", "--data", "other"), "--data other: differs from the set SET of the command"),
        (("bench", "SET", "--", "--data", "other"), "--data other: differs from the set SET of the command"),
        (("tune", "SET", "--", "--read-threads", "0"), "--read-threads 0: expected a whole number from 1 to 1,024"),
    ],
)
def test_misplaced_options_are_rejected_in_one_line(
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
def test_measured_options_are_not_stored_implicitly(command: Callable[[str], object], option: str) -> None:
    try:
        assert command(option) == 2
    except UserError as error:
        assert "no such option" in str(error)  # noqa: PT017 - the two commands report the same error differently
