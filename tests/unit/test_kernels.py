"""The Triton kernels without a GPU: their results in Triton's interpreter, and their machine code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.registers import Shape, measure
from fat.kernels import ops
from fat.kernels.impl import tiles
from pipeline.augment.params import draw, mix_params
from pipeline.augment.recipe import augment_recipe
from tests.support.triton_offline import OfflineDriver, launches_only_compile

pytest.importorskip("triton", reason="Triton is only available on Linux; without it FAT uses plain PyTorch")

ROOT = Path(__file__).resolve().parents[2]
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(which: str) -> None:
    """Run tests/interpreted in another process, because Triton reads TRITON_INTERPRET when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/interpreted", "-m", which, "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.fixture
def compiled(capability: int) -> Iterator[OfflineDriver]:
    with launches_only_compile(capability) as driver:
        yield driver


def _maps(count: int, channels: int, side: int) -> list[torch.Tensor]:
    return [
        torch.zeros(1, channels, side, side, dtype=BF16).contiguous(memory_format=torch.channels_last)
        for _ in range(count)
    ]


def _depthwise(kernel: int, channels: int, side: int, stride: int = 1) -> Callable[[], object]:
    (x,), (gradient,) = _maps(1, channels, side), _maps(1, channels, -(-side // stride))
    weight, bias = torch.zeros(channels, 1, kernel, kernel), torch.zeros(channels)

    def launch() -> None:
        ops.depthwise(x, weight, bias, stride, stride == 1)
        ops.depthwise_weight_gradient(gradient, x, kernel, stride)
        ops.depthwise_stats(x, None, weight, bias, stride, stride == 1)
        ops.depthwise_stats_gradient(gradient, x, gradient, bias, bias, bias, kernel, stride)
        ops.depthwise_input_gradient(gradient, weight, x, side, side, stride, stride == 1)
        if stride == 2:
            ops.depthwise_input_gradient(gradient, weight, None, side, side, stride, False)

    return launch


def _block(kernel: int, channels: int, side: int) -> Callable[[], object]:
    x, y, z = _maps(3, channels, side)
    weight, bias, one = torch.zeros(channels, 1, kernel, kernel), torch.zeros(channels), torch.zeros(1)

    def launch() -> None:
        ops.depthwise_norm(x, weight, bias, bias, bias, 1e-5)
        ops.depthwise_gate_gradient(x, y, weight, bias, z)
        ops.add_norm(x, y, one, bias, bias, 1e-5)
        ops.add_norm_gradient(x, y, one, one, bias, z, one, BF16)
        ops.gate_gradient(x, y, z)

    return launch


def _fold() -> None:
    weight, bias, norm = torch.zeros(512, 2048, 1, 1), torch.zeros(512), torch.zeros(2048)
    ops.fold(weight, bias, norm, norm, norm, norm, 1e-5, BF16)
    ops.fold_gradient(weight.to(BF16), bias.to(BF16), weight, norm, norm, norm, norm, weight.to(BF16), 1e-5)


def _sums() -> None:
    for channels, side in ((32, 56), (80, 28), (1024, 7)):
        (x,) = _maps(1, channels, side)
        ops.channel_sums(x, FP32)
        ops.channel_sums(x, BF16)


def _stem() -> None:
    for channels, side in ((24, 112), (48, 56), (64, 56)):
        x, y, z = _maps(3, channels, side)
        of_channels = torch.zeros(channels)
        ops.channel_stats(x)
        ops.norm_relu(x, of_channels, of_channels, of_channels, of_channels, 1e-5)
        ops.norm_relu_sums(x, y, z, of_channels, of_channels, 1e-5)
        ops.norm_relu_gradient(x, y, z, *(of_channels for _ in range(5)), 100, 1e-5)


def _augment() -> None:
    from pipeline.augment.triton_impl import randaugment
    from pipeline.augment.triton_impl.finishing import finish

    recipe, batch = augment_recipe("fat", size=224), 64
    sides = np.full(batch, 400)
    params = draw(recipe, seed=3, epoch=0, ids=np.arange(batch), heights=sides, widths=sides)
    mixing = mix_params(recipe, seed=3, step=0, lanes=np.zeros(batch, np.int64))
    images = torch.zeros(batch, 224, 224, 3, dtype=torch.uint8)
    randaugment.apply_ops(images, params, recipe.fill, flip=False)
    finish(images, params, mixing, torch.zeros(1 << 16), recipe.mean, recipe.std, BF16)


LAUNCHES = {
    "stage 1": _depthwise(3, 64, 56),
    "stage 2": _depthwise(5, 80, 28),
    "stage 3": _depthwise(7, 160, 14),
    "stage 4": _depthwise(9, 256, 7),
    "stride 2": _depthwise(5, 256, 56, stride=2),
    "block": _block(5, 128, 28),
    "fold": _fold,
    "sums": _sums,
    "stem": _stem,
    "augmentation": _augment,
}
REGISTERS = 255  # maximum per thread; values that do not fit are spilled to memory


ON_OLDER = ("stage 2",)  # one size shows that older GPUs support all instructions
SLOW_TO_COMPILE = ("stage 2", "stage 3")  # half a minute each


@pytest.mark.parametrize(
    ("what", "capability"),
    [
        pytest.param(what, 80 if what in ON_OLDER else 90, marks=[pytest.mark.slow] * (what in SLOW_TO_COMPILE))
        for what in LAUNCHES
    ],
)
def test_compiles_for_gpus_without_spilling(what: str, compiled: OfflineDriver, tmp_path: Path) -> None:
    LAUNCHES[what]()
    assert compiled.kernels
    for name in compiled.kernels:
        registers, spilled = compiled.registers(name, tmp_path)
        assert registers <= REGISTERS, name
        assert spilled == 0, name


@pytest.mark.parametrize(
    ("shape", "lanes", "loads"),
    [
        # A thread loads each value of a row of x and of the gradient once: 7 columns, and k - 1 around them. For some
        # kernel sizes two rows are loaded at a time, so that 7 rows take the time of 8.
        (Shape(3, 1, 56, 64, False), 1, (7 + 9) / 7),
        pytest.param(Shape(5, 1, 28, 80, True), 1, (7 + 7 + 11) / 7, marks=pytest.mark.slow),
        (Shape(5, 1, 7, 256, False), 7 / 8, 2),
        (Shape(7, 1, 14, 160, False), 1, (7 + 13) / 7),
        (Shape(9, 1, 7, 256, False), 7 / 8, 2 * (5 + 7 + 5) / 7),  # three groups of kernel rows, 5 or 7 rows of x each
        (Shape(5, 2, 28, 80, True), 1, (7 + 7 + 2 * 17) / 7),
    ],
    ids=str,
)
def test_patches_reach_the_planned_occupancy_and_load_each_value_once(shape: Shape, lanes: float, loads: float) -> None:
    found = measure(shape, "patches", 80 if shape.kernel == 3 else 90)
    assert found["warps"] >= tiles.MAX_WARPS * tiles.walks(shape.kernel, shape.stride)[0].resident
    assert found["spilled"] == 0
    assert found["lanes"] == f"{lanes:.0%}"
    assert found["bytes"] == round(2 * loads / lanes, 1)


COMPILES_FOR_A_MINUTE = pytest.param(Shape(5, 1, 56, 128, True), marks=pytest.mark.slow)


@pytest.mark.parametrize("shape", [Shape(3, 1, 56, 32, False), COMPILES_FOR_A_MINUTE], ids=str)
def test_every_walk_reaches_the_planned_occupancy(shape: Shape) -> None:
    for walk in tiles.walks(shape.kernel, shape.stride):
        found = measure(shape, "patches", 90, walk)
        assert found["warps"] >= tiles.MAX_WARPS * walk.resident, walk
        assert found["spilled"] == 0, walk


def test_strips_compile_without_spilling() -> None:
    assert measure(Shape(5, 2, 14, 64, True), "strips")["spilled"] == 0


@pytest.mark.parametrize("capability", [90])
def test_forward_at_stride_2_needs_few_registers(compiled: OfflineDriver, tmp_path: Path) -> None:
    LAUNCHES["stride 2"]()
    registers, spilled = compiled.registers("_convolve", tmp_path)
    assert registers <= 104
    assert spilled == 0


@pytest.mark.parametrize("capability", [90])
def test_half_precision_feature_maps_are_loaded_16_bytes_at_a_time(compiled: OfflineDriver) -> None:
    LAUNCHES["block"]()
    for name in ("_normalize", "_add", "_sums", "_input_gradient", "_gate_gradient"):
        code = compiled.kernels[name].asm["ptx"]
        assert "ld.global.v4.b32" in code, name
    for what in ("sums", "stem"):
        LAUNCHES[what]()
    for name, kernel in compiled.kernels.items():
        loads = kernel.asm["ptx"].count("ld.global.v4.b32")
        # Number of loads in flight: four of one feature map, or at least two of one to three feature maps.
        assert loads >= 4 * name.startswith("_channel_sums"), name
        assert loads >= 2 * name.startswith(("_norm_relu", "_moments")), name


@pytest.mark.parametrize("capability", [90])
def test_a_batch_is_augmented_in_five_launches(compiled: OfflineDriver) -> None:
    """Two rounds of RandAugment, and one launch for all other operations."""
    LAUNCHES["augmentation"]()
    assert compiled.launched == ["_histogram_tables", "_apply", "_histogram_tables", "_apply", "_finish"]


@pytest.mark.parametrize("capability", [90])
def test_randaugment_is_compiled_to_the_arithmetic_of_torch(compiled: OfflineDriver) -> None:
    """No multiplication is fused with an addition, no library is called, and copies have 16 bytes per thread."""
    LAUNCHES["augmentation"]()
    for name in ("_histogram_tables", "_apply"):
        kernel = compiled.kernels[name]
        assert not kernel.metadata.enable_fp_fusion, name
        assert "mul.rn.f32" in kernel.asm["ptx"], name  # .rn forbids the assembler to fuse it
        assert not re.findall(r"\bfma\.|\bcall\b", kernel.asm["ptx"]), name
    assert "ld.global.v4.b32" in compiled.kernels["_apply"].asm["ptx"]


@pytest.mark.parametrize("kernel", [3, 5, 7, 9])
@pytest.mark.parametrize(("side", "channels"), [(56, 32), (56, 256), (28, 80), (14, 160), (7, 256), (7, 2048)])
def test_tiles_leave_few_threads_idle(kernel: int, side: int, channels: int) -> None:
    tile = tiles.depthwise(kernel, side, side, channels)
    assert tile.cols * tile.channels >= 32 * tile.warps
    wide = tile.cols
    if isinstance(tile, tiles.Blocks):
        wide *= tile.across
    else:
        assert 32 * tile.warps > tile.channels
    across = -(-side // tile.rows) * tile.rows * -(-side // wide) * wide
    deep = -(-channels // tile.channels) * tile.channels
    assert side**2 * channels / (across * deep) >= 0.7
