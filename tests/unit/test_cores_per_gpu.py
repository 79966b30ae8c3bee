"""The CPU cores that a GPU needs, computed from measured figures (benchmarks/cores_per_gpu.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cores_per_gpu import HostCost, decode_paths, table, table_of_results, training_rates

ROOT = Path(__file__).resolve().parents[2]
STEPS = {f"step-b{n}": {"figures": {"results": [{"way": "graph", "images/s": 1000.0}]}} for n in range(4)}
GPU = {
    **STEPS,
    "bench-b3": {"figures": {"model": {"rate": 3000.0}}},
    "decode": {
        "figures": {
            "medians": {
                "slice, hardware 0": {"rate": 5000.0, "cpu": 2e-3},
                "slice, hardware 0.9": {"rate": 18000.0, "cpu": 3e-4},
                "slice, hardware 1": {"rate": 20000.0, "cpu": 1e-4},
            }
        }
    },
}
LOCK = {"cpu_ms_per_batch": {"batch": 100, "plan": 2.0, "external_source and DALI's run": 50.0, "draws": 3.0}}
CPU_SECONDS = {"decode only, window": 1e-3, "decode only, whole": 2e-3, "whole, FFCV": 3e-3}
PATHS = {"medians": {name: {"cpu": seconds} for name, seconds in CPU_SECONDS.items()}}


def test_the_fastest_measured_step_of_a_variant_counts() -> None:
    assert training_rates(GPU) == {"b0": 1000.0, "b1": 1000.0, "b2": 1000.0, "b3": 3000.0}


def test_costs_are_those_of_the_decoder_and_of_the_other_work_of_the_loader() -> None:
    prepared = 5e-5  # 5 ms per 100 images, without the calls of DALI
    costs = {path.name: path.cost for path in decode_paths(GPU, LOCK, PATHS)}
    expected = [1e-4, 3e-4, 0.65 * 1e-4 + 0.35 * 2e-3, 2e-3, 1e-3, 2e-3]
    assert list(costs.values()) == pytest.approx([*(prepared + cost for cost in expected), 3e-3])


def test_cores_are_rate_times_cost_and_one_that_launches() -> None:
    assert HostCost("x", 1e-3, None).cores(5000.0) == pytest.approx(6.0)
    lines = table({"b0": 5000.0, "b1": 100.0}, [HostCost("x", 1e-3, 7000.0), HostCost("y", 2e-3, None)]).splitlines()
    assert lines[2] == "| x | 1.00 | 7,000 | 6.0 | 1.1 |"
    assert lines[3] == "| y | 2.00 | - | 11.0 | 1.2 |"


def test_the_table_of_the_page_is_current() -> None:
    assert table_of_results() in (ROOT / "docs/performance.md").read_text(encoding="utf-8")
