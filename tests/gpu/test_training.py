"""Training on GPUs: `make gpu`. tests/unit or tests/dist has a CPU test for each of these tests."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch

from tests.support.launching import accelerate, lines, python

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

FEW_STEPS = ("--recipe", "launch/recipes/digits.toml", "--size", "64", "--log-every", "1")


def engine_of(run: Path) -> dict[str, object]:
    return json.loads((run / "recipe.json").read_text())["engine"]


def test_by_default_training_uses_bf16_and_on_several_gpus_zero_1(tmp_path: Path, digits: Path) -> None:
    run, gpus = tmp_path / "run", torch.cuda.device_count()
    done = accelerate(tmp_path, *FEW_STEPS, "--data", digits, "--out", run, "--stop-after", "12")
    assert done.returncode == 0, done.stderr
    assert engine_of(run) == {"zero": int(gpus > 1), "precision": "bf16", "world": gpus}
    losses = [line["loss"] for line in lines(run, "train")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_zero_stage_trains_and_resumes(tmp_path: Path, digits: Path, zero: int) -> None:
    options = (*FEW_STEPS, "--data", digits, "--out", tmp_path / "run", "--zero", str(zero), "--ema", "0.9")
    for stop in ("4", "8"):
        done = python(tmp_path, "launch/train.py", *options, "--stop-after", stop)
        assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(tmp_path / "run", "start")] == [0, 4]


@pytest.mark.parametrize("zero", [0, 1])
def test_two_ranks_share_one_gpu(tmp_path: Path, digits: Path, zero: int) -> None:
    """The multi-rank CUDA path (synchronized BatchNorm, autocast, ZeRO, checkpoint) with gloo, on one GPU."""
    run = tmp_path / "run"
    options = (*FEW_STEPS, "--data", digits, "--out", run, "--zero", str(zero), "--sync-bn", "on")
    for stop in ("4", "8"):
        done = accelerate(tmp_path, *options, "--stop-after", stop, ranks=2)
        assert done.returncode == 0, done.stderr
    assert engine_of(run)["world"] == 2
    assert [line["step"] for line in lines(run, "start")] == [0, 4]
    assert lines(run, "train")[-1]["loss"] < lines(run, "train")[0]["loss"]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_has_the_losses_of_an_eager_one(tmp_path: Path, digits: Path, mode: str) -> None:
    losses = {}
    for compile_mode in ("off", mode):
        run = tmp_path / compile_mode
        options = (*FEW_STEPS, "--data", digits, "--out", run, "--stop-after", "6", "--zero", "0")
        done = python(tmp_path, "launch/train.py", *options, "--compile", compile_mode, "--drop-path", "0")
        assert done.returncode == 0, done.stderr
        losses[compile_mode] = [line["loss"] for line in lines(run, "train")]
    assert losses[mode] == pytest.approx(losses["off"], rel=0.05)


def test_pixels_decoded_on_the_gpu_are_those_of_the_cpu(photos: Path) -> None:
    from pipeline.augment.recipe import augment_recipe
    from pipeline.batch_shape import BatchShape
    from pipeline.loader import TrainLoader
    from pipeline.plan import TrainPlan
    from shards.format.dataset import ShardSet

    dataset = ShardSet(photos)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=32, seed=0)
    batches = []
    for device in ("cpu", "cuda"):
        recipe = augment_recipe("light", size=128)
        shape = BatchShape(global_batch=32)
        with TrainLoader(dataset, plan, shape, recipe, epochs=1, device=torch.device(device)) as loader:
            batches.append(next(loader))
            resolved = loader.resolved
    on_cpu, on_gpu = batches
    assert on_cpu.ids.tolist() == on_gpu.ids.tolist()
    assert on_gpu.images.is_cuda
    assert on_gpu.images.is_contiguous(memory_format=torch.channels_last)
    # nvJPEG upsamples chroma differently. One level of a pixel is 1 / 255 / 0.226 = 0.017 of a normalized value.
    error = (on_cpu.images - on_gpu.images.cpu()).abs().mean().item()
    assert error < 2 * 0.017, resolved


@pytest.mark.timeout(900)
def test_training_uses_the_tuned_options(tmp_path: Path, digits: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "tuned.toml"
    training = ("--size", "64", "--global-batch", "64", "--augment", "light", "--zero", "0")
    done = python(
        *(tmp_path, "-m", "launch.cli", "tune", digits, "--seconds", "20", "--out", file, "--", *training), timeout=580
    )
    assert done.returncode == 0, done.stderr
    assert "reduce-overhead" in file.read_text()
    tuned = tomllib.loads(file.read_text())
    assert tuned["compile"].keys() >= {"memory_format", "optimizer_impl", "compile"}
    assert tuned["data"]["loader"].keys() >= {"decode_threads", "read_threads"}
    options = ("--recipe", file, *training)
    done = python(tmp_path, "launch/train.py", *options, "--data", digits, "--out", run, "--stop-after", "2")
    assert done.returncode == 0, done.stderr
    (resolved,) = lines(run, "resolved")
    assert resolved["compile"].startswith(tuned["compile"]["compile"])
