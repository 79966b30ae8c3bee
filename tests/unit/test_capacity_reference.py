"""The reference figures of `pipeline capacity` are those of benchmarks/results/gpu.json."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.cores_per_gpu import GPU, RESULTS, VARIANTS, decode_paths, training_rates
from launch.capacity.reference import h200


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_reference_figures_are_the_measured_ones() -> None:
    found, gpu = h200(), read("gpu.json")["devices"][GPU]
    bench, step = gpu["bench-b3"]["figures"], gpu["step-b0"]["figures"]
    rates = {f"fat_{variant}": rate for variant, rate in training_rates(gpu).items()}
    path = decode_paths(gpu, read("interpreter_lock.json"), read("decode_paths.json"))[0]
    times = bench["model"]["times"]
    assert found.device == GPU == bench["machine"]["device"]
    assert (found.size, found.batch) == (step["size"], step["batch"]) == (224, bench["settings"]["batch"])
    assert found.images_per_second == pytest.approx(rates, abs=0.05)
    training = {}
    for variant in VARIANTS:
        if f"bench-{variant}" in gpu:
            both = gpu[f"bench-{variant}"]["figures"]["both"]
            training[f"fat_{variant}"] = both["rate"] / (1 - both["waiting"])
    assert found.training_images_per_second == pytest.approx(training, abs=0.05)
    assert found.launch_model == f"fat_{bench['settings']['variant']}"
    assert found.launch_seconds == pytest.approx(bench["both"]["host"], rel=5e-3)
    assert found.jitter == pytest.approx(statistics.stdev(times) / statistics.fmean(times), rel=5e-3)
    assert found.loader_images_per_second == pytest.approx(bench["loader"]["rate"], abs=0.05)
    assert "JPEG engine" in path.name
    assert found.loader_cpu_seconds == pytest.approx(path.cost, rel=5e-3)
    assert found.cores == bench["machine"]["cores"]


def test_the_reference_of_a_step_is_the_slower_of_the_model_alone_and_training() -> None:
    """As of a bench.json; only the step of the model alone was measured with B1 and B2."""
    found = h200()
    assert found.step_rate("fat_b3") == pytest.approx(2846.4 / (1 - 0.0687), rel=1e-3)
    assert found.step_rate("fat_b0") == found.training_images_per_second["fat_b0"]
    assert found.step_rate("fat_b1") == found.images_per_second["fat_b1"]
    faster = replace(found, training_images_per_second={"fat_b3": 4000.0})
    assert faster.step_rate("fat_b3") == 3209.5
