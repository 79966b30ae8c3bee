"""The kernels on a GPU: ten random inputs each, the model's shapes, training steps, CUDA graphs. The same checks run on
small feature maps in Triton's interpreter (tests/interpreted)."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fat
from fat import kernels
from fat.kernels import ops, selfcheck
from fat.kernels.impl import tiles
from fat.kernels.prefill.compile_ahead import compile_ahead
from fat.layers import project
from pipeline.augment import selfcheck as augment_selfcheck
from pipeline.augment.params import draw, mix_params
from pipeline.augment.pixels import BatchAugment
from pipeline.augment.recipe import augment_recipe
from tests.support.kernel_checks import (
    BF16,
    FP16,
    FP32,
    Case,
    Draw,
    check_add,
    check_attend,
    check_channel_sums,
    check_depthwise,
    check_depthwise_gate,
    check_depthwise_norm,
    check_depthwise_stats,
    check_fold,
    check_gate,
    check_norm,
    check_norm_relu,
    check_weight_gradient,
    poisoned_memory,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

INPUTS = 10


@pytest.fixture(autouse=True)
def _exact_references() -> Iterator[None]:
    """Disable TF32 for the fp32 references."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def on_random_inputs(check: Callable[[Draw], None]) -> None:
    for _ in range(INPUTS):
        seed = secrets.randbits(32)
        try:
            with poisoned_memory():
                check(Draw.seeded(seed, "cuda"))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


DEPTHWISE = [
    Case(3, 1, 3, 64, 56, 56, BF16, residual=True),  # stages of B0 to B3
    Case(3, 1, 2, 48, 56, 56, BF16),
    Case(5, 1, 2, 80, 28, 28, BF16, residual=True),
    Case(5, 1, 2, 256, 56, 56, BF16, residual=True),
    Case(7, 1, 2, 160, 14, 14, BF16, residual=True),
    Case(9, 1, 2, 512, 7, 7, BF16, residual=True),
    Case(5, 2, 2, 64, 56, 56, BF16),
    Case(5, 2, 2, 640, 14, 14, BF16),
    Case(3, 1, 1, 20, 13, 9, FP32, residual=True),  # all other kernel sizes, odd feature maps, odd channels
    Case(3, 2, 3, 24, 13, 9, FP16),
    Case(7, 2, 2, 33, 14, 13, FP32, bias=False),
    Case(9, 1, 1, 7, 13, 9, FP32),
    Case(9, 2, 2, 72, 15, 7, BF16),
]


@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise(case: Case) -> None:
    on_random_inputs(lambda draw: check_depthwise(case, draw))


@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
@pytest.mark.parametrize("form", ["strips", "patches"])
def test_weight_gradient_in_both_forms(form: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "weight_gradient", getattr(tiles, form))
    on_random_inputs(lambda draw: check_weight_gradient(case, draw))


NORMED = [
    Case(5, 1, 3, 128, 56, 56, BF16, residual=True),  # feed-forward networks of B0's stages
    Case(5, 1, 16, 320, 28, 28, BF16, residual=True),
    Case(5, 1, 2, 1024, 7, 7, BF16, residual=True),
    Case(5, 2, 2, 64, 56, 56, BF16),
    Case(5, 2, 3, 20, 13, 9, FP32),
    Case(9, 1, 2, 40, 8, 9, FP16),
]


@pytest.mark.parametrize("case", NORMED, ids=str)
def test_depthwise_and_statistics(case: Case) -> None:
    on_random_inputs(lambda draw: check_depthwise_stats(case, draw))


FOLDED = [(32, 128, BF16), (512, 2048, BF16), (33, 20, FP32), (40, 72, FP16)]


@pytest.mark.parametrize(("outputs", "channels", "dtype"), FOLDED)
def test_fold(outputs: int, channels: int, dtype: torch.dtype) -> None:
    on_random_inputs(lambda draw: check_fold(outputs, channels, dtype, draw))


GATED = [Case(3, 1, 2, 32, 56, 56, BF16), Case(5, 1, 2, 80, 28, 28, BF16), Case(9, 1, 2, 20, 7, 9, FP32)]


@pytest.mark.parametrize("case", GATED, ids=str)
def test_depthwise_gate(case: Case) -> None:
    on_random_inputs(lambda draw: check_depthwise_gate(case, draw))


@pytest.mark.parametrize("case", GATED, ids=str)
def test_depthwise_and_norm(case: Case) -> None:
    on_random_inputs(lambda draw: check_depthwise_norm(case, draw))


# Queries, keys, heads: stages of B0 to B3, then shapes that fill no tile.
ATTENTION = [
    ((3, 32, 56, 56), (7, 7), 2, BF16),
    ((2, 64, 56, 56), (7, 7), 2, BF16),
    ((2, 160, 14, 14), (7, 7), 10, BF16),
    ((5, 512, 7, 7), (7, 7), 16, BF16),
    ((2, 32, 14, 14), (7, 7), 2, FP32),
    ((3, 30, 13, 9), (3, 2), 3, FP16),
]


@pytest.mark.parametrize(("queries", "keys", "heads", "dtype"), ATTENTION)
def test_attention(queries: tuple[int, int, int, int], keys: tuple[int, int], heads: int, dtype: torch.dtype) -> None:
    on_random_inputs(lambda draw: check_attend(queries, keys, heads, dtype, draw))


MAPS = [((3, 32, 56, 56), BF16), ((2, 160, 28, 28), BF16), ((2, 512, 7, 7), BF16), ((3, 20, 13, 9), FP32)]


@pytest.mark.parametrize(("shape", "dtype"), MAPS)
def test_gate_norm_and_add(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    on_random_inputs(lambda draw: check_gate(shape, dtype, draw))
    on_random_inputs(lambda draw: check_norm(shape, dtype, 0.0, draw))
    on_random_inputs(lambda draw: check_norm(shape, dtype, 50.0, draw))
    on_random_inputs(lambda draw: check_add(shape, dtype, True, draw))


SUMMED = [((256, 32, 56, 56), BF16), ((3, 320, 28, 28), BF16), ((256, 1024, 7, 7), BF16), ((3, 20, 13, 9), FP32)]


@pytest.mark.parametrize(("shape", "dtype"), SUMMED)
def test_channel_sums(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    on_random_inputs(lambda draw: check_channel_sums(shape, dtype, draw))


STEM = [((16, 16, 112, 112), BF16), ((16, 48, 56, 56), BF16), ((16, 64, 56, 56), BF16), ((3, 20, 13, 9), FP32)]


@pytest.mark.parametrize(("shape", "dtype"), STEM)
def test_norm_and_relu(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    on_random_inputs(lambda draw: check_norm_relu(shape, dtype, 3.0, draw))


@pytest.mark.parametrize(
    "name", ["depthwise_norm", "depthwise_gate", "depthwise_stats", "add_norm", "fold", "attend"]
)
def test_opcheck(name: str) -> None:
    draw = Draw.seeded(0, "cuda")
    x, y = (draw.map(2, 32, 9, 7, FP32).requires_grad_() for _ in range(2))
    weight, bias = draw.tensor(32, 1, 3, 3).requires_grad_(), draw.tensor(32).requires_grad_()
    arguments = {
        "depthwise_norm": (x, weight, bias, bias, bias, 1e-5),
        "depthwise_gate": (x, weight, bias, y),
        "depthwise_stats": (x, None, weight, bias, 2, False),
        "add_norm": (x, y, draw.scale(2), bias, bias, 1e-5),
        "attend": (x, draw.map(2, 64, 3, 4, FP32).requires_grad_(), 2, 0.25),
        "fold": (
            draw.tensor(8, 32, 1, 1).requires_grad_(),
            draw.tensor(8),
            bias,
            bias,
            bias,
            bias.detach() ** 2,
            1e-5,
            BF16,
        ),
    }
    torch.library.opcheck(getattr(torch.ops.fat, name), arguments[name])


def gradient(model: torch.nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the loss with respect to all parameters, as one vector."""
    model.zero_grad()
    with torch.autocast("cuda", BF16, enabled=dtype == BF16):
        logits = model(images)
    F.cross_entropy(logits.float(), labels).backward()
    return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])


@pytest.mark.parametrize("variant", ["fat_b0", "fat_b3"])
def test_gradients_of_the_model(variant: str) -> None:
    """In fp32 they equal those without kernels; under bf16 autocast their error is about that without kernels."""
    torch.manual_seed(0)
    model = fat.create_model(variant, drop_path=0.0).cuda().train()
    images = torch.randn(8, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.arange(8, device="cuda")
    found: dict[tuple[str, torch.dtype], Tensor] = {}
    for switch in ("off", "auto"):
        for dtype in (FP32, BF16):
            with kernels.use(switch):
                found[switch, dtype] = gradient(model, images, labels, dtype)
    exact = found["off", FP32]
    errors = {key: ((vector - exact).norm() / exact.norm()).item() for key, vector in found.items()}
    assert errors["auto", FP32] < 1e-3, errors
    assert errors["auto", BF16] < 1.5 * errors["off", BF16] + 1e-3, errors


def test_a_step_is_captured_as_a_cuda_graph() -> None:
    torch.manual_seed(0)
    block = fat.create_model("fat_b0").cuda().stages[0].blocks[0]
    x = torch.randn(4, 32, 56, 56, device="cuda").to(BF16).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast("cuda", BF16, cache_enabled=False):
            block(x).float().square().mean().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            block.zero_grad()
            before = [buffer.clone() for buffer in block.buffers()]
            step()
    torch.cuda.current_stream().wait_stream(stream)
    expected = [parameter.grad.clone() for parameter in block.parameters()]
    block.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for parameter in block.parameters():
        parameter.grad.zero_()
    # The running mean is subtracted before feature maps are rounded, so results depend on it (docs/kernels.md).
    for buffer, initial in zip(block.buffers(), before, strict=True):
        buffer.copy_(initial)
    graph.replay()
    # The gradient of a bias before BatchNorm is only rounding errors, hence the absolute tolerance.
    scale = max(gradient.abs().max().item() for gradient in expected)
    for parameter, gradient in zip(block.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0.02, atol=1e-4 * scale)


def test_a_compiled_block_has_the_gradients_of_an_eager_one() -> None:
    torch.manual_seed(0)
    block = fat.create_model("fat_b0", drop_path=0.0).cuda().stages[1].blocks[0]
    x = torch.randn(4, 80, 28, 28, device="cuda").contiguous(memory_format=torch.channels_last)
    results = []
    for run in (block, torch.compile(block, fullgraph=True)):
        block.zero_grad()
        run(x).square().mean().backward()
        results.append([parameter.grad.clone() for parameter in block.parameters()])
    scale = max(gradient.abs().max().item() for gradient in results[0])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("mixes", [False, True])
def test_the_finishing_kernel_computes_the_same_as_torch(mixes: bool) -> None:
    recipe = augment_recipe("fat", rand_augment=None, erase=0.5)
    sides = np.full(16, 400)
    for _ in range(INPUTS):
        seed = secrets.randbits(31)
        params = draw(recipe, seed=seed, epoch=0, ids=np.arange(16), heights=sides, widths=sides)
        mixing = mix_params(recipe, seed=seed, step=1, lanes=np.arange(16) // 2) if mixes else None
        images = torch.randint(256, (16, 224, 224, 3), dtype=torch.uint8, device="cuda")
        found = {}
        for use in (True, False):
            found[use] = BatchAugment(recipe, torch.device("cuda"), kernels=use)(images, params, mixing)
        torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=1e-5, msg=f"seed {seed}")


def test_weight_gradients_of_pointwise_convolutions_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the positions of a batch of 256 in stage 1. The engine disables reduced-precision reductions in bf16."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    x, gradient = (torch.randn(256, c, 56, 56, device="cuda").to(BF16) for c in (128, 32))
    x, gradient = (t.contiguous(memory_format=torch.channels_last) for t in (x + 1, gradient))
    weight = torch.randn(32, 128, 1, 1, device="cuda", dtype=BF16, requires_grad=True)
    (found,) = torch.autograd.grad(project(x, weight, torch.zeros(32, device="cuda", dtype=BF16)), weight, gradient)
    rows, columns = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (gradient, x))
    exact = sum(a.double().t() @ b.double() for a, b in zip(rows.split(1 << 16), columns.split(1 << 16), strict=True))
    error = (found.flatten(1).double() - exact).abs()
    assert (error <= 2**-8 * exact.abs() + 1e-3 * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_every_family_passes_the_self_check(dtype: torch.dtype) -> None:
    """The checks are those of a training run on this device."""
    checks: list[selfcheck.Check] = [
        *selfcheck.cases(fat.create_model("fat_b0"), 224, dtype),
        *augment_selfcheck.cases(augment_recipe("fat"), dtype),
    ]
    assert compile_ahead([check.launch for check in checks]).problem is None
    assert selfcheck.run(checks, torch.device("cuda")) == []


def test_a_wrong_kernel_fails_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from fat.kernels.impl import norm

    normalize = norm.normalize

    def off_by_a_percent(*arguments: Any) -> tuple[Tensor, Tensor]:
        mean, rstd = normalize(*arguments)
        return mean, 1.01 * rstd

    monkeypatch.setattr(norm, "normalize", off_by_a_percent)
    failures = selfcheck.run(selfcheck.cases(fat.create_model("fat_b0"), 64, BF16), torch.device("cuda"))
    assert [failure.family for failure in failures] == ["norm"]


def test_unsupported_tensors_are_rejected() -> None:
    x = torch.zeros(1, 32, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)
    assert kernels.can_use(x)
    assert not kernels.can_use(x.contiguous())
    assert not kernels.can_use(x.cpu())
    with pytest.raises(ValueError, match="one device"):
        ops.depthwise(x, torch.zeros(32, 1, 3, 3), None, 1, False)
