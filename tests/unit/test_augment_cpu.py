"""Augmentation on the CPU, compiled by Numba (pipeline/augment/numba_impl), compared with PyTorch and PIL."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.augment import reference
from pipeline.augment.numba_impl import finishing, randaugment
from pipeline.augment.ops import Op
from pipeline.augment.params import SampleParams, draw, mix_params
from pipeline.augment.pixels import BatchAugment
from pipeline.augment.recipe import AugmentRecipe, augment_recipe
from pipeline.augment.torch_impl import geometry, tables
from pipeline.augment.workers import Workers
from tests.support.randaugment_checks import FILL, GEOMETRIC, PHOTO, by_torch, noisy_images, parameters

CPU = torch.device("cpu")
BUSY = augment_recipe("fat", size=40, rand_augment="rand-m9-mstd0.5-inc1-n3-p0.8", erase=0.5)
SIZES = (1, 2, 3, 4, 5, 31, 64, 65, 128, 129, 224, 300)


def compiled(images: NDArray[np.uint8], params: SampleParams) -> NDArray[np.uint8]:
    """Apply flips and all operations to uint8 [n, H, W, 3]."""
    n, height, width, _ = images.shape
    ops, values = params.ops.reshape(-1), params.arguments.reshape(-1)
    out = np.empty_like(images)
    randaugment.apply_ops(
        np.array(images).reshape(n, -1),
        params.flips,
        np.arange(n + 1) * params.ops.shape[1],
        ops,
        values.astype(np.float32),
        geometry.matrices(ops, values, height, width),
        tables.host_tables(ops, values),
        np.array(FILL, np.uint8),
        height,
        width,
        np.empty(randaugment.scratch_bytes(height, width), np.uint8),
        out.reshape(n, -1),
    )
    return out


sides = st.integers(1, 40) | st.sampled_from(SIZES)


@settings(deadline=None, max_examples=60)
@given(sides, sides, st.integers(0, 4), st.integers(0, 2**20), st.sampled_from(["any", "whole", "ends"]))
@example(224, 224, 2, 0, "any")
@example(300, 1, 2, 0, "any")
@example(1, 300, 2, 0, "any")
def test_bytes_equal_those_of_pytorch(height: int, width: int, layers: int, seed: int, magnitudes: str) -> None:
    """Every operation, one after another, at any size, magnitude and sign."""
    rng = np.random.default_rng(seed)
    n = 6
    images = noisy_images(rng, n, height, width)
    shape = (n, layers)
    choices = {"any": rng.uniform(0, 10, shape), "whole": rng.integers(11, size=shape)}
    magnitude = choices.get(magnitudes, rng.choice([0, 10], shape))
    params = parameters(rng.integers(len(Op), size=shape), magnitude, rng.choice([-1.0, 1.0], shape))
    params = replace(params, flips=rng.random(n) < 0.5)
    before = images.copy()
    found = compiled(images, params)
    for i in range(n):
        expected = by_torch(images[i], params, i, flip=True)
        names = [Op(op).title for op in params.ops[i]]
        assert np.array_equal(found[i], expected), f"{names} {params.arguments[i]} flip {params.flips[i]}"
    assert np.array_equal(images, before)


@pytest.mark.parametrize("op", Op, ids=lambda op: op.title)
def test_every_operation_equals_pil_at_every_size(op: Op) -> None:
    """Geometric operations differ by at most one level, because PIL computes in float64."""
    for size in SIZES:
        photo = PHOTO.resize((size, size))
        for magnitude in (0.0, 0.7, 3.3, 6.0, 9.0, 10.0):
            for sign in (-1.0, 1.0):
                params = parameters(np.array([[op]]), np.array([[magnitude]]), np.array([[sign]]))
                argument = float(params.arguments[0, 0])
                theirs = np.asarray(reference.apply(photo, op, argument, FILL)).astype(np.int64)
                difference = np.abs(compiled(np.asarray(photo)[None], params)[0] - theirs)
                allowed = int(op in GEOMETRIC)
                assert difference.max() <= allowed, f"{op.title} {argument} at {size} pixels"
                assert size < 31 or difference.mean() <= 0.02 * allowed, f"{op.title} {argument} at {size} pixels"


def test_a_shift_by_whole_pixels_moves_them_exactly() -> None:
    """The coordinates are then exactly between two values of the floor."""
    rng = np.random.default_rng(0)
    images = noisy_images(rng, 3, 32, 32)
    for op, axis in ((Op.TRANSLATE_X, 2), (Op.TRANSLATE_Y, 1)):
        params = parameters(np.full((3, 1), op), np.ones((3, 1)), np.ones((3, 1)))
        params = replace(params, arguments=np.full((3, 1), 8 / 32))
        kept = (slice(None),) * axis + (slice(0, 24),)
        assert np.array_equal(compiled(images, params)[kept], np.roll(images, -8, axis)[kept])


def batch(recipe: AugmentRecipe, count: int, seed: int = 0) -> tuple[torch.Tensor, SampleParams]:
    images = noisy_images(np.random.default_rng(seed), count, recipe.size, recipe.size)
    side = np.full(count, recipe.size)
    return torch.from_numpy(images), draw(recipe, seed=seed, epoch=0, ids=np.arange(count), heights=side, widths=side)


@pytest.mark.parametrize("name", ["fat", "light"])
@pytest.mark.parametrize("size", [1, 7, 40, 65])
def test_a_finished_batch_equals_pytorch(name: str, size: int) -> None:
    recipe = augment_recipe(name, size=size)
    images, params = batch(recipe, 33)
    ours, theirs = (BatchAugment(recipe, CPU, flip=True, kernels=use)(images, params) for use in (True, False))
    assert torch.equal(ours, theirs)
    assert ours.stride() == theirs.stride()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(["both", "mixup", "cutmix"]))
def test_mixed_batches_equal_pytorch_up_to_rounding(step: int, kind: str) -> None:
    recipe = replace(BUSY, **{"both": {}, "mixup": {"cutmix": 0.0}, "cutmix": {"mixup": 0.0}}[kind])
    images, params = batch(recipe, 20, seed=step)
    mixing = mix_params(recipe, seed=0, step=step, lanes=np.arange(20) // 4)
    ours, theirs = (BatchAugment(recipe, CPU, kernels=use)(images, params, mixing) for use in (True, False))
    if kind == "cutmix":
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_do_not_depend_on_threads_batch_size_or_position(threads: int) -> None:
    """With mixing, rows move in pairs."""
    images, params = batch(BUSY, 36)
    mixing = mix_params(BUSY, seed=0, step=5, lanes=np.arange(36) // 4)
    whole = BatchAugment(BUSY, CPU)(images, params, mixing)
    with Workers(threads) as workers:
        augment = BatchAugment(BUSY, CPU, workers=workers)
        for start, stop in ((0, 36), (0, 2), (2, 20), (34, 36)):
            rows = slice(start, stop)
            assert torch.equal(augment(images[rows], params.take(rows), mixing.take(rows)), whole[rows])
        pairs = np.random.default_rng(threads).permutation(18)
        order = (2 * pairs[:, None] + [0, 1]).reshape(-1)
        moved = replace(mixing, lam=mixing.lam[order], box=mixing.box[order], use_cutmix=mixing.use_cutmix[order])
        assert torch.equal(augment(images[order], params.take(order), moved), whole[order])


def test_mixing_an_odd_batch_is_rejected() -> None:
    images, params = batch(BUSY, 3)
    with pytest.raises(ValueError, match=r"expected an even number of .* got 3 images and 4 parameters"):
        BatchAugment(BUSY, CPU)(images, params, mix_params(BUSY, seed=0, step=0, lanes=np.arange(4) // 4))


def test_a_result_that_is_in_use_is_not_overwritten_and_its_memory_is_reused_afterwards() -> None:
    images, params = batch(BUSY, 16)
    with Workers(2) as workers:
        augment = BatchAugment(BUSY, CPU, workers=workers)
        first = augment(images, params)
        copy, address = first.clone(), first.data_ptr()
        others = [augment(255 - images, params).data_ptr() for _ in range(3)]
        assert torch.equal(first, copy)
        assert address not in others
        del first
        assert augment(images, params).data_ptr() == address


def test_the_threads_end_with_the_workers() -> None:
    images, params = batch(BUSY, 64)
    with Workers(3) as workers:
        BatchAugment(BUSY, CPU, workers=workers)(images, params)
        assert any(thread.name.startswith("augment") for thread in threading.enumerate())
    assert not any(thread.name.startswith("augment") for thread in threading.enumerate())


def test_an_error_in_a_thread_is_raised() -> None:
    def fail(item: int) -> None:
        raise ValueError(item)

    with Workers(2) as workers, pytest.raises(ValueError, match="7"):
        workers.map(fail, [7])


def test_functions_are_compiled_for_one_kind_of_arrays() -> None:
    """Compiling again takes seconds. Parameters may be parts of larger arrays, and read-only."""
    images, params = batch(BUSY, 8)
    augment, mixing = BatchAugment(BUSY, CPU, flip=True), mix_params(BUSY, seed=0, step=0, lanes=np.arange(8) // 4)
    before = augment(images, params, mixing)
    strided = {name: np.repeat(array, 2, axis=0)[::2] for name, array in vars(params).items()}
    for array in strided.values():
        array.flags.writeable = False
    again = augment(images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), SampleParams(**strided), mixing)
    assert torch.equal(again, before)
    assert len(randaugment.apply_ops.signatures) == len(finishing.finish.signatures) == 1


def test_pytorch_is_used_without_numba() -> None:
    program = (
        "import logging, sys; sys.modules['numba'] = None; logging.basicConfig();"  # importing numba raises ImportError
        "import numpy as np, torch; from pipeline.augment.params import draw;"
        "from pipeline.augment.pixels import BatchAugment; from pipeline.augment.recipe import augment_recipe;"
        "recipe = augment_recipe('fat', size=8); side = np.full(4, 8);"
        "params = draw(recipe, seed=0, epoch=0, ids=np.arange(4), heights=side, widths=side);"
        "cpu = torch.device('cpu'); images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8);"
        "made = [BatchAugment(recipe, cpu, kernels=use)(images, params) for use in (True, True, False)];"
        "assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[2])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert "augmentation cannot be compiled" in line
    assert "pip install -U numba" in line


@pytest.mark.slow
def test_functions_are_compiled_if_their_code_cannot_be_stored(tmp_path: Path) -> None:
    """Writing a file fails, like on a full disk."""
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0));"
        "from pipeline.augment.kernels import load_cpu_augment; assert load_cpu_augment()"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert not done.stderr
