"""What is left open comes to what was measured; what is given, and what a run began with, wins."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from launch.cli import Bench, Tune
from launch.cli import main as pipeline
from launch.config.command_line import parse
from launch.config.recipe import Recipe, RecipeError
from launch.dry_run import describe_run
from launch.engine.build import build_model
from launch.engine.execution import Execution, choose
from launch.feed import Feed
from launch.machine.world import World
from launch.train import main as train
from launch.tuning import tuned
from launch.tuning.choices import Choices, _Resolving, measure, resolve
from launch.tuning.open_options import given, with_values
from launch.tuning.trials import Choice
from launch.tuning.tuned import Damaged, Entry, entry_of, file_of, find, keep, key_of, read
from shards.errors import UserError
from tests.unit.test_launch_commands import SMALL, run

pytestmark = pytest.mark.timed

CPU = torch.device("cpu")
MODEL = {"memory_format": "contiguous", "optimizer_form": "foreach"}
INPUT = {"decode_threads": 1, "read_threads": 3, "read_ahead": 1, "decode_ahead": 3}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `--tuned auto` looks."""
    monkeypatch.delenv("FAT_TUNED")
    monkeypatch.delenv("FAT_KERNELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fat-pipeline" / "tuned.json"


def setting(data: Path, *options: object) -> tuple[Recipe, Feed]:
    recipe = parse([*SMALL, "--data", str(data), *map(str, options)])
    return recipe, Feed.of(recipe, World(0, 1, 0, 1, CPU))


def measured(data: Path, *options: object, file: Path, ranks: int = 1) -> None:
    """As if 'pipeline tune', given these options, had found MODEL and INPUT."""
    recipe, feed = setting(data, *options)
    for part, values in (("model", MODEL), ("input", INPUT)):
        found = {name: Choice(value, "figures") for name, value in values.items()}
        keep(file, entry_of(part, key_of(part, recipe, feed, given=given(recipe), ranks=ranks), found))


def chosen(data: Path, *options: object, goes_on: bool = False) -> tuple[Recipe, Any]:
    recipe, feed = setting(data, *options)
    recipe, feed, choices = resolve(recipe, feed, build_model(recipe, feed.classes), goes_on=goes_on)
    assert feed.recipe is recipe
    return recipe, choices


def picks_of(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "picks"][-1]


def test_without_any_measurement_nothing_is_chosen(digits: Path, file: Path) -> None:
    recipe, choices = chosen(digits)
    assert given(recipe) == {}
    assert set(choices.sources.values()) == {"by default"}
    assert choices.notes == []
    assert Execution.of(recipe, CPU, accumulation=1, ranks=1) == Execution(
        memory_format="channels-last", kernels="auto", compile="off", optimizer_form="fused"
    )


def test_training_takes_what_was_measured_and_says_where_it_is_from(
    tmp_path: Path, digits: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(digits, "--decode-ahead", "1", file=file)
    out = tmp_path / "run"
    assert run(train, *SMALL, "--data", digits, "--out", out, "--stop-after", "1", "--decode-ahead", "1") == 0
    picks = picks_of(out)
    assert picks["channels-last"] == "activations"
    assert picks["optimiser"] == "foreach adamw"
    assert picks["threads"] == "1 decode, 3 read"
    assert picks["batches ahead"] == "1 read, 1 in decoding, 2 ready"  # what is given wins
    source = picks[f"measured ({file})"]
    assert source == (
        "memory-format contiguous, optimizer-form foreach, read-threads 3, read-ahead 1, decode-threads 1"
    )
    assert source in capsys.readouterr().err
    saved = json.loads((out / "recipe.json").read_text())
    assert saved["recipe"]["run"]["memory_format"] == "contiguous"


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("--memory-format", "channels-last", "memory_format"),
        ("--optimizer-form", "fused", "optimizer_form"),
        ("--kernels", "auto", "kernels"),
        ("--compile", "default", "compile"),
        ("--read-threads", 32, "read_threads"),
        ("--hw-decoder-load", 0.9, "hw_decoder_load"),
    ],
)
def test_what_is_given_wins_even_where_it_is_the_default(
    digits: Path, file: Path, option: str, value: object, name: str
) -> None:
    measured(digits, option, value, file=file)
    content = json.loads(file.read_text())
    for found in content["entries"]:  # as a file may say that somebody has edited
        found["values"] |= {name: value} if name in tuned.NAMES[found["part"]] else {}
    file.write_text(json.dumps(content))
    recipe, choices = chosen(digits, option, value)
    assert given(recipe)[name] == value
    assert name not in choices.values
    assert f"measured ({file})" in choices.sources.values()


def test_the_environment_s_kernels_switch_is_given_too(
    digits: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAT_KERNELS", "off")
    with monkeypatch.context() as patch:
        patch.setitem(MODEL, "kernels", "auto")
        measured(digits, file=file)
    recipe, choices = chosen(digits)
    assert choices.values["memory_format"] == "contiguous"
    assert "kernels" not in choices.values
    assert given(recipe) == {"kernels": "off"} | {k: v for k, v in choices.values.items() if v is not None}
    monkeypatch.setenv("FAT_KERNELS", "no")
    with pytest.raises(RecipeError, match="FAT_KERNELS=no: expected auto, off or unchecked"):
        chosen(digits)


def test_a_measurement_of_something_else_is_not_used_and_the_difference_is_told(digits: Path, file: Path) -> None:
    measured(digits, file=file)
    _, choices = chosen(digits, "--micro-batch", "16")
    assert set(choices.sources.values()) == {"by default"}
    model, loader = choices.notes
    assert model == (
        f"note: {file}: the nearest measurement of the model is of micro_batch 32, here 16, accumulated False, here "
        "True; defaults are used"
    )
    assert "of the input is of micro_batch 32, here 16; defaults" in loader
    assert given(chosen(digits, "--tuned", "off")[0]) == {}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--decode-threads", 1), "input"),
        (("--memory-format", "contiguous"), "model"),
        (("--kernels", "off"), "model"),
    ],
)
def test_what_was_measured_beside_given_options_counts_for_runs_with_these(
    digits: Path, file: Path, options: tuple[object, ...], part: str
) -> None:
    measured(digits, *options, file=file)
    _, without = chosen(digits)
    assert "measured" not in " ".join(without.sources[name] for name in tuned.NAMES[part] if name in without.sources)
    assert f"the nearest measurement of the {part} is of given {{" in " ".join(without.notes)
    _, alike = chosen(digits, *options)
    assert f"measured ({file})" in [alike.sources.get(name) for name in tuned.NAMES[part]]


def test_what_the_model_s_speed_depends_on_is_in_its_key(digits: Path, file: Path) -> None:
    recipe, feed = setting(digits, "--freeze-bn", "--sync-bn", "group:2")
    alone = key_of("model", recipe, feed, given={}, ranks=1)
    several = key_of("model", recipe, feed, given={}, ranks=8)
    assert (alone["ranks"], several["ranks"], several["sync_bn"]) == (1, "several", "group:2")
    assert several == key_of("model", recipe, feed, given={}, ranks=2)
    assert alone["freeze_bn"] is True
    assert {"triton", "fat", "torch"} <= alone.keys()
    measured(digits, file=file, ranks=2)
    _, choices = chosen(digits)
    assert choices.sources["memory_format"] == "by default"
    assert "ranks several, here 1" in choices.notes[0]


def test_cuda_graphs_are_not_taken_for_several_ranks(digits: Path, file: Path) -> None:
    recipe, feed = setting(digits)
    for ranks, device, taken in ((1, "cuda", True), (2, "cuda", False)):
        there = dataclasses.replace(feed, world=World(0, ranks, 0, ranks, torch.device(device)))
        resolving = _Resolving(recipe, there, torch.nn.Identity(), goes_on=False)
        assert ("reduce-overhead" in resolving._alternatives()["compile"]) is taken


def test_the_optimiser_s_shares_are_those_of_the_ranks_that_training_will_have(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, feed = setting(digits, "--zero", "1")
    seen: list[int] = []
    monkeypatch.setattr("launch.tuning.model.tune", lambda bench, *_, **__: seen.append(bench.shares) or {})
    measure("model", recipe, feed, torch.nn.Identity(), fixed={}, ranks=8, seconds=1, say=print)
    assert seen == [8]


@pytest.mark.parametrize(("cores", "threads"), [(2, 64), (32, 4)])
def test_rank_0_s_decode_threads_do_not_flood_a_smaller_machine(
    digits: Path, file: Path, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    """`cores`: rank 0's; this rank has two."""
    recipe, feed = setting(digits)
    feed = dataclasses.replace(feed, world=World(0, 1, 0, 1, CPU, cores=2))
    found = {"decode_threads": Choice(64, "figures")}
    keep(file, entry_of("input", key_of("input", recipe, feed, given={}, ranks=1), found))
    monkeypatch.setattr("launch.tuning.choices.share", lambda make, _: dataclasses.replace(make(), cores=cores))
    settled, _, _ = resolve(recipe, feed, torch.nn.Identity(), goes_on=False)
    assert settled.data.loader.decode_threads == threads
    given_64 = with_values(recipe, {"decode_threads": 64})
    assert resolve(given_64, feed, torch.nn.Identity(), goes_on=False)[0].data.loader.decode_threads == 64


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(("device", "ranks", "zero"), [("cpu", 1, 0), ("cpu", 2, 0), ("cuda", 1, 0), ("cuda", 8, 1)])
def test_zero_auto_is_1_on_several_gpus_only(digits: Path, device: str, ranks: int, zero: int) -> None:
    recipe, feed = setting(digits)
    world = World(0, ranks, 0, ranks, torch.device(device))
    feed = dataclasses.replace(feed, world=world)
    assert choose(recipe, world.device, ranks=ranks)[0] == zero
    execution = Execution.of(recipe, world.device, accumulation=1, ranks=ranks)
    assert execution.memory_format == ("contiguous" if zero else "channels-last")
    shown = describe_run(recipe, feed, build_model(recipe, feed.classes), Choices())
    precision = "bf16" if device == "cuda" else "fp32"
    assert f"{'ZeRO-1' if zero else 'plain'}, {precision}, {ranks} x {device}" in shown


@pytest.mark.parametrize(("ranks", "taken"), [(1, True), (2, False)])
def test_weights_that_zero_cannot_hold_do_not_go_on_on_several_gpus(digits: Path, ranks: int, taken: bool) -> None:
    """The run began on one GPU, without ZeRO; two have ZeRO-1 by default."""
    recipe, feed = setting(digits)
    there = dataclasses.replace(feed, world=World(0, ranks, 0, ranks, torch.device("cuda")))
    resolving = _Resolving(recipe, there, torch.nn.Identity(), goes_on=True)
    assert resolving._can_be("memory_format", "channels-last") is taken
    assert resolving._can_be("optimizer_form", "foreach")


def test_bench_and_tune_and_training_have_the_same_default_of_zero() -> None:
    assert Bench(dataset="").zero == Tune(dataset="").zero == Recipe().run.zero == "auto"


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1"])
def test_seconds_that_are_none_are_refused(digits: Path, seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline(["tune", str(digits), "--seconds", seconds]) == 2
    assert f"--seconds {seconds}: " in capsys.readouterr().err


def entry(part: str = "model", key: object = None, **values: object) -> str:
    """A file with one entry."""
    content = {"part": part, "key": {} if key is None else key, "values": values, "figures": {}, "measured": ""}
    return json.dumps({"version": 1, "entries": [content]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no JSON ("),
        ("[]", "no file of measured choices; remove it"),
        ("{}", "no file of measured choices; remove it"),
        ('{"version": 2, "entries": []}', "of version 2, this checkout reads 1; remove it"),
    ],
)
def test_a_damaged_file_is_a_line_and_replaced_only_if_it_holds_nothing(
    digits: Path, file: Path, content: str, message: str
) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(Damaged):
        read(file)
    _, choices = chosen(digits)
    assert set(choices.sources.values()) == {"by default"}
    assert len(set(choices.notes)) == 1
    assert choices.notes[0].startswith(f"warning: {file}: {message}")
    assert choices.notes[0].endswith("; defaults are used")
    if not content:
        measured(digits, file=file)
        assert chosen(digits)[1].values["memory_format"] == "contiguous"
    else:
        with pytest.raises(Damaged, match="remove it, or name another with --tuned"):
            measured(digits, file=file)
        assert file.read_text() == content


@pytest.mark.parametrize(
    "content",
    [
        '{"version": 1, "entries": [{}]}',
        '{"version": 1, "entries": [null]}',
        entry(compile="sideways"),
        entry(compile=["off"]),
        entry(read_threads=8),
        entry("input", read_threads=0),
        entry("tea"),
        entry(key=[]),
        entry().replace('"figures": {}', '"figures": null'),
    ],
)
def test_an_entry_that_cannot_be_read_is_skipped_and_stays(digits: Path, file: Path, content: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert read(file) == []
    _, choices = chosen(digits)
    assert set(choices.sources.values()) == {"by default"}
    assert choices.notes[0].startswith(f"warning: {file}: 1 entries cannot be read (")
    measured(digits, file=file)
    assert chosen(digits)[1].values["memory_format"] == "contiguous"
    kept = json.loads(file.read_text())["entries"]
    assert kept[0] == json.loads(content)["entries"][0]
    assert len(kept) == 3


def test_a_file_that_cannot_be_read_just_now_is_not_written_over(
    digits: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(digits, file=file)
    before = file.read_bytes()
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> str:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(Path, "read_text", fail)
        with pytest.raises(UserError, match="cannot be read \\(Input/output error\\)"):
            keep(file, entry_of("model", {}, {}))
    assert file.read_bytes() == before


def test_a_lock_that_is_held_or_not_to_be_had_is_an_error_soon(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "LOCK_SECONDS", 0.1)
    file.parent.mkdir(parents=True)
    with (
        FileLock(file.with_name("tuned.json.lock"), is_singleton=False),
        pytest.raises(UserError, match=r"tuned\.json\.lock beside it has been held for 0\.1 s; try again"),
    ):
        keep(file, entry_of("model", {}, {}))

    def refuse(*_: object) -> None:
        raise NotImplementedError("no flock")

    monkeypatch.setattr(FileLock, "_acquire", refuse)
    with pytest.raises(UserError, match="its file system has no locks"):
        keep(file, entry_of("model", {}, {}))


def test_a_measurement_goes_on_top_of_an_earlier_one(file: Path) -> None:
    def found(device: int, **values: object) -> Entry:
        return entry_of("model", {"device": device}, {name: Choice(v, str(v)) for name, v in values.items()})

    for made in (found(1, compile="off", kernels="off"), found(2, compile="off"), found(1, compile="default")):
        keep(file, made)
    assert len(read(file)) == 2
    assert find(file, "model", {"device": 1}) == ({"compile": "default", "kernels": "off"}, "")
    assert find(file, "model", {"device": 2}) == ({"compile": "off"}, "")
    assert find(file, "input", {"device": 1}) == ({}, "")


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FAT_TUNED")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert file_of("auto") == tmp_path / ".cache" / "fat-pipeline" / "tuned.json"
    monkeypatch.setenv("FAT_TUNED", str(tmp_path / "t.json"))
    assert file_of("auto") == tmp_path / "t.json"
    assert file_of("x.json") == Path("x.json")
    assert file_of("off") is None


# -- going on ----------------------------------------------------------------------------------------------------


def begin(out: Path, digits: Path, *options: object, steps: int) -> dict[str, str]:
    options = ("--data", digits, "--out", out, "--stop-after", steps, *options)
    assert run(train, *SMALL, *options) == 0
    return picks_of(out)


@pytest.mark.slow
def test_a_run_goes_on_as_it_began_whatever_is_measured_meanwhile(tmp_path: Path, digits: Path, file: Path) -> None:
    out = tmp_path / "run"
    assert begin(out, digits, steps=1)["optimiser"] == "fused adamw"
    measured(digits, file=file)
    picks = begin(out, digits, steps=2)
    assert picks["optimiser"] == "fused adamw"
    assert picks["channels-last"] == "weights and activations"
    assert "optimizer-form" in picks["as the run began"]
    # What is given wins here too, for this start; the next one is as the run began again.
    assert begin(out, digits, "--optimizer-form", "foreach", steps=3)["optimiser"] == "foreach adamw"
    assert begin(out, digits, steps=4)["optimiser"] == "fused adamw"
    # Another run in the same folder begins anew.
    assert begin(out, digits, "--resume", "never", steps=1)["optimiser"] == "foreach adamw"
    file.unlink()
    assert begin(out, digits, steps=2)["optimiser"] == "foreach adamw"


def test_a_run_goes_on_with_what_it_was_given_when_it_began(
    tmp_path: Path, digits: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setenv("FAT_KERNELS", "off")
        options = ("--optimizer-form", "foreach", "--decode-ahead", "3", "--lr", "0.001")
        assert begin(out, digits, *options, steps=1)["optimiser"] == "foreach adamw"
        patch.delenv("FAT_KERNELS")
        recipe, choices = chosen(digits, "--out", out, goes_on=True)
    assert recipe.optim.optimizer_form == choices.values["optimizer_form"] == "foreach"
    assert (recipe.data.loader.decode_ahead, recipe.run.kernels) == (3, "off")
    assert choices.sources["kernels"] == choices.sources["optimizer_form"] == "as the run began"
    # Another value counts for that start alone.
    assert begin(out, digits, "--optimizer-form", "fused", steps=2)["optimiser"] == "fused adamw"
    assert begin(out, digits, steps=3)["optimiser"] == "foreach adamw"


def test_a_run_of_a_version_without_choices_keeps_the_defaults(tmp_path: Path, digits: Path, file: Path) -> None:
    out = tmp_path / "run"
    begin(out, digits, steps=1)
    content = json.loads((out / "recipe.json").read_text())
    del content["choices"]
    (out / "recipe.json").write_text(json.dumps(content))
    measured(digits, file=file)
    _, choices = chosen(digits, "--out", out, goes_on=True)
    assert set(choices.sources.values()) == {"as the run began"}
    assert set(choices.values.values()) == {None}
    assert begin(out, digits, steps=2)["optimiser"] == "fused adamw"
    assert begin(out, digits, steps=3)["optimiser"] == "fused adamw"


def test_cuda_graphs_of_one_rank_do_not_go_on_on_several(tmp_path: Path, digits: Path, file: Path) -> None:
    out = tmp_path / "run"
    begin(out, digits, steps=1)
    for ranks, taken in ((1, False), (2, True)):
        recorded(out, ranks=ranks, values={"compile": "reduce-overhead"})
        recipe, feed = setting(digits, "--out", out)
        feed = dataclasses.replace(feed, world=World(0, 2, 0, 2, CPU))
        choices = _Resolving(recipe, feed, torch.nn.Identity(), goes_on=True).choose()
        assert (choices.values["compile"] == "reduce-overhead") is taken
        assert any("have only if it is given" in note for note in choices.notes) is not taken


def test_a_run_that_goes_on_says_that_it_does_not_measure(
    tmp_path: Path, digits: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    begin(out, digits, steps=1)
    monkeypatch.setattr("launch.tuning.choices.measure", None)
    _, choices = chosen(digits, "--out", out, "--compile", "auto", "--tune", goes_on=True)
    assert choices.notes[-1].startswith(
        "note: --tune --compile auto: not measured, the run goes on as it began: memory-"
    )
    _, choices = chosen(digits, "--out", out, "--compile", "auto", goes_on=True)
    assert choices.notes[-1].startswith(
        "note: --compile auto: not measured, the run goes on as it began: compile; give"
    )
    assert chosen(digits, "--out", out, goes_on=True)[1].notes == []


def recorded(out: Path, **changes: object) -> None:
    """Change what recipe.json says of the run's beginning."""
    path = out / "recipe.json"
    content = json.loads(path.read_text())
    content["choices"] |= changes
    path.write_text(json.dumps(content))


def test_on_another_device_all_is_chosen_anew_and_with_other_cores_the_loader(
    tmp_path: Path, digits: Path, file: Path
) -> None:
    out = tmp_path / "run"
    measured(digits, file=file)
    begin(out, digits, steps=1)
    file.unlink()
    recorded(out, cores=99)
    _, choices = chosen(digits, "--out", out, goes_on=True)
    assert (choices.sources["memory_format"], choices.sources["read_threads"]) == ("as the run began", "by default")
    recorded(out, device="a far faster one")
    _, choices = chosen(digits, "--out", out, goes_on=True)
    assert set(choices.sources.values()) == {"by default"}
    assert choices.notes == ["note: the run began on a far faster one: what is fastest is chosen anew"]


def test_what_is_not_possible_any_more_comes_to_the_default(tmp_path: Path, digits: Path, file: Path) -> None:
    out = tmp_path / "run"
    begin(out, digits, "--memory-format", "channels-last", steps=1)
    recorded(out, values={"memory_format": "channels-last", "compile": "reduce-overhead", "optimizer_form": "foreach"})
    recipe, choices = chosen(digits, "--out", out, "--zero", "3", goes_on=True)
    assert choices.sources["memory_format"] == choices.sources["compile"] == "by default"
    assert choices.values["optimizer_form"] == "foreach"
    assert Execution.of(recipe, CPU, accumulation=1, ranks=1).memory_format == "contiguous"


@pytest.mark.parametrize(
    "damage", ['{"choices": 3}', "{", '{"choices": {"device": 1, "cores": 2, "values": {"compile": "tea"}}}']
)
def test_a_recipe_that_does_not_say_how_the_run_began_is_a_warning(
    tmp_path: Path, digits: Path, file: Path, damage: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(damage)
    _, choices = chosen(digits, "--out", tmp_path / "run", goes_on=True)
    assert choices.notes[0].startswith(f"warning: {tmp_path}/run/recipe.json: does not say what the run began with (")


# -- measuring ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tune_measures_keeps_and_the_next_run_begins_with_it(
    tmp_path: Path, digits: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--size", "32", "--batch-size", "32", "--augment", "light", "--seconds", "12")
    assert pipeline(["tune", str(digits), *options]) == 0
    told = capsys.readouterr().out
    assert "memory-format: " in told
    assert f"kept in {file}" in told
    entries = {entry.part: entry for entry in read(file)}
    assert entries.keys() == {"model", "input"}
    assert "images/s" in entries["model"].figures["memory_format"]
    picks = begin(tmp_path / "run", digits, steps=1)
    for entry in entries.values():
        for name, value in entry.values.items():
            assert f"{name.replace('_', '-')} {value}" in picks[f"measured ({file})"]


@pytest.mark.slow
def test_a_run_that_is_told_to_measure_does_so_once(tmp_path: Path, digits: Path, file: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.tuning.choices.SECONDS", 9.0)
        picks = begin(tmp_path / "run", digits, "--tune", "--read-ahead", "2", steps=1)
        assert "memory-format" in picks["measured now"]
        assert "images/s" in picks["measured memory-format"]
        assert {entry.part for entry in read(file)} == {"model", "input"}
        assert "read_ahead" not in next(e for e in read(file) if e.part == "input").values
        patch.setattr("launch.tuning.choices.measure", None)
        picks = begin(tmp_path / "run", digits, "--tune", "--read-ahead", "2", steps=2)
    assert "memory-format" in picks["as the run began"]


def test_a_dry_run_shows_the_choices_and_measures_nothing(
    tmp_path: Path, digits: Path, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.tuning.choices.measure", None)
    measured(digits, file=file)
    assert run(train, *SMALL, "--data", digits, "--out", tmp_path / "run", "--dry-run", "--tune") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "memory-format contiguous, optimizer-form foreach" in shown
    # What is left (kernels, compile, a hardware decoder's load) has one value only on this device.
    assert "to be measured at the start" not in shown
    options = ("--data", digits, "--out", tmp_path / "run", "--dry-run", "--tuned", "off")
    assert run(train, *SMALL, *options, "--tune", "--read-ahead", "2") == 0
    shown = capsys.readouterr().out
    assert "memory-format, optimizer-form: to be measured at the start" in shown
    assert "decode-threads, read-threads, decode-ahead: to be measured at the start" in shown
    assert run(train, *SMALL, *options, "--compile", "auto") == 0
    assert "to be measured" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_compile_auto_is_off_on_cpus(digits: Path, file: Path) -> None:
    recipe, choices = chosen(digits, "--compile", "auto")
    assert recipe.run.compile == "off"
    assert choices.sources["compile"] == "by default"


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_an_error_of_tune_and_a_warning_of_a_run(
    tmp_path: Path, digits: Path, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in-the-way").write_text("")
    lost = tmp_path / "in-the-way" / "tuned.json"
    options = ("--size", "32", "--batch-size", "32", "--augment", "light", "--seconds", "6", "--what", "model")
    assert pipeline(["tune", str(digits), *options, "--tuned", str(lost)]) == 2
    assert f"--tuned {lost}: cannot be written" in capsys.readouterr().err
    monkeypatch.setattr("launch.tuning.choices.SECONDS", 4.0)
    begin(tmp_path / "run", digits, "--tune", "--tuned", lost, steps=1)
    assert f"warning: --tuned {lost}: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory-format", "channels-last", "--zero", "1"), "DeepSpeed cannot hold such weights"),
        (("--compile", "default", "--zero", "3"), "ZeRO 3 cannot be compiled whole"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_given(digits: Path, options: tuple[str, ...], message: str) -> None:
    recipe, _ = setting(digits, *options)
    with pytest.raises(RecipeError, match=message):
        Execution.of(recipe, CPU, accumulation=1, ranks=1)
    graphs = parse(["--compile", "reduce-overhead", "--zero", "0"])
    with pytest.raises(RecipeError, match="--compile reduce-overhead: its CUDA graphs would overwrite"):
        Execution.of(graphs, torch.device("cuda"), accumulation=2, ranks=1)


def test_every_name_has_its_place_and_its_check(digits: Path) -> None:
    recipe, _ = setting(digits)
    for part, names in tuned.NAMES.items():
        for name in names:
            value = next(v for v in ("contiguous", "off", "default", "foreach", 1) if names[name](v))
            assert given(with_values(recipe, {name: value}))[name] == value
            assert tuned.sensible(part, {name: value})
            assert not tuned.sensible(part, {name: "sideways"})
    assert dataclasses.is_dataclass(recipe)
