"""Training runs with `--profile`, alone and on several ranks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.dist.trainings import Trainer
from tests.support.launching import lines

FEW_STEPS = ("--recipe", "launch/recipes/digits.toml", "--size", "32", "--log-every", "1", "--stop-after", "5")
PROFILE = ("--profile", "3", "--profile-from", "2")


def trace_of(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress((run / "profile/trace-step-2.json.gz").read_bytes()))[
        "traceEvents"
    ]
    return found


@pytest.mark.slow
def test_a_profiled_run_has_the_same_losses_and_names_its_files(train: Trainer, tmp_path: Path, digits: Path) -> None:
    results = {}
    for name, options in (("plain", ()), ("profiled", PROFILE)):
        done = train(*FEW_STEPS, "--data", digits, "--out", tmp_path / name, *options)
        assert done.returncode == 0, done.stderr
        trained = [(line["step"], line["loss"], line["grad_norm"]) for line in lines(tmp_path / name, "train")]
        results[name] = trained, [(line["top1"], line["loss"]) for line in lines(tmp_path / name, "eval")]
    assert len(results["plain"][0]) == 5
    assert results["profiled"] == results["plain"]

    folder = tmp_path / "profiled" / "profile"
    assert {path.name for path in folder.iterdir()} == {"summary.json", "operators.txt", "trace-step-2.json.gz"}
    assert "profiled steps 2 to 4 on rank 0" in done.stderr
    assert f"wrote {folder}/summary.json, operators.txt, trace-step-2.json.gz (open it at https://ui" in done.stderr
    assert json.loads((folder / "summary.json").read_text())["verdict"] in done.stderr
    assert "USDT" not in done.stderr, "torch.profiler's own log lines"
    assert not (tmp_path / "plain" / "profile").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "collective"), [("0", "gloo:all_reduce"), ("1", "gloo:all_gather")])
def test_with_several_ranks_rank_0_traces_its_collectives(
    train: Trainer, tmp_path: Path, digits: Path, zero: str, collective: str
) -> None:
    run = tmp_path / "run"
    done = train(*FEW_STEPS, "--data", digits, "--out", run, "--zero", zero, "--feed-process", "on", *PROFILE, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("profiled steps") == 1
    trace = trace_of(run)
    assert [e for e in trace if e["name"] == collective], sorted({e["name"] for e in trace if "gloo" in e["name"]})
    tracks = {e["args"]["name"] for e in trace if e["name"] == "thread_name"}
    assert {"training loop", "loader", "feed process"} <= tracks
    for phase in ("forward", "backward", "optimizer"):
        assert json.loads((run / "profile" / "summary.json").read_text())["phases"][phase] > 0
