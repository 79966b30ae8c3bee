"""Synchronized BatchNorm with PyTorch's CUDA kernels, in a group of one rank; the CPU test has several. `make gpu`."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from launch.engine.sync_batchnorm import GlobalBatchNorm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group([0])
    if started:
        dist.destroy_process_group()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_it_computes_the_same_as_batch_norm(
    group: dist.ProcessGroup, layout: torch.memory_format, dtype: torch.dtype, tolerance: float, compiled: bool
) -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 48, 28, 28, device="cuda").add_(3).to(dtype).to(memory_format=layout)
    cotangent = torch.randn_like(images)
    plain = nn.BatchNorm2d(48).cuda()
    nn.init.normal_(plain.weight)
    synchronized = GlobalBatchNorm(copy.deepcopy(plain), group)
    found = []
    for norm in (plain, torch.compile(synchronized, fullgraph=True) if compiled else synchronized):
        x = images.clone().requires_grad_()
        y = norm(x)
        y.backward(cotangent)
        assert y.is_contiguous(memory_format=layout)
        found.append([y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
    for expected, got in zip(*found, strict=True):
        scale = expected.float().abs().max()
        assert (expected.float() - got.float()).abs().max() < tolerance * scale


def test_it_does_not_wait_for_the_device(group: dist.ProcessGroup) -> None:
    norm = GlobalBatchNorm(nn.BatchNorm2d(48).cuda(), group)
    images = torch.randn(16, 48, 28, 28, device="cuda", requires_grad=True)
    norm(images).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm(images).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
