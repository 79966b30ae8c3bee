"""Compare the RandAugment kernels with PyTorch on the CPU, sample by sample and one operation after another.

PyTorch's operations are compared with PIL in tests/unit/test_augment_parity.py. Used by tests/interpreted (Triton's
interpreter) and tests/gpu.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.augment.ops import Op, arguments
from pipeline.augment.params import SampleParams
from pipeline.augment.pixels import OP_GROUPS
from pipeline.augment.torch_impl import geometry
from pipeline.augment.triton_impl import randaugment

FILL = (124, 116, 104)
PHOTO = Image.fromarray(np.load(Path(__file__).parents[1] / "fixtures" / "timm_recipe.npz")["photo0"])
GEOMETRIC = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)


def noisy_images(rng: np.random.Generator, count: int, height: int, width: int) -> NDArray[np.uint8]:
    """Alternate parts of a photo, noise, and noise of few levels; uint8 [count, height, width, 3]."""
    photo = np.asarray(PHOTO.resize((2 * width, 2 * height)))
    photos = [photo[y : y + height, x : x + width] for y, x in rng.integers((height, width), size=(count, 2))]
    noise, low = rng.integers(256, size=(count, height, width, 3)), rng.integers(200, size=(count, 1, 1, 3))
    kinds = np.stack([np.stack(photos), noise, low + noise % 40])
    return kinds[np.arange(count) % 3, np.arange(count)].astype(np.uint8)


def parameters(ops: NDArray[np.int64], magnitudes: NDArray[np.float64], signs: NDArray[np.float64]) -> SampleParams:
    """Parameters of n samples: operations [n, K], all applied, magnitudes and signs [n, K] or [n, 1], no flips."""
    magnitudes, signs = np.broadcast_to(magnitudes, ops.shape), np.broadcast_to(signs, ops.shape)
    boxes = np.zeros((len(ops), 4), np.int32)
    return SampleParams(
        ids=np.arange(len(ops)),
        windows=boxes,
        flips=np.zeros(len(ops), np.bool_),
        ops=ops,
        applied=np.ones(ops.shape, np.bool_),
        magnitudes=magnitudes,
        arguments=arguments(ops, magnitudes, signs, increasing=True),
        erase_boxes=boxes,
        erase_keys=np.zeros(len(ops), np.uint64),
    )


def by_torch(image: NDArray[np.uint8], params: SampleParams, i: int, *, flip: bool) -> NDArray[np.uint8]:
    """Augment sample i with PyTorch, uint8 [H, W, 3]."""
    if flip and params.flips[i]:
        image = image[:, ::-1]
    for op, argument, applied in zip(params.ops[i], params.arguments[i], params.applied[i], strict=True):
        if applied:
            group = next(group for group in OP_GROUPS if op in group.ops)
            ops, values = np.array([op]), np.array([argument])
            arrays = [geometry.matrices(ops, values, *image.shape[:2])]  # OpGroup.prepare supports square images only
            if op not in GEOMETRIC:
                arrays = group.prepare(ops, values, len(image))
            batch = torch.from_numpy(image[None].copy())
            image = group.run(batch, [torch.from_numpy(array) for array in arrays], FILL)[0].numpy()
    return image


def assert_equals_torch(
    images: NDArray[np.uint8], params: SampleParams, *, flip: bool = False, device: str = "cpu"
) -> None:
    """Assert that the kernels give PyTorch's bytes for uint8 [n, H, W, 3] and do not modify their input."""
    given = torch.from_numpy(images).to(device)
    before = given.clone()
    found = randaugment.apply_ops(given, params, FILL, flip=flip)
    assert found.is_contiguous()
    assert torch.equal(given, before)
    for i, (image, own) in enumerate(zip(images, found.cpu().numpy(), strict=True)):
        wrong = np.count_nonzero(own != by_torch(image, params, i, flip=flip))
        applied = params.applied[i]
        what = f"sample {i}: {[Op(op).title for op in params.ops[i][applied]]} {params.arguments[i][applied]}"
        assert not wrong, f"{what}: {wrong} bytes of {own.size} differ"
