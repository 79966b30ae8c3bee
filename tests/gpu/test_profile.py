"""`--profile` on a GPU: `make gpu`. tests/unit/test_profiler.py and tests/dist/test_profile.py are its CPU tests."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pytest
import torch

from launch.profiling.phases import DATA_WAIT, OTHER, PHASES, StepPhases
from tests.support.launching import python

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

OPTIONS = ("--recipe", "launch/recipes/digits.toml", "--size", "64", "--log-every", "1", "--stop-after", "8")


@pytest.mark.parametrize("compile_mode", ["cudagraphs", "off"])
def test_a_profile_has_kernels_memory_and_the_feed_process(tmp_path: Path, digits: Path, compile_mode: str) -> None:
    run = tmp_path / "run"
    options = ("--data", digits, "--out", run, "--zero", "0", "--compile", compile_mode)
    done = python(tmp_path, "launch/train.py", *OPTIONS, *options, "--profile", "3", "--profile-from", "4")
    assert done.returncode == 0, done.stderr
    assert "profiled steps 4 to 6" in done.stderr
    assert "warning: --profile" not in done.stderr
    folder = run / "profile"
    trace = json.loads(gzip.decompress((folder / "trace-step-4.json.gz").read_bytes()))["traceEvents"]
    kernels = [e for e in trace if e.get("cat") == "kernel"]
    assert kernels
    spans = [e for e in trace if e.get("cat") == "loader" and e["ph"] == "X"]
    assert {"read", "draw", "send", "decode", "augment", "transfer"} <= {e["name"] for e in spans}
    begin, end = min(e["ts"] for e in kernels), max(e["ts"] + e["dur"] for e in kernels)
    assert any(begin < e["ts"] < end for e in spans), "kernels and stages are on one timeline"
    memory = pickle.loads((folder / "memory.pickle").read_bytes())
    assert memory["segments"]
    assert any(memory["device_traces"])
    assert "sorted by self_device_time_total" in (folder / "operators.txt").read_text()
    shares = json.loads((folder / "summary.json").read_text())["phases"]
    assert shares["forward"] > 0
    assert shares["backward"] > 0
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)


def test_phases_are_times_of_the_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    phases, matrix = StepPhases(device), torch.randn(4096, 4096, device=device)
    phases.begin_step()
    for name, count in zip(PHASES, (1, 20, 1), strict=True):
        with phases.phase(name):
            for _ in range(count):
                matrix = (matrix @ matrix).tanh()
    phases.end_step()
    seconds = phases.seconds()
    assert list(seconds) == [DATA_WAIT, *PHASES, OTHER]
    assert seconds["backward"] > 2 * seconds["optimizer"]
