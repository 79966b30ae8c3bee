"""Schedule, accounting, table and command line of the soak (tests/soak)."""

from __future__ import annotations

import itertools
import json
import shlex
from collections import Counter
from pathlib import Path

import pytest

from tests.soak.__main__ import arguments, repetition
from tests.soak.accounting import Failure, attribute_loss, caught_up, had_saved, settle
from tests.soak.failures import INJECT
from tests.soak.records import DoneStep
from tests.soak.report import Soak
from tests.soak.round import RoundResult
from tests.soak.schedule import BY_NAME, KINDS, RoundPlan, rounds

FAILURES = 14


def plans(count: int, seed: int = 0) -> list[RoundPlan]:
    return list(itertools.islice(rounds(seed, failures=FAILURES), count))


def test_the_schedule_is_a_function_of_the_seed() -> None:
    assert plans(8) == plans(8)
    assert [plan.failures for plan in plans(8)] != [plan.failures for plan in plans(8, seed=1)]


def test_every_kind_gets_its_part() -> None:
    drawn = Counter(planned.kind.name for plan in plans(60) for planned in plan.failures)
    cards = sum(kind.cards for kind in KINDS)
    for kind in KINDS:
        expected = 60 * FAILURES * kind.cards / cards
        assert drawn[kind.name] == pytest.approx(expected, rel=0.35), kind.name
    assert INJECT.keys() == {kind.name for kind in KINDS}


def test_kinds_that_only_the_watchdog_detects_wait_for_a_step() -> None:
    """Before the first step, the watchdog would allow half an hour."""
    for plan in plans(60):
        for planned in plan.failures:
            assert planned.kind.early or planned.trigger in ("step", "saving")
        assert plan.failures[0].trigger in ("step", "saving")


def test_two_to_four_ranks() -> None:
    for plan in plans(60):
        world = plan.world
        for planned in plan.failures:
            world += {"node removed": -1, "node added": 1}.get(planned.kind.name, 0)
            assert 2 <= world <= 4
            assert plan.elastic or not planned.kind.elastic
        assert sum(planned.kind.name == "damaged shard" for planned in plan.failures) <= 1


def test_every_fourth_round_has_no_failures_that_move_saves() -> None:
    """Else no round of many failures would check the bits of BatchNorm's statistics."""
    exact = {plan.number for plan in plans(60) if not any(planned.kind.moves_saves for planned in plan.failures)}
    assert exact >= set(range(2, 60, 4))
    assert len(exact) < 20
    assert {kind.name for kind in KINDS if kind.moves_saves} == {
        "damaged shard", "node removed", "node added", "preemption",
    }  # fmt: skip


def test_a_soak_of_failures_that_move_saves_has_them_in_all_rounds() -> None:
    for plan in itertools.islice(rounds(0, failures=3, kinds=(BY_NAME["preemption"],)), 8):
        assert [planned.kind.name for planned in plan.failures] == ["preemption"] * 3


def failure(kind: str = "kill rank", *, time: float = 10.0, ended: float | None = None, start: int = 0) -> Failure:
    ends_start = kind not in ("short stop", "slow disk")
    return Failure(0, kind, ends_start, "", "training", start, time, ended=time if ended is None else ended)


def done(time: float, start: int, step: int, seconds: float = 0.5) -> DoneStep:
    return DoneStep(time, start, step, seconds)


@pytest.mark.parametrize(("name", "numbers"), [("damaged shard", [1, 1, 1, 1]), ("node added", [0, 2, 0, 1])])
def test_a_round_has_fewer_failures_if_no_other_kind_is_possible(name: str, numbers: list[int]) -> None:
    plans = itertools.islice(rounds(0, failures=5, kinds=(BY_NAME[name],)), len(numbers))
    assert [len(plan.failures) for plan in plans] == numbers


def test_a_run_has_recovered_with_the_first_step_of_the_next_start() -> None:
    found = failure()
    settle(found, [done(9.9, 0, 6), done(10.2, 0, 7)])
    assert not found.settled
    steps = [done(9.9, 0, 6), done(10.2, 0, 7), done(18.0, 1, 6), done(19.0, 1, 7)]
    settle(found, steps)
    assert found.seconds_to_recover == pytest.approx(7.8)  # since step 7, which was done after the failure
    caught_up(found, 8, steps)
    assert found.seconds_to_catch_up == pytest.approx(9.0)


def test_a_step_of_the_same_start_is_no_recovery_from_a_failure_that_ends_it() -> None:
    found = failure("preemption")
    settle(found, [done(11.0, 0, 7), done(12.0, 0, 8)])
    assert not found.settled


def test_a_run_has_recovered_from_a_stop_with_a_step_after_its_end() -> None:
    found = failure("short stop", ended=13.0)
    settle(found, [done(10.1, 0, 7), done(10.9, 0, 8)])
    assert not found.settled
    settle(found, [done(10.1, 0, 7), done(10.9, 0, 8), done(13.4, 0, 9), done(20.0, 0, 10)])
    assert found.seconds_to_recover == pytest.approx(2.5)


def test_a_step_that_had_begun_before_the_failure_is_no_recovery() -> None:
    found = failure("short stop", ended=10.0)
    settle(found, [done(10.1, 0, 7, seconds=0.5)])
    assert not found.settled


def test_a_failure_that_has_not_ended_is_not_settled() -> None:
    found = failure("slow disk")
    found.ended = None
    settle(found, [done(11.0, 0, 7)])
    assert not found.settled


def test_lost_steps_belong_to_the_failure_that_ended_the_start() -> None:
    stop, kill, another = failure("short stop"), failure(), failure("kill all")
    assert attribute_loss(3, [stop, kill, another])
    assert (stop.lost_steps, kill.lost_steps, another.lost_steps) == (0, 3, 0)
    assert attribute_loss(2, [stop])
    assert stop.lost_steps == 2
    assert not attribute_loss(2, [])


def test_a_start_that_was_stopped_before_training_has_saved_nothing() -> None:
    assert had_saved("preempted", trained=True)
    assert not had_saved("preempted", trained=False)
    assert not had_saved("stalled", trained=True)


def result(*failures: Failure, violations: tuple[str, ...] = (), required: bool = False) -> RoundResult:
    return RoundResult(
        0, list(failures), list(violations), len(failures), 0.0, wall=100.0, training=40.0, step_seconds=0.5, steps=80,
        executed=84, starts=3, checked={"epochs": 4, "damaged samples skipped exactly once": 0},
        statistics_required=required, statistics_equal=required and not violations,
    )  # fmt: skip


def test_table_and_json(tmp_path: Path) -> None:
    kills = [failure(), failure(), failure()]
    for kill, seconds, lost in zip(kills, (4.0, 8.0, 5.0), (1, 3, 0), strict=True):
        kill.seconds_to_recover, kill.lost_steps = seconds, lost
    soak = Soak(seed=5, minutes=1)
    soak.add(result(*kills))
    soak.add(result(violations=("a sample is lost",)))
    soak.write(tmp_path / "soak.json")
    content = json.loads((tmp_path / "soak.json").read_text())
    assert content["by_kind"]["kill rank"] | {"phases": None} == {
        "count": 3, "lost_steps": 4, "median_seconds": 5.0, "worst_seconds": 8.0, "phases": None,
    }  # fmt: skip
    assert content["by_kind"]["all"] == content["by_kind"]["kill rank"]
    assert content["goodput"]["value"] == 0.4
    # A failure costs (4 + 8 + 5) / 3 s until the first step, and 4 / 3 steps of 0.5 s.
    assert content["goodput"]["lost_seconds_per_failure"] == pytest.approx(6.33)
    assert content["goodput"]["projected_at_one_failure_every"]["1 h"] == pytest.approx(1 - 6.33 / 3600, abs=1e-5)
    assert content["violations"] == ["round 0: a sample is lost"]
    assert content["checked"] == {"epochs": 8, "damaged samples skipped exactly once": 0}
    assert len(content["each_failure"]) == 3
    row = next(line for line in soak.table().splitlines() if line.startswith("kill rank"))
    assert row.split() == ["kill", "rank", "3", "4", "5.0", "8.0", "0", "0"]
    assert "goodput 40.0%" in soak.table()


def test_rounds_with_equal_batchnorm_statistics_are_shown_also_if_there_are_none(tmp_path: Path) -> None:
    soak = Soak(seed=5, minutes=1)
    for expected, added in (
        ((0, 0), result()),
        ((0, 1), result(violations=("bn.running_var differs",), required=True)),
        ((1, 2), result(required=True)),
    ):
        soak.add(added)
        soak.write(tmp_path / "soak.json")
        content = json.loads((tmp_path / "soak.json").read_text())["rounds_with_equal_batchnorm_statistics"]
        assert (content["equal"], content["required"]) == expected
        assert f"{expected[0]} of {expected[1]} rounds with equal BatchNorm statistics" in soak.table()
        assert "0 damaged samples skipped exactly once" in soak.table()


def test_the_command_that_repeats_a_round_has_all_options_that_change_it() -> None:
    line = "--seed 3 --failures 7 --epochs 2 --pace 0.35 --kinds 'kill rank' 'node added' --minutes 9 --rounds 4"
    args = arguments(shlex.split(line))
    command, _, options = repetition(args, 12).partition(" --")
    repeated = vars(arguments(shlex.split(f"--{options}")))
    assert command == "python -m tests.soak"
    others = {"round": 12, "rounds": None, "minutes": 60.0}  # they select rounds
    assert repeated == vars(args) | others
