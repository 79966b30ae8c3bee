"""`fat.load` and its transform: exactly the pixels of an evaluation, from PIL images and tensors."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from skimage import data as photographs
from torch import nn

import fat
from fat.inference.pil_image import rgb_pixels
from pipeline.decode.job import DecodeJob, Normalization
from pipeline.decode.resize import Resizer
from pipeline.jobs import eval_windows
from shards.images.pixels import to_8bit
from tests.support.tiny_fat import TINY

TIMM = np.load(Path(__file__).parents[1] / "fixtures" / "timm_recipe.npz")
PHOTO: np.ndarray = photographs.chelsea()


# -- pixels ------------------------------------------------------------------------------------------------------------


def by_evaluation(pixels: np.ndarray, transform: fat.ImageTransform) -> torch.Tensor:
    """Return what the loaders make of decoded pixels on a CPU, float32 [3, size, size]."""
    sides = [np.array([side], np.int32) for side in pixels.shape[:2]]
    window, region = eval_windows(*sides, transform.size, transform.crop_pct)
    job = DecodeJob(
        encoded=cast(Any, SimpleNamespace(ids=np.arange(1))), window=window, size=transform.size, region=region
    )
    y, x, height, width = window[0]
    part = np.ascontiguousarray(pixels[y : y + height, x : x + width])
    with Resizer(threads=1, normalization=Normalization(transform.mean, transform.std)) as resize:
        return resize([part], job)[0].permute(2, 0, 1)


@settings(max_examples=40)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 451),
    size=st.integers(32, 80),
    crop_pct=st.sampled_from([0.5, 0.875, 0.9, 0.95, 1.0]),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
)
def test_pixels_are_those_of_an_evaluation(
    height: int, width: int, size: int, crop_pct: float, mean: tuple[float, float, float]
) -> None:
    """Of images of any shape, from a PIL image, a tensor and a batch of tensors."""
    transform = fat.ImageTransform(size=size, crop_pct=crop_pct, mean=mean)
    pixels = PHOTO[:height, :width]
    expected = by_evaluation(pixels, transform)
    channels_last = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    batch = torch.stack([channels_last.flip(2), channels_last]).contiguous()
    assert torch.equal(transform(Image.fromarray(pixels)), expected)
    assert torch.equal(transform(channels_last), expected)
    assert torch.equal(transform(batch)[1], expected)


def test_pixels_differ_from_timms_by_rounding() -> None:
    found = fat.ImageTransform(size=224).crop(Image.fromarray(PHOTO)).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - TIMM["eval/chelsea.png"]).max() <= 2


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def translucent(mode: str) -> Image.Image:
    image = Image.fromarray(PHOTO).convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


GRAY = Image.fromarray(PHOTO).convert("L")
FILES = {
    "gray JPEG": saved(GRAY, "JPEG"),
    "black and white": saved(GRAY.convert("1"), "PNG"),
    "palette": saved(Image.fromarray(PHOTO).quantize(16), "PNG"),
    "transparent palette": saved(Image.fromarray(PHOTO).quantize(16), "PNG", transparency=3),
    "gray with alpha": saved(translucent("L"), "PNG"),
    "RGB with alpha": saved(translucent("RGB"), "PNG"),
    "CMYK": saved(Image.fromarray(PHOTO).convert("CMYK"), "JPEG"),
    "YCbCr TIFF": saved(Image.fromarray(PHOTO).convert("YCbCr"), "TIFF"),
    "LAB": saved(Image.fromarray(PHOTO).convert("LAB"), "TIFF"),
    "16-bit gray": saved(Image.fromarray(np.asarray(GRAY).astype(np.uint16) * 257), "PNG"),
    "16-bit PGM": saved(Image.fromarray(np.asarray(GRAY).astype(np.int32) * 200), "PPM"),
    "32-bit TIFF of 8-bit values": saved(Image.fromarray(np.asarray(GRAY).astype(np.int32)), "TIFF"),
    "floating point": saved(Image.fromarray(np.asarray(GRAY).astype(np.float32) / 255), "TIFF"),
}


@pytest.mark.parametrize("kind", FILES)
def test_any_mode_is_converted_as_for_a_shard_set(kind: str) -> None:
    opened = Image.open(io.BytesIO(FILES[kind]))
    opened.load()
    expected, _ = to_8bit(opened, FILES[kind])
    found = rgb_pixels(Image.open(io.BytesIO(FILES[kind]))).permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.broadcast_to(expected, found.shape))


@pytest.mark.parametrize("values", [[-1, 5], [0, 70_000]])
def test_gray_without_a_known_white_is_refused(values: list[int]) -> None:
    with pytest.raises(ValueError, match="convert it to 8 bits first"):
        rgb_pixels(Image.fromarray(np.array([values], np.int32)))


@pytest.mark.parametrize(
    ("images", "fault"),
    [
        (torch.zeros(3, 64, 64), r"images are torch.float32 on cpu; expected torch.uint8 on the CPU"),
        (torch.zeros(4, 64, 64, dtype=torch.uint8), r"the shape \[4, 64, 64\]; expected \[3, H, W\] or \[B, 3, H, W\]"),
        (torch.zeros(64, 64, 3, dtype=torch.uint8), r"the shape \[64, 64, 3\]"),
        (torch.zeros(3, 0, 64, dtype=torch.uint8), r"the shape \[3, 0, 64\]"),
        (torch.zeros(64, 64, dtype=torch.uint8), r"the shape \[64, 64\]"),
    ],
)
def test_other_tensors_are_refused(images: torch.Tensor, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        fat.ImageTransform(size=32)(images)


def test_gray_tensors_have_three_equal_channels() -> None:
    gray = torch.from_numpy(np.array(GRAY))[None]
    transform = fat.ImageTransform(size=64)
    assert torch.equal(transform(gray), transform(GRAY))
    assert torch.equal(transform(gray[None]), transform(GRAY)[None])


# -- fat.load ----------------------------------------------------------------------------------------------------------

INFO = fat.WeightsInfo(
    classes=fat.ClassList.of(["n1", "n2", "n3", "n4"], ["crane", "crane", None, "tench"]),
    model="fat_tiny",
    size=64,
    crop_pct=0.9,
    interpolation="bicubic",
    mean=(0.5, 0.4, 0.3),
    std=(0.1, 0.2, 0.3),
)


def weights(tmp_path: Path, info: fat.WeightsInfo = INFO, config: fat.FATConfig = TINY) -> Path:
    path = tmp_path / "a.safetensors"
    fat.save_weights(fat.FAT(config), path, info=info)
    return path


def test_load_returns_model_transform_and_class_names(tmp_path: Path) -> None:
    model, transform, classes = fat.load(weights(tmp_path))
    assert not model.training
    assert transform == fat.ImageTransform(size=64, crop_pct=0.9, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    assert classes == ("crane (n1)", "crane (n2)", "n3", "tench", *(f"output {n}" for n in range(4, 10)))
    assert model(transform(Image.fromarray(PHOTO))[None]).shape == (1, len(classes))
    assert fat.load(tmp_path / "a.safetensors", size=96, crop_pct=1.0).transform.size == 96


def test_file_without_preprocessing_gets_timms_defaults_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"a\.safetensors: does not record the image size .* 224 pixels are used"):
        loaded = fat.load(weights(tmp_path, fat.WeightsInfo()))
    assert loaded.transform == fat.ImageTransform(size=224, crop_pct=0.875)
    assert loaded.classes[:2] == ("output 0", "output 1")


@pytest.mark.parametrize(
    ("info", "config", "fault"),
    [
        (fat.WeightsInfo(size=64, interpolation="nearest"), TINY, "interpolation 'nearest' is not supported"),
        (INFO, fat.FATConfig(**TINY.to_dict() | {"in_chans": 4}), "has 4 input channels"),
    ],
)
def test_models_that_the_transform_does_not_fit_are_refused(
    tmp_path: Path, info: fat.WeightsInfo, config: fat.FATConfig, fault: str
) -> None:
    with pytest.raises(ValueError, match=rf"a\.safetensors: .*{fault}"):
        fat.load(weights(tmp_path, info, config))


def test_weights_of_another_model_are_refused_with_how_to_load_them(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    fat.save_weights(nn.Linear(2, 4), path, info=fat.WeightsInfo(model="timm/resnet18", classes=INFO.classes, size=64))
    with pytest.raises(ValueError, match=r"timm.create_model\('resnet18', num_classes=4\) and load_state_dict"):
        fat.load(path)


@pytest.mark.parametrize("average", [False, True])
def test_state_of_a_checkpoint_is_loaded(tmp_path: Path, average: bool) -> None:
    """With its moving average, if it has one."""
    model = fat.FAT(TINY)
    state = {f"{kind}/{name}": t for kind in ("model", "exp_avg") for name, t in model.state_dict().items()}
    if average:
        averaged = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
        state |= {f"ema/{name}": t + 1 for name, t in averaged.items()}
    save_file({name: t.clone() for name, t in state.items()}, tmp_path / "state.safetensors", INFO_HEADER)
    with pytest.warns(UserWarning, match="'ema" if average else "'model"):
        loaded = fat.load_model(tmp_path / "state.safetensors")
    assert torch.equal(loaded.head.bias, model.head.bias + average)


INFO_HEADER = fat.WeightsInfo(config=TINY).to_header()
