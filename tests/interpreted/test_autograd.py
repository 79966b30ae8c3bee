"""The operators' integration with PyTorch: autograd, schemas, fake tensors, compilation, autocast, argument checks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fat import kernels
from fat.kernels import ops
from tests.support.kernel_checks import BF16, FP32, Draw, expect

SHAPE = (2, 20, 5, 4)
KERNEL = 3
SCALE = torch.tensor([1.25, 0.0])


def maps(*dtypes: torch.dtype) -> list[Tensor]:
    draw = Draw.seeded(7, "cpu")
    return [draw.map(*SHAPE, dtype) for dtype in dtypes]


def weights() -> list[Tensor]:
    draw = Draw.seeded(8, "cpu")
    return [draw.tensor(SHAPE[1], 1, KERNEL, KERNEL), *(draw.tensor(SHAPE[1]) for _ in range(3))]


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    return F.conv2d(x, weight, bias, stride, KERNEL // 2, groups=SHAPE[1])


def attended(q: Tensor, kv: Tensor) -> Tensor:
    """Compute attention with two heads."""
    split = [x.flatten(2).unflatten(1, (2, -1)).mT for x in (q, *kv.chunk(2, 1))]
    return F.scaled_dot_product_attention(*split, scale=0.3).mT.reshape(q.shape)


def added(x: Tensor, branch: Tensor) -> Tensor:
    return x + branch * SCALE.double().view(-1, 1, 1, 1)


def normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, 1, weight, bias, 1e-5)


def with_stats(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return y, y.mean(dim=(0, 2, 3)), y.var(dim=(0, 2, 3), correction=0)


def folded(weight: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    bias, gain, shift, mean, var = rest
    result = weight * (gain * (var + 1e-5).rsqrt()).view(-1, 1, 1)
    return result, bias + (weight.flatten(1) * shift - result.flatten(1) * mean).sum(1)


X, Y = maps(FP32, FP32)
WEIGHT, BIAS, GAIN, SHIFT = weights()
KV = Draw.seeded(11, "cpu").map(SHAPE[0], 2 * SHAPE[1], 3, 2, FP32)
MATRIX = Draw.seeded(10, "cpu").tensor(6, SHAPE[1], 1, 1)
# name -> (function of fat.kernels, the same in PyTorch, arguments that require gradients)
FUNCTIONS: dict[str, tuple[Callable[..., object], Callable[..., object], list[Tensor]]] = {
    "depthwise": (kernels.depthwise, convolved, [X, WEIGHT, BIAS]),
    "depthwise, stride 2": (
        lambda *a: kernels.depthwise(*a, None, stride=2),
        lambda *a: convolved(*a, None, 2),
        [X, WEIGHT],
    ),
    "x + depthwise": (
        lambda *a: kernels.depthwise(*a, residual=True),
        lambda x, *a: x + convolved(x, *a),
        [X, WEIGHT, BIAS],
    ),
    "depthwise and gate": (
        lambda q, other, w, b: kernels.depthwise_gate(q, w, b, other),
        lambda q, other, w, b: F.silu(convolved(q, w, b)) * F.silu(other),
        [X, Y, WEIGHT, BIAS],
    ),
    "gate": (kernels.gate, lambda a, b: F.silu(a) * F.silu(b), [X, Y]),
    "attend": (lambda q, kv: kernels.attend(q, kv, 2, 0.3), attended, [X, KV]),
    "norm": (lambda *a: kernels.norm(*a, 1e-5), normalized, [X, GAIN, SHIFT]),
    "add": (lambda x, y: kernels.add(x, y, SCALE), added, [X, Y]),
    "add and norm": (
        lambda x, y, *a: kernels.add_norm(x, y, SCALE, *a, 1e-5),
        lambda x, y, *a: (added(x, y), normalized(added(x, y), *a)),
        [X, Y, GAIN, SHIFT],
    ),
    "add and norm without drop path": (
        lambda x, y, *a: kernels.add_norm(x, y, None, *a, 1e-5),
        lambda x, y, *a: (x + y, normalized(x + y, *a)),
        [X, Y, GAIN, SHIFT],
    ),
    "depthwise and statistics": (
        lambda *a: kernels.depthwise_stats(*a, residual=True),
        lambda x, *a: with_stats(x + convolved(x, *a)),
        [X, WEIGHT, BIAS],
    ),
    "depthwise of GELU, and statistics": (
        lambda *a: kernels.depthwise_stats(*a, stride=2, gelu=True),
        lambda x, *a: with_stats(convolved(F.gelu(x), *a, 2)),
        [X, WEIGHT, BIAS],
    ),
    "fold": (
        lambda *a: ops.fold(*a, 1e-5, FP32),
        folded,
        [MATRIX, BIAS[:6], GAIN, SHIFT, BIAS, SHIFT.square() + 0.1],
    ),
    "1x1": (kernels.pointwise, F.conv2d, [X, MATRIX, BIAS[:6]]),
    "depthwise and norm": (
        lambda *a: kernels.depthwise_norm(*a, 1e-5),
        lambda x, w, b, *a: (x + convolved(x, w, b), normalized(x + convolved(x, w, b), *a)),
        [X, WEIGHT, BIAS, GAIN, SHIFT],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_reach_every_argument(name: str) -> None:
    function, reference, arguments = FUNCTIONS[name]
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    exact = [argument.double().requires_grad_() for argument in arguments]
    results = [_outputs(function(*leaves)), _outputs(reference(*exact))]
    draw = Draw.seeded(9, "cpu")
    cotangents = [draw.tensor(*result.shape) for result in results[0]]  # contiguous: the operators must convert them
    torch.autograd.backward(results[0], cotangents)
    torch.autograd.backward(results[1], [cotangent.double() for cotangent in cotangents])
    for number, (a, b) in enumerate(zip(leaves, exact, strict=True)):
        assert a.grad is not None
        expect(f"gradient of argument {number}", a.grad, b.grad)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_to_one_graph(name: str) -> None:
    """Forward and backward pass are compiled, and gradients are bitwise equal to those in eager mode."""
    torch._dynamo.reset()
    function, _, arguments = FUNCTIONS[name]
    gradients = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        leaves = [argument.clone().requires_grad_() for argument in arguments]
        sum(output.square().sum() for output in _outputs(call(*leaves))).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*gradients, strict=True):
        assert torch.equal(eager, compiled)


MEAN, RSTD = torch.zeros(SHAPE[0]), torch.ones(SHAPE[0])
OPERATORS = {
    "depthwise": (X, WEIGHT, BIAS, 1, True),
    "depthwise_input_gradient": (X, WEIGHT, None, 2 * SHAPE[2], 2 * SHAPE[3] - 1, 2, False),
    "depthwise_weight_gradient": (X, Y, KERNEL, 1),
    "depthwise_gate": (X, WEIGHT, None, Y),
    "depthwise_gate_gradient": (X, X, WEIGHT, BIAS, Y),
    "depthwise_stats": (X, None, WEIGHT, BIAS, 2, False),
    "depthwise_stats_gradient": (X, Y, X, BIAS, GAIN, SHIFT, KERNEL, 1),
    "fold": (MATRIX, BIAS[:6], GAIN, SHIFT, BIAS, SHIFT.square(), 1e-5, BF16),
    "update_running_stats": (BIAS.clone(), GAIN.clone(), torch.tensor(3), SHIFT, GAIN, 0.1, 1.25),
    "fold_gradient": (MATRIX[:, :, 0, 0], BIAS[:6], MATRIX, GAIN, SHIFT, BIAS, SHIFT.square(), MATRIX, 1e-5),
    "channel_stats": (X,),
    "channel_sums": (X, BF16),
    "norm_relu": (X, GAIN, SHIFT, BIAS, GAIN.square(), 1e-5),
    "norm_relu_gradient": (X, Y, Y, GAIN, BIAS, GAIN.square(), BIAS, SHIFT, 40, 1e-5),
    "norm_relu_sums": (X, Y, Y, BIAS, GAIN.square(), 1e-5),
    "gate": (X, Y),
    "gate_gradient": (X, X, Y),
    "attend": (X, KV, 2, 0.3),
    "attend_gradient": (X, Y, KV, 2, 0.3),
    "norm": (X, GAIN, SHIFT, 1e-5),
    "add": (X, Y, SCALE),
    "scaled": (X, SCALE),
    "add_norm": (X, Y, None, GAIN, SHIFT, 1e-5),
    "depthwise_norm": (X, WEIGHT, BIAS, GAIN, SHIFT, 1e-5),
    "norm_gradient": (X, Y, MEAN, RSTD, GAIN, X),
    "add_norm_gradient": (X, Y, MEAN, RSTD, GAIN, X, SCALE, BF16),
}
DIFFERENTIABLE = {
    "attend",
    "depthwise",
    "depthwise_gate",
    "depthwise_stats",
    "depthwise_norm",
    "fold",
    "gate",
    "norm",
    "add",
    "add_norm",
}


def test_every_operator_is_listed() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fat::")}
    assert registered == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    arguments = OPERATORS[name]
    if name in DIFFERENTIABLE:
        arguments = tuple(
            a.clone().requires_grad_() if isinstance(a, Tensor) and a is not SCALE else a for a in arguments
        )
    torch.library.opcheck(getattr(torch.ops.fat, name), arguments)


def test_under_autocast_feature_maps_have_its_dtype_and_weight_gradients_that_of_the_weights() -> None:
    x, weight, bias = (argument.clone().requires_grad_() for argument in (X, WEIGHT, BIAS))
    with torch.autocast("cpu", BF16):
        out = kernels.depthwise(x, weight, bias)
    assert out.dtype == BF16
    out.float().sum().backward()
    assert (x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (FP32, FP32, FP32)
    rounded = X.to(BF16)
    expect("out", out.detach(), convolved(rounded.double(), WEIGHT.double(), BIAS.double()))
    # The output's gradient is 1, so a corner tap's gradient is an fp32 sum of (H - 1) (W - 1) inputs in bf16.
    expect("gradient of weight", weight.grad[:, 0, 0, 0], rounded.double()[:, :, :-1, :-1].sum(dim=(0, 2, 3)))


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (X.contiguous(), "channels-last"),
        (X.double(), "float64"),
        (X[0], "channels-last"),
        (X[:, :, :, ::2], "channels-last"),
    ],
)
def test_unsupported_feature_maps_are_rejected_by_can_use_and_by_the_operator(x: Tensor, why: str) -> None:
    assert kernels.can_use(X)
    assert not kernels.can_use(x)
    assert not kernels.can_use(X, x)
    with pytest.raises(ValueError, match=why):
        ops.norm(x, GAIN, SHIFT, 1e-5)


def test_unsupported_weights_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"\(20, 1, 4, 4\) for 20 channels: expected \[20, 1, k, k\] with k one of 3"):
        kernels.depthwise(X, torch.zeros(20, 1, 4, 4), None)
    with pytest.raises(ValueError, match="stride 3"):
        kernels.depthwise(X, WEIGHT, None, stride=3)
    with pytest.raises(ValueError, match="expected one device and one dtype"):
        ops.gate(X, Y.to(BF16))


def test_the_mode_applies_within_its_context() -> None:
    with kernels.use("off"):
        assert not kernels.can_use(X)
        with kernels.use("unchecked"):
            assert kernels.can_use(X)
        assert not kernels.can_use(X)
    assert kernels.can_use(X)
    with pytest.raises(ValueError, match="no: expected auto, off or unchecked"), kernels.use("no"):  # type: ignore[arg-type]
        pass


def test_the_kernels_do_not_accept_empty_feature_maps() -> None:
    assert not kernels.can_use(X[:0])


def _outputs(result: object) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)  # type: ignore[return-value]
