"""Seeds, results and table of `pipeline race` (launch/race/)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli import main as pipeline
from launch.race.options import parse_seeds
from launch.race.results import SeedResult, median_seconds, read_result, table, write_results
from shards.errors import UserError


def result(seed: int, seconds: float | None, top1: float = 0.76, epoch: int = 9) -> SeedResult:
    return SeedResult(seed, seconds, seconds, top1, epoch, epoch * 1251, 1, "CPU", 1)


def test_seeds_are_separated_by_commas() -> None:
    assert parse_seeds("0") == [0]
    assert parse_seeds("2,0,13") == [2, 0, 13]


@pytest.mark.parametrize("text", ["", "1,", "a", "-1", "1.5", "0 1", f"{1 << 63}", "9" * 30, "²"])
def test_seeds_that_are_no_numbers_in_range_are_rejected(text: str) -> None:
    with pytest.raises(UserError, match="expected numbers from 0 to below 2\\^63, separated by commas"):
        parse_seeds(text)


def test_a_seed_may_occur_only_once() -> None:
    with pytest.raises(UserError, match="--seeds 1,2,1: a seed occurs twice"):
        parse_seeds("1,2,1")


@pytest.mark.parametrize(
    ("times", "expected"),
    [([5.0], 5.0), ([5.0, 1.0, 3.0], 3.0), ([5.0, None, 3.0], 5.0), ([None, 1.0, None], None), ([None], None)],
)
def test_runs_that_did_not_reach_the_target_count_as_infinitely_long(
    times: list[float | None], expected: float | None
) -> None:
    assert median_seconds([result(seed, time) for seed, time in enumerate(times)]) == expected


def test_the_table_has_a_row_per_seed_and_the_median() -> None:
    shown = table([result(0, 182.34), result(1, None, 0.7513, 18), result(2, 4000.0)], 0.76)
    assert shown == [
        "seed  reached  epoch    step  seconds   top-1",
        "   0      yes      9  11,259    182.3  76.00%",
        "   1       no     18  22,518        -  75.13%",
        "   2      yes      9  11,259  4,000.0  76.00%",
        "time to 76.00%, median of 3 seeds: 4,000.0 s (1:06:40)",
    ]
    assert table([result(0, None)], 0.76)[-1] == "time to 76.00%, median of 1 seed: not reached"


def test_the_json_file_has_everything(tmp_path: Path) -> None:
    write_results(tmp_path / "race.json", {"dataset": "set"}, [result(0, 3.0), result(1, None)])
    found = json.loads((tmp_path / "race.json").read_text())
    assert (found["dataset"], found["median_seconds"]) == ("set", None)
    assert [entry["seconds"] for entry in found["results"]] == [3.0, None]


def test_the_result_of_a_resumed_run_is_read_from_its_metrics(tmp_path: Path) -> None:
    def start(time: float, step: int, clock: float) -> list[dict[str, object]]:
        head = {
            "total_steps": 30, "world": 2, "engine": "", "model": "fat_b0", "device": "CPU", "host": "a",
            "steps_per_epoch": 10, "epochs": 3, "global_batch": 4, "started": time - 5.0,
        }  # fmt: skip
        run_start = {"kind": "run_start", "time": time, "step": step, "clock": clock, "target_top1": 0.5}
        return [{"kind": "start", "time": time, "step": step, **head}, run_start]

    def evaluation(time: float, step: int, top1: float, clock: float) -> dict[str, object]:
        values = {"epoch": step // 10, "top1": top1, "top5": 1.0, "loss": 1.0, "samples": 4, "clock": clock}
        return {"kind": "eval", "time": time, "step": step, **values}

    found = [*start(100.0, 0, 0.0), evaluation(110.0, 10, 0.25, 10.0)]
    found += [*start(200.0, 10, 11.0), evaluation(208.0, 20, 0.5, 19.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    assert read_result(tmp_path, 7, 0.5) == SeedResult(7, 19.0, 108.0, 0.5, 2, 20, 2, "CPU", 2)
    assert read_result(tmp_path, 7, 0.75).wall_seconds is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "76"), "--to 76"),
        (("--to", "0.5", "--seeds", "x"), "--seeds x: expected numbers"),
        (("--to", "0.5", "--recipe", "digit"), "digit: no such recipe file; did you mean digits?"),
        (("--to", "0.5", "--", "--seed", "3"), "--seed: a race sets this option itself; omit it"),
        (("--to", "0.5", "--", "--target_top1=0.3"), "--target-top1: a race sets this option itself; omit it"),
        (("--to", "0.5", "--", "--epoch", "3"), "--epoch: no such option"),
        (("--to", "0.5", "--epochs", "3"), "write training options after --: pipeline race SET -- --variant b3"),
    ],
)
def test_invalid_races_are_rejected_before_anything_is_trained(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline(["race", "set", "--out", str(tmp_path / "race"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "race").exists()
