"""Damage a run folder, a set and a cache at random, start again: never a wrong result, a traceback, or lost work.

Every damage has a number, from which alone it follows: `DAMAGE=set:17` in the environment repeats one.
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
# 200 in all.
CAMPAIGN = {"run": range(3, 63), "set": range(10, 80), "cache": range(10, 80)}
SIZE = ("--size", 32, "--global-batch", 16)
OPTIONS = (*SIZE, "--epochs", 2, "--warmup-epochs", 0, "--augment", "light", "--log-every", 1, "--save-every", 2)
HALF, WHOLE = 4, 6  # optimiser steps; 4 an epoch
REFUSED = {1, 2}


@dataclass
class Started:
    """What came of a start."""

    status: int
    errors: str

    def check(self, what: str) -> None:
        """AssertionError unless it ended well, or with one clear line."""
        assert "Traceback" not in self.errors, f"{what}\n{self.errors}"
        assert self.status == 0 or self.status in REFUSED, f"{what}: status {self.status}\n{self.errors}"
        if self.status in REFUSED:
            lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1, f"{what}\n{self.errors}"


class Starter:
    """Starts damage_run.py again and again."""

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
    """64 training and 16 validation images of 32x32, in several shards."""
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
    """The damages to try: those of the campaign, or the one that the environment asks for."""
    wanted = re.fullmatch(r"(\w+):(\d+)", os.environ.get("DAMAGE", ""))
    if wanted is None:
        return list(campaign[part])
    return [int(wanted[2])] if wanted[1] == part else []


# -- a run folder


@pytest.fixture(scope="module")
def interrupted(start: Starter, small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run folder stopped half-way, with checkpoints of steps 2 and 4; the weights of the whole run)."""
    folder = tmp_path_factory.mktemp("run")
    for name, steps in (("half", HALF), ("whole", WHOLE)):
        ended = start("train", *OPTIONS, "--data", small_set, "--out", folder / name, "--stop-after", steps)
        assert ended.status == 0, ended.errors
    return folder / "half", folder / "whole" / "weights.safetensors"


def damage_runs(
    start: Starter, small_set: Path, interrupted: tuple[Path, Path], scratch: Path, which: list[int]
) -> None:
    half, reference = interrupted
    whole = load_file(reference)
    for number in which:
        with copied(half, scratch / "run") as run:
            done = damage(run, Random(f"run {number}"))
            what = f"run:{number}: {done}"
            command = ("train", *OPTIONS, "--data", small_set, "--out", run, "--stop-after", WHOLE)
            ended = start(*command)
            ended.check(what)
            if ended.status:  # nothing is lost: with the damage undone, the run goes on
                repair(done, half, run)
                ended = start(*command)
            assert ended.status == 0, f"{what}: refused although repaired\n{ended.errors}"
            step = resumed_at(ended.errors)
            assert step >= newest_whole(done), f"{what}: work was lost: resumed at step {step}\n{ended.errors}"
            weights = load_file(run / "weights.safetensors")
            assert weights.keys() == whole.keys(), what
            wrong = [name for name in whole if not weights[name].equal(whole[name])]
            assert not wrong, f"{what}: other weights than the undisturbed run's: {wrong[:3]}\n{ended.errors}"


def resumed_at(errors: str) -> int:
    found = re.search(r"step-(\d{8})\s*$", errors, re.MULTILINE)
    return int(found[1]) if found else 0


def newest_whole(done: Damage) -> int:
    """The step of the newest checkpoint that the damage has left alone."""
    damaged = {int(path.parent.name[5:]) for path in done.paths if path.parent.name.startswith("step-")}
    return max({0, 2, 4} - damaged)


# -- a set


def damage_sets(start: Starter, small_set: Path, scratch: Path, which: list[int]) -> None:
    """Damage a set on a local disk: what is fed is right, or the set is refused."""
    reference = fed(start, small_set, scratch)
    refused = 0
    for number in which:
        with copied(small_set, scratch / "set") as copy:
            done = damage(copy, Random(f"set {number}"))
            what = f"set:{number}: {done}"
            ended = start("read", scratch / "fed", *SIZE, "--data", copy)
            ended.check(what)
            if ended.status == 0:
                assert (scratch / "fed").read_text() == reference, f"{what}: other batches\n{ended.errors}"
            refused += ended.status != 0
    assert refused or len(which) < 10, "no damage was noticed"


def fed(start: Starter, location: object, scratch: Path, **environment: str) -> str:
    ended = start("read", scratch / "fed", *SIZE, "--data", location, **environment)
    assert ended.status == 0, ended.errors
    return (scratch / "fed").read_text()


# -- a cache


def damage_caches(start: Starter, small_set: Path, scratch: Path, which: list[int]) -> None:
    """Damage a cache of a set on a server: what is fed is right, and foreign files stay as they are."""
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
                    assert (scratch / "fed").read_text() == reference, f"{what}: other batches\n{ended.errors}"
                elif done.kind not in ("forbid", "folder") and not marks(done):
                    raise AssertionError(f"{what}: refused, though it could be fetched again\n{ended.errors}")
                assert (cache / "results" / "thesis.tex").read_text() == "years of work", what


def marks(done: Damage) -> bool:
    """Whether the damage is to a file by which a cache knows that it is its own: then it must not touch the folder."""
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
def test_a_damage_is_noticed_or_harmless(part: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    try_damages(part, QUICK, request, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", PARTS)
def test_two_hundred_damages(part: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    try_damages(part, CAMPAIGN, request, tmp_path)
