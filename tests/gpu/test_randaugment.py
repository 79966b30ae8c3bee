"""RandAugment's kernels on a GPU, at the training size: the same bytes as PyTorch on the CPU, few launches, and no
synchronization. The same checks run on small images in Triton's interpreter (tests/interpreted)."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pipeline.augment.ops import Op
from pipeline.augment.params import SampleParams, draw, mix_params
from pipeline.augment.pixels import BatchAugment
from pipeline.augment.recipe import augment_recipe
from tests.support.kernel_checks import poisoned_memory
from tests.support.randaugment_checks import assert_equals_torch, noisy_images, parameters

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

BATCH, INPUTS = 64, 10
RECIPE = augment_recipe("fat")
GPU = torch.device("cuda")


def drawn(seed: int, batch: int = BATCH) -> SampleParams:
    sides = np.full(batch, 400)
    return draw(RECIPE, seed=seed, epoch=0, ids=np.arange(batch), heights=sides, widths=sides)


def on_random_inputs(check: Callable[[int], None]) -> None:
    for _ in range(INPUTS):
        seed = secrets.randbits(31)
        try:
            with poisoned_memory():
                check(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_batches_of_the_recipe() -> None:
    def check(seed: int) -> None:
        images = noisy_images(np.random.default_rng(seed), BATCH, 224, 224)
        assert_equals_torch(images, drawn(seed), flip=True, device="cuda")

    on_random_inputs(check)


@pytest.mark.parametrize("op", Op, ids=lambda op: op.title)
def test_every_operation(op: Op) -> None:
    """At any magnitude and sign, on square and rectangular images."""

    def check(seed: int) -> None:
        rng = np.random.default_rng(seed)
        ops, signs = np.full((9, 1), op), rng.choice([-1.0, 1.0], size=(9, 1))
        params = parameters(ops, rng.uniform(0, 10, size=(9, 1)), signs)
        for height, width in ((224, 224), (97, 131)):
            assert_equals_torch(noisy_images(rng, 9, height, width), params, device="cuda")

    on_random_inputs(check)


def test_torch_on_the_gpu_returns_the_same_bytes() -> None:
    for _ in range(INPUTS):
        seed = secrets.randbits(31)
        images = torch.from_numpy(noisy_images(np.random.default_rng(seed), BATCH, 224, 224)).to(GPU)
        found = {}
        for use in (True, False):
            found[use] = BatchAugment(RECIPE, GPU, flip=True, kernels=use).apply_ops(images, drawn(seed))
        wrong = (found[True] != found[False]).flatten(1).sum(1)
        assert not wrong.any(), f"seed {seed}: bytes that differ, by sample: {wrong.tolist()}"


def test_five_launches_and_two_uploads_without_waiting() -> None:
    """Launches: measure and apply, twice, and finish. Uploads: RandAugment's parameters, and all other parameters."""
    params, augment = drawn(3), BatchAugment(RECIPE, GPU, torch.bfloat16)
    mixing = mix_params(RECIPE, seed=1, step=0, lanes=np.arange(BATCH) // 2)
    images = torch.from_numpy(noisy_images(np.random.default_rng(1), BATCH, 224, 224)).to(GPU)
    augment(images, params, mixing)  # compiles
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        torch.cuda.set_sync_debug_mode("error")
        try:
            augment(images, params, mixing)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    done = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    uploads = [name for name in done if "Memcpy" in name]
    kernels = [name for name in done if "Memcpy" not in name]
    assert sorted(kernels) == ["_apply", "_apply", "_finish", "_histogram_tables", "_histogram_tables"], done
    assert len(uploads) == 2, done
