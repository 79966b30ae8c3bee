"""`pipeline capacity` predicts the steps of trainings on simulated hosts from measurements on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.capacity import Options, Setting, compare, network
from tests.slurm.conftest import need

SETTING = Setting("50 Mbit/s", rate="50mbit")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_steps_on_one_and_two_hosts_are_predicted(tmp_path: Path, digits: Path) -> None:
    """On the second host, the link limits the step, so that other load on this machine matters little.

    benchmarks/capacity.py compares more networks, more ranks and with a smaller tolerance.
    """
    need("ip", "tc", "nsenter")
    options = Options(steps=2, intervals=2, global_batch=16)
    with network(SETTING, options, tmp_path, digits) as lab:
        one, two = compare(lab, SETTING, [lab.bench(8), lab.bench(16)], (1, 2))
    assert (one["limit"], two["limit"]) == ("compute", "gradient all-reduce")
    assert 0.5 < one["ratio"] < 2, (one, two)
    assert 0.75 < two["ratio"] < 1.33, (one, two)
    assert two["measured_seconds"] > 2 * one["measured_seconds"]  # a prediction without communication would be wrong
