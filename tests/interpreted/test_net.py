"""The complete model with the kernels computes the same as without."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fat
from fat import fused_layers, kernels, layers
from fat.batchnorm import BatchNorm
from fat.config import FATConfig
from launch.engine.cuda_graphs import GraphedModel
from tests.support.recorders import ReplayOnCpu

TINY = FATConfig(
    widths=(16, 16, 32, 32),
    depths=(1, 1, 1, 1),
    heads=(1, 1, 2, 2),
    kernels=(3, 5, 7, 9),
    windows=(4, 2, 2, 1),
    drop_path=0.4,
    num_classes=3,
)
SIZE = 33  # feature maps of 9, 5, 3 and 2 pixels per side; at 1, BatchNorm over two values would magnify rounding


class Called(TorchDispatchMode):
    """Counts the calls of operators in a namespace."""

    def __init__(self, namespace: str = "fat") -> None:
        super().__init__()
        self.namespace = namespace
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == self.namespace:
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


def run(
    model: torch.nn.Module, images: Tensor, cotangent: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return logits, gradients and buffers after a training step of a copy, with the same drop path at every call."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    logits = model(images)
    (logits.float() * cotangent).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach(), gradients, dict(model.named_buffers())


@pytest.fixture(scope="module")
def model() -> fat.FAT:
    torch.manual_seed(0)
    return fat.create_model(TINY).train()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def test_training_equals_eager(model: fat.FAT, images: Tensor) -> None:
    cotangent = torch.randn(2, 3, generator=torch.Generator().manual_seed(3))
    with Called() as called:
        logits, gradients, statistics = run(model, images, cotangent)
    with kernels.use("off"), Called() as without:
        plain_logits, plain_gradients, plain_statistics = run(model, images, cotangent)
    assert not without.count
    blocks, pools = 4, 2 + 1 + 1 + 0
    norms = pools + 2 * blocks - 1  # BatchNorms of pools, feed-forward networks and the three shortcuts
    assert called.count == {
        "norm": 2,  # stem and head
        "depthwise_norm": blocks,
        "depthwise_gate": blocks,
        "depthwise_gate_gradient": blocks,
        "attend": blocks,
        "attend_gradient": blocks,
        "add_norm": blocks,
        "add_norm_gradient": blocks - 1,  # the first block has no drop path
        "norm_gradient": 2 + blocks + 1,
        "add": blocks,
        "scaled": blocks - 1,
        "depthwise_stats": norms,
        "depthwise_stats_gradient": norms,
        "fold": norms,
        "update_running_stats": norms + 4,
        "fold_gradient": norms,
        "depthwise_input_gradient": norms + 2 * blocks,
        "depthwise_weight_gradient": 2 * blocks,  # positional encoding and gate
        "channel_stats": 4,  # the stem
        "norm_relu": 4,
        "norm_relu_sums": 4,
        "norm_relu_gradient": 4,
    }
    torch.testing.assert_close(logits, plain_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics, plain_statistics, rtol=1e-4, atol=1e-6)
    scale = torch.stack([gradient.norm() for gradient in plain_gradients.values()]).max()
    for name, gradient in plain_gradients.items():
        # The gradient of a bias before BatchNorm is only rounding errors, hence the absolute tolerance.
        error = (gradients[name] - gradient).norm()
        assert error <= 1e-4 * gradient.norm() + 1e-5 * scale, f"{name}: error {error}, gradient {gradient.norm()}"


def test_activation_checkpointing_with_kernels_does_not_change_results() -> None:
    torch.manual_seed(5)
    model = fat.create_model(dataclasses.replace(TINY, drop_path=0.0)).train()
    x = torch.randn(2, 16, 5, 4).contiguous(memory_format=torch.channels_last)
    results = []
    for checkpointing in (False, True):
        stage = copy.deepcopy(model.stages[0])
        stage.checkpointing = checkpointing
        leaf = x.clone().requires_grad_()
        with Called() as called:
            stage(leaf).square().sum().backward()
        assert called.count["update_running_stats"] == called.count["fold"] // (1 + checkpointing)
        results.append([leaf.grad, *(p.grad for p in stage.parameters()), *stage.buffers()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def test_a_replaced_norm_is_called_and_not_fused(model: fat.FAT) -> None:
    block = copy.deepcopy(model.stages[0].blocks[0]).eval()
    block.norm1, block.norm2 = torch.nn.GroupNorm(4, 16), torch.nn.GroupNorm(4, 16)
    x = torch.randn(1, 16, 5, 4).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), Called() as called:
        block(x)
    assert called.count["depthwise_norm"] == called.count["add_norm"] == called.count["norm"] == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_pointwise_is_a_matrix_product_in_half_precision(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    layer = layers.pointwise(20, 12)
    x, cotangent = torch.randn(2, 20, 5, 3), torch.randn(2, 12, 5, 3).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    results = []
    for switch in (True, False):
        monkeypatch.setattr(layers, "MATRIX_PRODUCTS", switch)
        twin, leaf = copy.deepcopy(layer), x.clone().requires_grad_()
        with Called("aten") as called, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = twin(leaf)
        assert (called.count["addmm"] == 1) == switch
        assert (called.count["convolution"] == 1) != switch
        assert out.is_contiguous(memory_format=torch.channels_last)
        with Called() as called:
            out.backward(cotangent)
        assert called.count == ({"channel_sums": 1} if switch else {})
        results.append([out, leaf.grad, twin.weight.grad, twin.bias.grad])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_pointwise_computes_only_the_required_gradients(frozen: str) -> None:
    layer = layers.pointwise(20, 12).bfloat16()
    leaves = {"input": torch.randn(2, 20, 5, 3).bfloat16(), "weight": layer.weight, "bias": layer.bias}
    leaves["input"] = leaves["input"].contiguous(memory_format=torch.channels_last)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    with Called("aten") as called:
        layer(leaves["input"]).sum().backward()
    assert called.count["mm"] == (2 if frozen == "bias" else 1)
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name == frozen)
    with torch.no_grad(), Called() as without:
        assert not layer(leaves["input"]).requires_grad
    assert not without.count


class TwoRanks(BatchNorm):
    """BatchNorm over two ranks that have the same values."""

    ranks = 2

    def sync_sum(self, values: Tensor) -> Tensor:
        return 2 * values


@pytest.mark.parametrize("kind", [BatchNorm, TwoRanks])
def test_the_stems_fused_norm_computes_the_same_without_the_convolutions_bias(kind: type[BatchNorm]) -> None:
    torch.manual_seed(6)
    unit = layers.ConvNorm(torch.nn.Conv2d(3, 16, 3, 2, padding=1)).train()
    torch.nn.init.normal_(unit.bn.weight)
    unit.bn.running_mean.normal_()
    fused = copy.deepcopy(unit)
    fused.bn.__class__ = kind
    x = torch.randn(3, 3, 9, 12).contiguous(memory_format=torch.channels_last)
    results = []
    for module, call in ((unit, lambda m, x: F.relu(m(x))), (fused, fused_layers.convolve_relu)):
        leaf = x.clone().requires_grad_()
        with Called() as called:
            y = call(module, leaf)
            y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        assert called.count["norm_relu"] == (module is fused)
        results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    count = y.numel() // 16
    if kind is TwoRanks:  # the running variance is corrected for twice as many values
        new = (results[0][-2] - 0.9) / 0.1 * (count - 1) / count * 2 * count / (2 * count - 1)
        results[0][-2] = 0.9 + 0.1 * new
    assert not fused.conv.bias.grad.any()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_captured_stage_is_bitwise_equal_to_an_eager_one(model: fat.FAT) -> None:
    """The capture calls custom operators with copies of the parameters, and `autograd.grad`, under autocast."""
    eager, captured = copy.deepcopy(model.stages[0]), copy.deepcopy(model.stages[0])
    x = torch.randn(1, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    GraphedModel(captured, ReplayOnCpu(x.device)).capture(x, torch.bfloat16)
    for stage in (eager, captured):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16), Called() as called:
            y = stage(x + 1)
        y.float().square().sum().backward()
        assert (
            called.count["depthwise_gate"] == called.count["add_norm"] == called.count["update_running_stats"] // 4 == 1
        )
    for replayed, expected in zip(captured.parameters(), eager.parameters(), strict=True):
        assert torch.equal(replayed.grad, expected.grad)
    for replayed, expected in zip(captured.buffers(), eager.buffers(), strict=True):
        assert torch.equal(replayed, expected)


def test_a_captured_stem_is_bitwise_equal_to_an_eager_one(model: fat.FAT) -> None:
    eager, captured = copy.deepcopy(model.stem), copy.deepcopy(model.stem)
    images = torch.randn(2, 3, SIZE, SIZE)
    GraphedModel(captured, ReplayOnCpu(images.device)).capture(images, torch.bfloat16)
    for stem in (eager, captured):
        with torch.autocast("cpu", torch.bfloat16), Called() as called:
            y = stem(images + 1)
        y.float().square().sum().backward()
        assert called.count["norm_relu"] == called.count["update_running_stats"] == 4
    for replayed, expected in zip(captured.parameters(), eager.parameters(), strict=True):
        assert torch.equal(replayed.grad, expected.grad)
    for replayed, expected in zip(captured.buffers(), eager.buffers(), strict=True):
        assert torch.equal(replayed, expected)


def test_modules_with_hooks_are_called_and_not_fused(model: fat.FAT, images: Tensor) -> None:
    """ZeRO 3 gathers a module's weights in hooks, so these must run."""
    seen: list[Tensor] = []
    block = model.stages[0].blocks[0]
    hook = block.norm1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(1, 16, 5, 4).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), Called() as called:
        block.eval()._attend(x)
    hook.remove()
    block.train()
    assert len(seen) == 1
    assert called.count["depthwise_norm"] == 0
    assert called.count["norm"] == 1


def test_exported_graphs_contain_no_kernels(model: fat.FAT) -> None:
    x = torch.randn(2, 16, 5, 4).contiguous(memory_format=torch.channels_last)
    graph = torch.export.export(model.stages[0].blocks[0], (x,)).graph
    called = {str(node.target) for node in graph.nodes}
    assert "aten.conv2d.default" in called
    assert not {name for name in called if name.startswith("fat.")}


def test_the_model_compiles_to_one_forward_and_one_backward_graph(model: fat.FAT, images: Tensor) -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    graphs: list[Counter[str]] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(
            Counter(str(node.target).split(".")[1] for node in graph.graph.nodes if "fat." in str(node.target))
        )
        return make_boxed_func(lambda *arguments: _zeros(graph))

    def _zeros(graph: torch.fx.GraphModule) -> list[object]:
        """Return zeros in place of the graph's outputs, because only tracing is tested."""
        (output,) = next(iter(graph.graph.find_nodes(op="output"))).args
        found = [node if node is None else node.meta["val"] for node in output]
        return [torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v for v in found]

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=record), fullgraph=True)
    compiled(images).sum().backward()
    forward, backward = graphs
    assert forward["add_norm"] == forward["depthwise_gate"] == 4
    assert backward["depthwise_gate_gradient"] == 4
    assert backward["depthwise_weight_gradient"] == 4 + 4
    assert backward["depthwise_stats_gradient"] == 4 + 4 + 3
