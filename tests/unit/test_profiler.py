"""`--profile`: the steps, the files and the merged trace (launch/profiling/)."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from launch.config.errors import RecipeError
from launch.config.run import LogConfig
from launch.profiling.phases import DATA_WAIT, OTHER, PHASES, StepPhases
from launch.profiling.profiler import WARMUP_STEPS, profiled_steps
from launch.profiling.trace_file import LOADER_PID, STEP_LABEL, write_trace
from pipeline.stage_trace import StageTrace
from tests.support.disks import fill, small_disk
from tests.support.training_loop import training

BATCH = 16
Trace = list[dict[str, Any]]
TOLERANCE = 5000  # microseconds; the two clocks differ by decades if they are not aligned


def events_of(path: Path) -> Trace:
    found: Trace = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return found


def named(trace: Trace, name: str, **fields: Any) -> Trace:
    return [e for e in trace if e["name"] == name and all(e.get(key) == value for key, value in fields.items())]


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({}, range(100), range(0)),
        ({"profile": 5}, range(100), range(WARMUP_STEPS, WARMUP_STEPS + 5)),
        ({"profile": 5}, range(40, 100), range(40 + WARMUP_STEPS, 45 + WARMUP_STEPS)),
        ({"profile": 5}, range(8), range(3, 8)),
        ({"profile": 5}, range(3), range(3)),
        ({"profile": 5}, range(7, 7), range(0)),
        ({"profile": 5, "profile_from": 31}, range(100), range(30, 35)),
        ({"profile": 5, "profile_from": 1}, range(100), range(5)),
        ({"profile": 5, "profile_from": 98}, range(100), range(97, 100)),
        ({"profile": 5, "profile_from": 31}, range(40, 100), range(0)),
        ({"profile": 5, "profile_from": 101}, range(100), range(0)),
    ],
)
def test_the_profiled_steps(options: dict[str, int], steps: range, expected: range) -> None:
    assert profiled_steps(LogConfig(**options), steps) == expected


def test_a_first_step_without_a_number_of_steps_is_refused() -> None:
    with pytest.raises(RecipeError, match="add --profile STEPS"):
        LogConfig(profile_from=3)


def test_loader_spans_are_at_the_times_of_the_operators_in_them(tmp_path: Path) -> None:
    stages, starts = StageTrace(), []
    stages.start()
    with profile(activities=[ProfilerActivity.CPU]) as torch_profile:
        for _ in range(3):
            starts.append(time.monotonic_ns())
            with record_function(STEP_LABEL), stages.span("decode", 4), record_function("inside"):
                torch.ones(3).sum()
                time.sleep(0.02)
            stages.level("ready", 2)
    write_trace(torch_profile, stages.drain(), starts, tmp_path / "trace.json.gz")
    trace = events_of(tmp_path / "trace.json.gz")

    around = named(trace, "decode", ph="X", pid=LOADER_PID, args={"batch": 4})
    inside = named(trace, "inside", ph="X")
    assert len(around) == len(inside) == 3
    for outer, inner in zip(around, inside, strict=True):
        assert outer["ts"] - TOLERANCE < inner["ts"]
        assert inner["ts"] + inner["dur"] < outer["ts"] + outer["dur"] + TOLERANCE
        assert abs(outer["dur"] - inner["dur"]) < 2 * TOLERANCE
    assert [e["args"] for e in named(trace, "queue: ready", ph="C")] == [{"batches": 2}] * 3
    assert named(trace, "process_name", pid=LOADER_PID)[0]["args"] == {"name": "data loader"}


def test_a_trace_without_its_steps_is_an_error(tmp_path: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as torch_profile:
        torch.ones(3).sum()
    with pytest.raises(ValueError, match="the trace has 0 steps, expected 1"):
        write_trace(torch_profile, [], [1], tmp_path / "trace.json.gz")
    assert list(tmp_path.iterdir()) == []


def test_phases_add_up_to_the_time_of_the_steps() -> None:
    phases = StepPhases(torch.device("cpu"))
    for _ in range(2):
        phases.begin_step()
        for name in (*PHASES[:2], *PHASES):
            with phases.phase(name):
                pass
        phases.end_step()
    seconds = phases.seconds()
    assert list(seconds) == [DATA_WAIT, *PHASES, OTHER]
    assert all(value > 0 for value in seconds.values())


@pytest.fixture(scope="module")
def profiled(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the profile of steps 3 and 4 of a training."""
    run = tmp_path_factory.mktemp("profiled") / "run"
    with training(digits, run, "--profile", "2", "--profile-from", "3", batch=BATCH, device="cpu") as step:
        for _ in range(5):
            step()
    return run / "profile"


def test_a_profile_has_its_files_and_nothing_else(profiled: Path) -> None:
    assert {path.name for path in profiled.iterdir()} == {"trace-step-3.json.gz", "operators.txt", "summary.json"}


def test_the_trace_has_operators_phases_and_loader_stages_on_one_timeline(profiled: Path) -> None:
    trace = events_of(profiled / "trace-step-3.json.gz")
    assert len(named(trace, STEP_LABEL)) == 2
    assert all(len(named(trace, phase, cat="user_annotation")) >= 2 for phase in PHASES)
    assert named(trace, "aten::convolution_backward")
    begin = min(e["ts"] for e in named(trace, STEP_LABEL))
    end = max(e["ts"] + e["dur"] for e in named(trace, STEP_LABEL))
    for stage in ("decode", "resize", "augment", "transfer", "wait for batch"):
        assert any(begin <= e["ts"] <= end for e in named(trace, stage, ph="X", pid=LOADER_PID)), stage
    for queue in ("queue: read", "queue: decoding", "queue: ready"):
        assert any(begin <= e["ts"] <= end for e in named(trace, queue, ph="C", pid=LOADER_PID)), queue


def test_the_trace_follows_the_trace_event_format(profiled: Path) -> None:
    """The fields that Perfetto requires of the events that this project adds."""
    added = [e for e in events_of(profiled / "trace-step-3.json.gz") if e["pid"] == LOADER_PID]
    named_tracks = {e["tid"] for e in added if e["ph"] == "M" and e["name"] == "thread_name"}
    assert {e["ph"] for e in added} == {"M", "X", "C"}
    for event in added:
        assert isinstance(event["name"], str)
        assert isinstance(event["tid"], int)
        if event["ph"] == "X":
            assert event["tid"] in named_tracks
            assert event["ts"] > 0
            assert event["dur"] >= 0
        elif event["ph"] == "C":
            assert event["ts"] > 0
            assert all(isinstance(value, int) for value in event["args"].values())


def test_the_summary_has_shares_stages_queues_and_a_verdict(profiled: Path) -> None:
    summary = json.loads((profiled / "summary.json").read_text())
    assert (summary["first_step"], summary["last_step"]) == (3, 4)
    assert sum(summary["phases"].values()) == pytest.approx(1, abs=0.001)
    assert {"read", "draw", "decode", "resize", "augment", "transfer"} >= set(summary["stages"])
    assert {"read", "decoding", "ready"} == set(summary["queues"])
    assert summary["verdict"].startswith(f"slowest stage: {summary['slowest']} (busy ")


def test_the_table_lists_operators_by_name_and_by_shape(profiled: Path) -> None:
    text = (profiled / "operators.txt").read_text()
    by_name, by_shape = text.split("Operators by shapes of their inputs, sorted by self_cpu_time_total\n")
    assert "aten::convolution_backward" in by_name
    assert "Input Shapes" in by_shape
    assert f"[[{BATCH}, " in by_shape


def test_a_full_disk_costs_the_profile_and_not_the_run(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        small_disk(tmp_path / "run", "4m") as disk,
        training(digits, disk, "--profile", "1", "--profile-from", "2", batch=BATCH, device="cpu") as step,
    ):
        step()
        others = fill(disk)
        step()
        others.unlink()
        step()
        assert [p for p in (disk / "profile").iterdir() if p.name.endswith((".tmp", ".gz"))] == []
    printed = capsys.readouterr().err
    assert printed.count("warning: --profile: ") == 1
    assert "No space left on device" in printed


def test_a_run_that_ends_early_says_that_the_profile_is_incomplete(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with training(digits, tmp_path / "run", "--profile", "5", "--profile-from", "1", batch=BATCH, device="cpu") as step:
        step()
        step()
        assert torch.autograd._profiler_enabled()
    assert "warning: --profile: the run ended before all steps were profiled" in capsys.readouterr().err
    assert not torch.autograd._profiler_enabled()


def test_steps_that_this_start_does_not_train_are_reported(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--profile", "1", "--profile-from", "9", "--epochs", "1", "--warmup-epochs", "0", "--stop-after", "2")
    with training(digits, tmp_path / "run", *options, batch=BATCH, device="cpu") as step:
        step()
    warning = "warning: --profile-from 9: this start trains steps 1 to 2; nothing is profiled"
    assert warning in capsys.readouterr().err
    assert not (tmp_path / "run" / "profile").exists()
