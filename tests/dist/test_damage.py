"""After random damage to a run folder, set or cache, a new start gives no wrong result, traceback or lost work.

Every damage is determined by its number: set the environment variable `DAMAGE=set:17` to repeat one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from shards.convert.convert import convert
from shards.convert.options import Options
from shards.sources.scan import ScanOptions
from tests.dist.forked import Launcher
from tests.support.damages import Damage, copied, damage, repair
from tests.support.serving import serve

QUICK = {"run": range(3), "set": range(10), "cache": range(10)}
# 200 damages in total.
CAMPAIGN = {"run": range(3, 63), "set": range(10, 80), "cache": range(10, 80)}
SIZE = ("--size", 32, "--global-batch", 16)
OPTIONS = (*SIZE, "--epochs", 2, "--warmup-epochs", 0, "--augment", "light", "--log-every", 1, "--save-every", 2)
HALF, ALL = 4, 6  # optimizer steps; an epoch has 4
FAILED = {1, 2}  # exit statuses of handled errors


@dataclass
class Started:
    """Result of a start."""

    status: int
    errors: str

    def check(self, what: str) -> None:
        """Assert that it succeeded, or failed with a one-line error."""
        assert "Traceback" not in self.errors, f"{what}\n{self.errors}"
        assert self.status == 0 or self.status in FAILED, f"{what}: status {self.status}\n{self.errors}"
        if self.status in FAILED:
            lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1, f"{what}\n{self.errors}"


class Starter:
    """Starts damage_run.py in a forked process."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def __call__(self, *arguments: object, **environment: str) -> Started:
        environment = {"OMP_NUM_THREADS": "1"} | environment
        self._launcher.start("tests.dist.damage_run", *arguments, **environment)
        (status,) = self._launcher.join()
        return Started(status, self._launcher.errors.read_text(errors="replace"))


@pytest.fixture(scope="module")
def start(launch: Launcher) -> Starter:
    return Starter(launch)


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Set of 64 training and 16 validation images of 32x32 pixels, in several shards."""
    folder = tmp_path_factory.mktemp("small")
    draw = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 8)):
        for name in ("ant", "bee"):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 255, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{i}.jpg")
    convert(folder / "images", folder / "set", Options(scan=ScanOptions(workers=1), shard_bytes=20_000))
    return folder / "set"


def numbers(part: str, campaign: dict[str, range]) -> list[int]:
    """Return the numbers of the damages to test: those of the campaign, or the one in the environment."""
    requested = re.fullmatch(r"(\w+):(\d+)", os.environ.get("DAMAGE", ""))
    if requested is None:
        return list(campaign[part])
    return [int(requested[2])] if requested[1] == part else []


# -- a run folder


@pytest.fixture(scope="module")
def interrupted(start: Starter, small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run folder stopped after step 4, with checkpoints of steps 2 and 4; weights of an uninterrupted run)."""
    folder = tmp_path_factory.mktemp("run")
    for name, steps in (("half", HALF), ("whole", ALL)):
        ended = start("train", *OPTIONS, "--data", small_set, "--out", folder / name, "--stop-after", steps)
        assert ended.status == 0, ended.errors
    return folder / "half", folder / "whole" / "weights-last.safetensors"


def damage_runs(
    start: Starter, small_set: Path, interrupted: tuple[Path, Path], scratch: Path, which: list[int]
) -> None:
    half, reference = interrupted
    expected = load_file(reference)
    for number in which:
        with copied(half, scratch / "run") as run:
            done = damage(run, Random(f"run {number}"))
            what = f"run:{number}: {done}"
            command = ("train", *OPTIONS, "--data", small_set, "--out", run, "--stop-after", ALL)
            ended = start(*command)
            ended.check(what)
            if ended.status:  # nothing was lost: the run resumes after the damage is repaired
                repair(done, half, run)
                ended = start(*command)
            assert ended.status == 0, f"{what}: failed after the repair\n{ended.errors}"
            step = resumed_at(ended.errors)
            assert step >= newest_undamaged(done), f"{what}: lost steps: resumed at step {step}\n{ended.errors}"
            weights = load_file(run / "weights-last.safetensors")
            assert weights.keys() == expected.keys(), what
            wrong = [name for name in expected if not weights[name].equal(expected[name])]
            assert not wrong, f"{what}: weights differ from the uninterrupted run: {wrong[:3]}\n{ended.errors}"


def resumed_at(errors: str) -> int:
    found = re.search(r"step-(\d{8})\s*$", errors, re.MULTILINE)
    return int(found[1]) if found else 0


def newest_undamaged(done: Damage) -> int:
    """Return the step of the newest undamaged checkpoint."""
    damaged = {int(path.parent.name[5:]) for path in done.paths if path.parent.name.startswith("step-")}
    return max({0, 2, 4} - damaged)


# -- a set


def damage_sets(start: Starter, small_set: Path, scratch: Path, which: list[int]) -> None:
    """Damage a set on a local disk: the batches must be correct, or the set must be rejected."""
    reference = fed(start, small_set, scratch)
    rejected = 0
    for number in which:
        with copied(small_set, scratch / "set") as copy:
            done = damage(copy, Random(f"set {number}"))
            what = f"set:{number}: {done}"
            ended = start("read", scratch / "fed", *SIZE, "--data", copy)
            ended.check(what)
            if ended.status == 0:
                assert (scratch / "fed").read_text() == reference, f"{what}: wrong batches\n{ended.errors}"
            rejected += ended.status != 0
    assert rejected or len(which) < 10, "no damage was detected"


def fed(start: Starter, location: object, scratch: Path, **environment: str) -> str:
    ended = start("read", scratch / "fed", *SIZE, "--data", location, **environment)
    assert ended.status == 0, ended.errors
    return (scratch / "fed").read_text()


# -- a cache


def damage_caches(start: Starter, small_set: Path, scratch: Path, which: list[int]) -> None:
    """Damage the cache of a set on a server: batches must be correct, and files of other programs unchanged."""
    with serve(small_set) as site:
        fed(start, site.url, scratch, FAT_CACHE=str(scratch / "filled"))
        reference = fed(start, small_set, scratch)
        foreign = scratch / "filled" / "results" / "thesis.tex"
        foreign.parent.mkdir()
        foreign.write_text("years of work")
        for number in which:
            with copied(scratch / "filled", scratch / "cache") as cache:
                kept = (cache / "results" / "thesis.tex").rename(scratch / "thesis.tex")
                done = damage(cache, Random(f"cache {number}"))
                kept.rename(cache / "results" / "thesis.tex")
                what = f"cache:{number}: {done}"
                ended = start("read", scratch / "fed", *SIZE, "--data", site.url, FAT_CACHE=str(cache))
                ended.check(what)
                if ended.status == 0:
                    assert (scratch / "fed").read_text() == reference, f"{what}: wrong batches\n{ended.errors}"
                elif done.kind not in ("forbid", "folder") and not is_marker_damaged(done):
                    raise AssertionError(f"{what}: failed, although the file could be downloaded again\n{ended.errors}")
                assert (cache / "results" / "thesis.tex").read_text() == "years of work", what


def is_marker_damaged(done: Damage) -> bool:
    """Return whether a file was damaged that identifies the folder as a cache; it must then not be modified."""
    return any(path.name.startswith(".") or path.suffix == "" for path in done.paths)


PARTS = ("run", "set", "cache")


def try_damages(part: str, campaign: dict[str, range], request: pytest.FixtureRequest, scratch: Path) -> None:
    which = numbers(part, campaign)
    start, small_set = request.getfixturevalue("start"), request.getfixturevalue("small_set")
    if part == "run":
        damage_runs(start, small_set, request.getfixturevalue("interrupted"), scratch, which)
    elif part == "set":
        damage_sets(start, small_set, scratch, which)
    else:
        damage_caches(start, small_set, scratch, which)


@pytest.mark.parametrize("part", PARTS)
def test_damage_is_detected_or_harmless(part: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    try_damages(part, QUICK, request, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", PARTS)
def test_two_hundred_random_damages(part: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    try_damages(part, CAMPAIGN, request, tmp_path)
