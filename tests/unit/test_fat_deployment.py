"""Fused, exported and compiled models compute the same as the original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fat
from fat.blocks import Block
from tests.support.tiny_fat import TINY, images, set_running_stats

# One block per stage: the time of exporters and compilers grows with the number of operations.
MINI = fat.FATConfig(
    widths=(8, 8, 16, 16), depths=(1, 1, 1, 1), heads=(1, 2, 2, 4), windows=(2, 1, 1, 1), num_classes=5
)
SHAPES = [(1, (64, 64)), (3, (97, 65)), (1, (97, 65)), (3, (64, 64))]
TOLERANCE = 1e-4  # relative to the largest logit


def with_running_stats(name: str | fat.FATConfig, features_only: bool = False) -> fat.FAT:
    torch.manual_seed(0)
    model: fat.FAT = set_running_stats(fat.create_model(name, features_only=features_only))
    return model


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


def check_fused(name: str | fat.FATConfig) -> None:
    model = with_running_stats(name)
    fused = fat.fuse(model)
    with torch.no_grad():
        assert_same(fused(images()), model(images()))


@pytest.mark.parametrize("name", [TINY, "fat_b0"], ids=["tiny", "fat_b0"])
def test_fused_computes_the_same(name: str | fat.FATConfig) -> None:
    check_fused(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fat_b1", "fat_b2", "fat_b3"])
def test_fused_computes_the_same_in_every_variant(name: str) -> None:
    check_fused(name)


def test_fuse_removes_every_batchnorm_and_does_not_change_the_model() -> None:
    model = with_running_stats(TINY)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fused = fat.fuse(model.train())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
    assert not fused.training
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_fused_features_are_the_same() -> None:
    model = with_running_stats(TINY, features_only=True)
    with torch.no_grad():
        for found, expected in zip(fat.fuse(model)(images()), model(images()), strict=True):
            assert_same(found, expected)


def test_fuse_rejects_half_precision() -> None:
    with pytest.raises(ValueError, match=r"model in torch.bfloat16: fuse\(\) expects float32 or float64 weights"):
        fat.fuse(fat.FAT(TINY).bfloat16())


def check_program(model: fat.FAT) -> None:
    program = fat.export_program(model.train()).module()
    model.eval()
    with torch.no_grad():
        for batch, size in SHAPES:
            assert_same(program(images(batch, size)), model(images(batch, size)))


def check_onnx(model: fat.FAT, path: Path) -> None:
    import onnxruntime

    fat.export_onnx(model, path, metadata={"classes": '["ant", "bee"]'})
    session = onnxruntime.InferenceSession(path)
    assert session.get_modelmeta().custom_metadata_map["classes"] == '["ant", "bee"]'
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for batch, size in SHAPES:
        found = session.run(None, {"images": images(batch, size).numpy()})
        with torch.no_grad():
            expected = model(images(batch, size))
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        assert len(found) == len(expected)
        for output, reference in zip(found, expected, strict=True):
            assert_same(torch.from_numpy(np.asarray(output)), reference)


def test_exported_program_accepts_any_batch_and_image_size() -> None:
    check_program(with_running_stats(MINI))


@pytest.mark.slow
def test_onnx_accepts_any_batch_and_image_size(tmp_path: Path) -> None:
    check_onnx(with_running_stats(MINI), tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.slow
@pytest.mark.timeout(900)  # an export takes minutes on two cores
@pytest.mark.parametrize("name", ["fat_b0", "fat_b2"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_variants_export(name: str, fused: bool, tmp_path: Path) -> None:
    model = fat.fuse(with_running_stats(name)) if fused else with_running_stats(name)
    check_program(model)
    check_onnx(model, tmp_path / "m.onnx")


@pytest.mark.slow
def test_feature_maps_export(tmp_path: Path) -> None:
    check_onnx(with_running_stats(MINI, features_only=True), tmp_path / "m.onnx")


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_to_one_graph_once(checkpointing: bool) -> None:
    """There is one graph for training and one for inference: fullgraph raises on graph breaks, and the counter detects
    recompilation."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = fat.create_model(MINI, drop_path=0.1).train()
    model.set_grad_checkpointing(checkpointing)
    eager = fat.create_model(MINI)
    eager.load_state_dict(model.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        compiled(images(4)).sum().backward()
    assert counter.frame_count == 1
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            found = compiled(images(4))
    assert counter.frame_count == 2
    assert model.stem.convs[0].bn.num_batches_tracked == 3  # once per step, also with activation checkpointing
    eager.load_state_dict(model.state_dict())
    assert_same(found, eager.eval()(images(4)).detach())


@pytest.mark.slow
def test_compiled_block_has_the_gradients_of_the_eager_block() -> None:
    """With inductor, the default backend."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block(16, 2, 3, 2, out_dim=32, stride=2).train()
    x = torch.randn(2, 16, 12, 10).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    compiled = torch.compile(block, fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), [x, *block.parameters()])
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-3)
