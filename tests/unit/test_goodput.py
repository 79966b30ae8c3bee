"""Goodput (launch/monitor/goodput.py): every second of a run's wall time is in the category in which it was spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launch.cli import main
from launch.monitor import goodput as categories
from launch.monitor.goodput import CATEGORIES, goodput
from launch.run.metrics_file import METRICS_NAME, final_timeline, read_metrics, starts
from launch.run.status import write_status
from tests.support.histories import EVALUATION, SAVE, STEP, WAIT, History, StartPlan, simulate

SECONDS = st.floats(0, 100)
PLANS = st.builds(
    StartPlan,
    steps=st.integers(0, 30),
    ended=st.sampled_from(["killed", "preempted", "evaluating"]),
    startup=SECONDS,
    compile=SECONDS,
    down=SECONDS,
    queue=SECONDS,
    unlogged=SECONDS,
    torn=st.booleans(),
    world=st.integers(1, 8),
)


@st.composite
def histories(draw: st.DrawFn, plans: st.SearchStrategy[list[StartPlan]]) -> History:
    return simulate(
        draw(plans),
        total=draw(st.integers(2, 60)),
        log_every=draw(st.integers(2, 10)),
        save_every=draw(st.integers(2, 20)),
        eval_every=draw(st.none() | st.integers(2, 20)),
    )


@settings(max_examples=300, deadline=None)
@given(histories(st.lists(PLANS, max_size=6)))
def test_every_second_is_in_its_category(history: History) -> None:
    trained = [line for line in history.lines if line["kind"] == "train"]
    assume(
        any(line["steps"] > 1 or line["first_step_seconds"] is None for line in trained)
    )  # to know a step's duration
    found = goodput(history.lines)
    assert tuple(found.categories) == CATEGORIES
    assert found.wall == sum(found.categories.values())
    assert found.wall == pytest.approx(history.time - 1.8e9, abs=1e-4)
    assert all(seconds >= 0 for seconds in found.categories.values())
    for name, seconds in found.categories.items():
        assert seconds == pytest.approx(history.seconds[name], abs=1e-4), name
    assert found.lost_steps == history.lost_steps
    assert found.notes == ()


@settings(max_examples=50, deadline=None)
@given(histories(st.just([])))
def test_a_run_without_interruptions_loses_nothing(history: History) -> None:
    found = goodput(history.lines)
    assert found.categories[categories.LOST] == found.categories[categories.DOWN] == 0.0
    assert found.lost_steps == 0
    assert found.starts[0].ended == "finished"


@settings(max_examples=100, deadline=None)
@given(histories(st.lists(PLANS, max_size=6)))
def test_final_timeline_has_every_step_once(history: History) -> None:
    final = final_timeline(history.lines)
    intervals = [(line["step"] - line["steps"], line["step"]) for line in final if line["kind"] == "train"]
    assert intervals[0][0] == 0
    assert [begin for begin, _ in intervals[1:]] == [end for _, end in intervals[:-1]]
    evaluated = [line["step"] for line in final if line["kind"] == "eval"]
    assert evaluated == sorted(set(evaluated))


def test_final_timeline_has_the_last_evaluation_of_a_step() -> None:
    """The start that evaluated step 10 first was killed before it saved the result."""
    history = simulate([StartPlan(steps=10, ended="evaluating")], total=20, log_every=5, save_every=5, eval_every=10)
    (number,) = (n for n, line in enumerate(history.lines) if line["kind"] == "eval" and line["step"] == 10)
    first = history.lines[number] | {"top1": 0.25}
    final = final_timeline([*history.lines[:number], first, *history.lines[number:]])
    assert [(line["step"], line["top1"]) for line in final if line["kind"] == "eval"] == [(10, 0.5), (20, 0.5)]


def test_metrics_without_lines_have_no_timeline() -> None:
    assert final_timeline([]) == starts([]) == []


HEAD = {"kind": "start", "time": 1010.0, "started": 1005.0, "step": 0, "world": 1, "restore_seconds": 2.0}
INTERVAL = {"kind": "train", "steps": 10, "seconds": 10.0, "data_wait": 0.5}


def test_intervals_are_prorated_at_the_checkpoint_from_which_the_run_was_resumed() -> None:
    """A checkpoint was saved in the middle of an interval: 4 of its 10 steps were repeated."""
    lines = [
        HEAD,
        INTERVAL | {"time": 1020.0, "step": 10},
        INTERVAL | {"time": 1030.0, "step": 20},
        HEAD | {"time": 1040.0, "started": 1030.0, "step": 16},
        INTERVAL | {"time": 1050.0, "step": 26},
    ]
    found = goodput(lines)
    assert found.lost_steps == 4
    assert found.categories[categories.LOST] == 4.0
    assert found.categories[categories.WAITING] == found.categories[categories.TRAINING] == 13.0


def test_a_checkpoint_that_two_crashes_precede_counts_the_steps_of_both_as_lost() -> None:
    """The second start fell back to an older checkpoint than the first, so all of its steps are lost."""
    plans = [StartPlan(steps=25), StartPlan(steps=5, world=2)]
    history = simulate(plans, total=30, log_every=5, save_every=10)
    assert [start.first_step for start in goodput(history.lines).starts] == [0, 20, 20]
    lines = [line | {"step": 10} if number == 2 else line for number, line in numbered_starts(history.lines)]
    found = goodput(lines)
    assert [start.lost_steps for start in found.starts] == [15, 5, 0]
    assert [start.world for start in found.starts] == [1, 2, 1]


def numbered_starts(lines: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Return (number of its start, line), and -1 for lines that are not the first of a start."""
    return [(number if line is start[0] else -1, line) for number, start in enumerate(starts(lines)) for line in start]


def test_time_that_no_line_explains_is_other() -> None:
    lines = [HEAD, INTERVAL | {"time": 1023.0, "step": 10}, INTERVAL | {"time": 1040.0, "step": 20}]
    found = goodput(lines)
    assert (
        found.categories[categories.STARTUP] == 8.0
    )  # nothing was restored, although looking for a checkpoint took 2 s
    assert found.categories[categories.RESTORE] == 0.0
    assert found.categories[categories.OTHER] == 7.0
    assert found.wall == 35.0


def test_the_queue_of_a_job_that_was_submitted_long_ago_begins_when_the_previous_start_ended() -> None:
    again = {"time": 1055.0, "started": 1050.0, "queued": 900.0, "step": 10}
    lines = [HEAD | {"queued": 1000.0}, INTERVAL | {"time": 1020.0, "step": 10}, HEAD | again]
    found = goodput(lines)
    assert (found.categories[categories.QUEUED], found.categories[categories.DOWN]) == (5.0 + 30.0, 0.0)
    assert found.wall == 55.0


def test_a_run_whose_start_lines_are_missing_is_still_divided_into_starts() -> None:
    history = simulate([StartPlan(steps=25)], total=30, log_every=5, save_every=10)
    found = goodput([line for line in history.lines if line["kind"] != "start"])
    assert [(start.first_step, start.last_step, start.world) for start in found.starts] == [
        (0, 25, None),
        (20, 30, None),
    ]
    assert found.lost_steps == 5
    assert found.wall == pytest.approx(history.time - 1.8e9 - 5.0)  # without the start-up of the first start


def test_a_clock_that_goes_back_is_noted_and_makes_no_time_negative() -> None:
    """The other starts run on a host whose clock is ten minutes behind, and which is later set back by a minute."""
    history = simulate([StartPlan(steps=20), StartPlan(steps=10)], total=40, log_every=5, save_every=10)
    shifts = [0.0, -600.0, -600.0]
    lines = [
        {**line, **{name: line[name] + shift for name in ("time", "started") if name in line}, "previous_alive": None}
        for start, shift in zip(starts(history.lines), shifts, strict=True)
        for line in start
    ]
    lines[-4:] = [line | {"time": line["time"] - 60} for line in lines[-4:]]
    found = goodput(lines)
    assert [note.split(";")[0] for note in found.notes] == [
        "start 2: the clock went back by 570 s",
        "start 3: the clock went back by 45 s",
    ]
    assert all(seconds >= 0 for seconds in found.categories.values())
    assert found.categories[categories.TRAINING] == pytest.approx(history.seconds[categories.TRAINING], abs=1e-3)
    assert found.categories[categories.DOWN] == pytest.approx(30.0, abs=1e-3)  # the other 30 s are unknown


def test_an_inexact_time_of_the_start_counts_no_second_twice() -> None:
    """The kernel reports that the second start began 0.9 s before it did, when the first one was still running."""
    history = simulate([StartPlan(steps=20, down=0.0)] * 2, total=40, log_every=5, save_every=10)
    lines = [
        line | {"started": line["started"] - 0.9} if number == 1 else line
        for number, line in numbered_starts(history.lines)
    ]
    found = goodput(lines)
    assert found.notes == ()
    assert found.wall == pytest.approx(history.time - 1.8e9, abs=1e-4)


def test_an_interrupted_evaluation_is_lost_work_but_loses_no_steps() -> None:
    history = simulate([StartPlan(steps=10, ended="evaluating")], total=20, log_every=5, save_every=5, eval_every=10)
    found = goodput(history.lines)
    assert found.categories[categories.LOST] == EVALUATION / 2
    assert found.categories[categories.EVALUATION] == 2 * EVALUATION
    assert found.lost_steps == 0
    assert [start.ended for start in found.starts] == ["preempted (SIGTERM)", "finished"]


def test_the_save_of_a_run_that_was_preempted_and_not_resumed_yet_is_saving() -> None:
    history = simulate([StartPlan(steps=7, ended="preempted")], total=20, log_every=5, save_every=5)
    lines = starts(history.lines)[0]
    lines[-1] = lines[-1] | {"time": lines[-1]["time"] + 1.5}
    found = goodput(lines)
    assert found.categories[categories.SAVING] == pytest.approx(SAVE + 1.5, abs=1e-4)
    assert found.categories[categories.OTHER] == 0.0


@pytest.mark.parametrize(
    ("status", "ended", "lost"), [("running", "running", 0.0), ("killed", "killed", 8.0), (None, "unknown", 8.0)]
)
def test_work_after_the_last_line_is_lost_unless_the_run_is_still_running(
    status: str | None, ended: str, lost: float
) -> None:
    lines = simulate([], total=20, log_every=5, save_every=10).lines[:-1]
    found = goodput(lines, status=status, alive=lines[-1]["time"] + 8.0)
    assert found.starts[-1].ended == ended
    assert found.running == (ended == "running")
    assert found.categories[categories.LOST] == pytest.approx(lost, abs=1e-4)


def write(run: Path, lines: list[dict[str, Any]]) -> Path:
    (run / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


START = {
    **{"engine": "ddp", "model": "fat_b0", "device": "cpu", "host": "a", "total_steps": 40, "steps_per_epoch": 10},
    **{"epochs": 4, "global_batch": 8},
}
TRAIN = {"images_per_second": 8.0}


def complete(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines with the fields of the schema that goodput does not use."""
    return [line | {"start": START, "train": TRAIN}.get(line["kind"], {}) for line in lines]


def test_command_prints_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = [StartPlan(steps=25, queue=90.0), StartPlan(steps=5, ended="preempted", world=2)]
    history = simulate(plans, total=40, log_every=5, save_every=10)
    write(tmp_path, complete(history.lines))
    assert main(["goodput", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    assert "in 3 starts, 5 steps were repeated" in table
    assert [line.split() for line in table.splitlines() if line.endswith("preempted (SIGTERM)")] == [
        ["2", "2", "20", "25", "0", "22", "s", "17.0%", "preempted", "(SIGTERM)"]
    ]
    assert main(["goodput", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    badput = dict(found["badput_time"])
    custom = badput.pop("CUSTOM_BADPUT_EVENTS")
    parts = [found["goodput_time"]["TOTAL"], *badput.values(), *custom.values()]
    assert sum(parts) == pytest.approx(found["total_elapsed_time"], abs=0.01)
    assert custom == {"EVAL_STEP": 0.0, "QUEUED": 90.0}
    assert found["goodput"] == pytest.approx(40 * STEP * (1 - WAIT) / (history.time - 1.8e9), abs=1e-6)
    assert (found["lost_steps"], found["disruption_count"], found["max_productive_step"]) == (5, 2, 40)
    assert [start["ended"] for start in found["starts"]] == ["killed", "preempted (SIGTERM)", "finished"]


def test_command_skips_damaged_lines_and_says_that_a_run_is_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = complete(simulate([], total=20, log_every=5, save_every=10).lines[:-1])
    write(tmp_path, lines)
    with (tmp_path / METRICS_NAME).open("ab") as file:
        file.write(b'{"kind": "train", "time": 1e300, "step": 30}\n\xff\n')
    write_status(tmp_path, "running")
    assert len(read_metrics(tmp_path, lambda _: None)) == len(lines)
    assert main(["goodput", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err == f"warning: {tmp_path / METRICS_NAME}: skipped 2 damaged lines\n"
    assert "the run is still running" in out


def test_command_rejects_a_folder_without_metrics_and_empty_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["goodput", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("it is not a run folder; use the --out folder of a training run\n")
    write(tmp_path, [])
    assert main(["goodput", str(tmp_path)]) == 2
    assert "contains no lines" in capsys.readouterr().err


def test_the_pause_between_a_finished_run_and_its_extension_does_not_count() -> None:
    day = 86_400.0
    finished = simulate([], total=10, log_every=5, save_every=5).lines
    times = {"time": day, "step": 10, "started": day}
    extension = [{name: value + times.get(name, 0) if name in times else value for name, value in line.items()}
                 for line in finished]  # fmt: skip
    alone, both = goodput(finished), goodput([*finished, *extension])
    assert both.categories["down time"] == 0
    assert both.wall == pytest.approx(2 * alone.wall)
    assert both.categories["training"] == pytest.approx(2 * alone.categories["training"])
    assert [(start.first_step, start.last_step, start.ended) for start in both.starts] == [
        (0, 10, "finished"),
        (10, 20, "finished"),
    ]
    assert (both.lost_steps, both.to_dict()["disruption_count"]) == (0, 0)
