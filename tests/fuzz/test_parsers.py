"""On mutated files, every parser succeeds or raises a one-line error, in bounded time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.runner import CORPUS, replay
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
QUICK_SECONDS = 20
CAMPAIGN_SECONDS = 600
BY_NAME = {target.name: target for target in TARGETS}
SAVED = sorted(path.relative_to(CORPUS).as_posix() for path in CORPUS.glob("*/*"))


def run(seconds: float, seed: int, out: Path) -> dict[str, dict[str, Any]]:
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.runner",
        "--seconds",
        str(seconds),
        "--seed",
        str(seed),
        "--out",
        str(out),
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return {report["target"]: report for report in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run(QUICK_SECONDS, 1, tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", BY_NAME)
def test_mutated_files_are_parsed_or_rejected_with_one_line(name: str, quick: dict[str, dict[str, Any]]) -> None:
    report = quick[name]
    assert not report["failures"], "\n".join(report["failures"])
    assert report["inputs"], "no file was tested in the available time"
    if report["inputs"] >= 10 and not BY_NAME[name].tolerant:
        assert report["rejected"], "no mutated file was rejected: the mutations do not reach the parser"


@pytest.mark.slow
@pytest.mark.timeout(CAMPAIGN_SECONDS * 3)
def test_ten_minutes_of_mutated_files(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    reports = run(CAMPAIGN_SECONDS, seed, tmp_path)
    failures = [failure for report in reports.values() for failure in report["failures"]]
    print(f"seed {seed}:", {name: report["inputs"] for name, report in reports.items()})
    assert not failures, f"seed {seed}:\n" + "\n".join(failures)


@pytest.mark.parametrize("name", SAVED)
def test_files_that_once_crashed_a_parser(name: str, tmp_path: Path) -> None:
    target = BY_NAME[name.partition("/")[0]]
    replay(target, (CORPUS / name).read_bytes(), tmp_path)
