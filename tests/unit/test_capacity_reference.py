"""The reference figures of `pipeline capacity` are those of benchmarks/results/gpu.json."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest

from benchmarks.cores_per_gpu import GPU, RESULTS, decode_paths, training_rates
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
    assert found.launch_model == f"fat_{bench['settings']['variant']}"
    assert found.launch_seconds == pytest.approx(bench["both"]["host"], rel=5e-3)
    assert found.jitter == pytest.approx(statistics.stdev(times) / statistics.fmean(times), rel=5e-3)
    assert found.loader_images_per_second == pytest.approx(bench["loader"]["rate"], abs=0.05)
    assert "JPEG engine" in path.name
    assert found.loader_cpu_seconds == pytest.approx(path.cost, rel=5e-3)
    assert found.cores == bench["machine"]["cores"]
