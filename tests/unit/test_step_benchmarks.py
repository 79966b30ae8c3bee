"""benchmarks/step.py and peers.py: modes that fail run again alone or in another mode, and their rows say so."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import model as model_benchmark
from benchmarks import peers, step
from launch.machine.world import World

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch.compile needs triton")


class Tiny(nn.Module):
    """A small model in place of timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, peers.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(images)).mean((2, 3)))


class Breaking(Tiny):
    """A model with a graph break for torch.compile."""

    def forward(self, images: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(images)


# -- step.py -----------------------------------------------------------------------------------------------------------

OPTIONS = argparse.Namespace(ways=["library", "channels-last"], batch=4, size=32, rounds=2, alone=False)


def steps_that(fail: Callable[[str, int], str | None], built: list[str]) -> Callable[..., Callable[[], None]]:
    """Return a replacement of `step.step` whose steps do nothing or fail.

    Args:
        fail: returns an error message, or None, for a mode and the number of steps that are alive.
        built: list to which the mode of each built step is appended.
    """
    alive: set[object] = set()

    class Step:
        def __init__(self, way: str) -> None:
            self.way = way
            alive.add(id(self))
            built.append(way)

        def __call__(self) -> None:
            if why := fail(self.way, len(alive)):
                raise RuntimeError(why)

        def __del__(self) -> None:
            alive.discard(id(self))

    return lambda name, way, training, options: Step(way)


def test_a_captured_step_keeps_the_tensors_of_its_graph_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tensors of the next mode would overwrite its weights and labels."""
    built: list[weakref.ref[nn.Module]] = []

    def build(_: str) -> nn.Module:
        model = Tiny()
        built.append(weakref.ref(model))
        return model

    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(step, "build", build)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(step, "graph_pool", lambda: (0, 1))
    run = step.step("tiny", "graph", True, argparse.Namespace(batch=4, size=8, dtype="float32"))
    gc.collect()
    run()
    assert built[0]() is not None
    del run
    gc.collect()
    assert built[0]() is None


@pytest.mark.parametrize(
    ("reason", "again"),
    [
        ("CUDA out of memory", True),
        ("CUDA error: an illegal memory access was encountered", True),
        ("operation not permitted when stream is capturing", True),
        ("shapes do not match", False),
    ],
)
def test_a_mode_that_failed_next_to_others_runs_again_alone(
    reason: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    fails = lambda way, alive: reason if way == "channels-last" and alive > 1 else None  # noqa: E731
    monkeypatch.setattr(step, "step", steps_that(fails, built))
    first, last = step.compare("fat_b0", True, OPTIONS)
    assert "images/s" in first
    assert built == ["library", "channels-last"] + again * ["channels-last"]
    assert ("images/s" in last) == again
    assert last["beside the others" if again else "failed"] == f"RuntimeError: {reason}"


def test_a_mode_that_also_fails_alone_reports_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(step, "step", steps_that(lambda way, alive: f"no memory for {alive}", built))
    rows = step.compare("fat_b0", True, OPTIONS)
    assert sorted(built) == sorted(2 * OPTIONS.ways)
    assert all(row["failed"] == "RuntimeError: no memory for 1" for row in rows)


def test_with_alone_each_mode_is_freed_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    fails = lambda way, alive: "not freed" if alive > 1 else None  # noqa: E731
    monkeypatch.setattr(step, "step", steps_that(fails, built))
    rows = step.compare("fat_b0", True, argparse.Namespace(**vars(OPTIONS) | {"alone": True}))
    assert [row["way"] for row in rows if "images/s" in row] == built == OPTIONS.ways


def test_a_mode_that_fails_in_a_later_round_does_not_affect_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"bad": 0, "good": 0}

    def call(name: str) -> None:
        calls[name] += 1
        if name == "bad" and calls[name] > 3:
            raise RuntimeError("CUDA error: unspecified launch failure")

    times, failed = model_benchmark.interleave({name: lambda name=name: call(name) for name in calls}, 3)
    assert (len(times["good"]), calls["bad"]) == (3, 4)  # not called again
    assert (list(times), failed["bad"]) == (["good"], "RuntimeError: CUDA error: unspecified launch failure")


# -- peers.py ----------------------------------------------------------------------------------------------------------


def run_peers(
    patch: pytest.MonkeyPatch, models: dict[str, type[nn.Module]], out: Path, *options: str | Path
) -> tuple[int, list[dict[str, Any]]]:
    patch.setattr(peers, "build", lambda name: models[name]())
    patch.setattr(peers, "connect", lambda: World(0, 1, 0, 1, torch.device("cpu")))  # keeps the number of threads
    small = ("--batch", "2", "--size", "32", "--rounds", "1", "--steps", "1", "--out", str(out))
    patch.setattr(sys, "argv", ["peers.py", "--models", *models, *small, *map(str, options)])
    status = peers.main()
    return status, json.loads(out.read_text())["results"]


def test_peers_are_reported_as_ratios_to_fat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"fat_b0": Tiny, "fat_b1": Tiny, "resnet50": Tiny}
    status, rows = run_peers(monkeypatch, models, tmp_path / "peers.json", "--ways", "eager")
    assert status == 0
    ours, _, peer = rows
    assert peer["to fat_b0"] == pytest.approx(peer["images/s"] / ours["images/s"], abs=1e-3)
    assert {"to fat_b0", "to fat_b1"} <= peer.keys()
    assert "plain data parallel" in peer["engine"]


def test_ratios_can_be_relative_to_an_earlier_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fat = tmp_path / "fat.json"
    rates = [("fat_b0", 50.0), ("fat_b0", 100.0), ("resnet50", 1.0)]
    fat.write_text(json.dumps({"results": [{"model": model, "images/s": rate} for model, rate in rates]}))
    options = ("--ways", "eager", "--fat-figures", fat)
    _, (peer,) = run_peers(monkeypatch, {"resnet50": Tiny}, tmp_path / "peers.json", *options)
    assert peer["to fat_b0"] == pytest.approx(peer["images/s"] / 100.0, abs=1e-3)  # the fastest row counts
    assert "to resnet50" not in peer


@needs_compiler
def test_a_peer_that_cannot_be_compiled_whole_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_module = nn.Module.compile  # with a backend that needs no C++ compiler
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_module(self, backend="aot_eager", **options)
    )
    models = {"whole": Tiny, "broken": Breaking}
    status, (whole, broken) = run_peers(monkeypatch, models, tmp_path / "peers.json", "--ways", "compiled")
    assert (status, whole["compiled"], broken["compiled"]) == (0, peers.WHOLE, peers.BREAKS)
    assert f"not {peers.WHOLE}" in broken
    assert "images/s" in broken


def test_a_peer_that_cannot_be_compiled_runs_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: nn.Module, **options: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(nn.Module, "compile", fail)
    status, (row,) = run_peers(monkeypatch, {"resnet50": Tiny}, tmp_path / "peers.json", "--ways", "compiled")
    assert (status, row["compiled"]) == (0, peers.EAGER)
    assert row[f"not {peers.BREAKS}"] == "RuntimeError: no compiler"
    assert "images/s" in row


def test_a_peer_that_fails_does_not_affect_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Tiny):
        def forward(self, images: Tensor) -> Tensor:
            raise ValueError("Input height (8) doesn't match model (224)")

    models = {"swin_tiny": Wrong, "resnet50": Tiny}
    status, (wrong, right) = run_peers(monkeypatch, models, tmp_path / "peers.json", "--ways", "eager")
    assert status == 0
    assert wrong["failed"] == "ValueError: Input height (8) doesn't match model (224)"
    assert "images/s" in right
