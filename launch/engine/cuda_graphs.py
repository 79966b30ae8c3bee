"""Training passes of a model as CUDA graphs.

An eager step of FAT-B0 launches about 1,700 kernels. Each costs 85 us of a CPU core on the host of an H200, so that the
host limits the throughput. A CUDA graph launches all kernels of a pass with one call.

Each part of the model (stem, four stages, head) has one graph for its forward pass and one for its backward pass, so
that DDP and DeepSpeed can reduce the gradients of later parts while the backward graphs of earlier parts run. All
graphs share one memory pool. This requires that they are replayed in the order of capture, which is that of training;
`_Replay.backward` raises an error for any other order. Gradients of parameters are allocated outside the pool. Parts
before the first trained parameter (of a frozen backbone) have no backward graph.

Each shape of images has its own set of graphs. The sets share the pool, because a set's activations are needed only
until its backward pass ends, and the gradients, so that a parameter's `grad` is the same tensor for all shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from fat.layers import has_hooks
from fat.model import FAT
from launch.engine.cuda_graph_capture import Recorder, Results


class GraphedModel:
    """Replays the training passes of a model, for each shape of images that `capture` has recorded.

    It replaces `model.forward` on the instance, so that names, wrappers and checkpoints do not change. Passes in eval
    mode or without gradients run eagerly. Each forward pass must be followed by its backward pass before the next
    forward pass.

    Args:
        model: module with one input and one output tensor, not yet wrapped by DDP or DeepSpeed.
        recorder: captures and replays the CUDA graphs.
        keeps_gradients: replays write to static `grad` tensors of the parameters, instead of passing gradients to
            autograd. Each backward pass overwrites the previous gradients, and no hooks are called. Invalid with
            gradient accumulation, DDP or DeepSpeed.
    """

    def __init__(self, model: nn.Module, recorder: Recorder, *, keeps_gradients: bool = False) -> None:
        self._model, self._recorder, self.keeps_gradients = model, recorder, keeps_gradients
        self._eager = model.forward
        self._parts = _parts(model)
        self._captured: dict[torch.Size, list[_CapturedPart]] = {}
        self._passes = 0  # number of forward passes
        # With `keeps_gradients`, this tensor replaces the parameters as the input that requires a gradient, so that
        # autograd runs the backward pass.
        self._anchor = torch.zeros((), requires_grad=True)
        model.forward = self._forward

    def warm_up(self, images: Tensor, autocast: torch.dtype | None) -> None:
        """Run forward and backward eagerly. Gradients, buffers and random generators do not change.

        Args:
            images: float [B, C, H, W] on the model's device, with the shape, dtype and memory format of every batch.
            autocast: dtype of autocast; None: no autocast.
        """
        leaves = [part.leaves() for part in self._parts]

        def forward_backward() -> None:
            x = images
            for part, part_leaves in zip(self._parts, leaves, strict=True):
                x = part.run(part_leaves, x, autocast)
            # A dense gradient, as in the capture. The expanded gradient of a sum could select other kernels.
            grad_output = torch.ones_like(x)
            inputs = [leaf for part_leaves in leaves for leaf in part_leaves.values()]
            torch.autograd.grad(x, inputs, grad_output, allow_unused=True)

        with preserve_state(self._model, images.device):
            self._recorder.warm_up(forward_backward)

    def capture(self, images: Tensor, autocast: torch.dtype | None) -> None:
        """Record forward and backward of every part, for images of one shape.

        Gradients, buffers and random generators do not change. Call it outside autocast, with every layer in the mode
        (train or eval) of the following steps. Capturing large images first saves memory: the graphs of smaller ones
        then fit into parts of the pool. For the arguments see `warm_up`.

        Raises:
            Exception: an operation of the model cannot be captured, or memory is exhausted. Call `discard` then.
        """
        for name, module in self._model.named_modules():
            if name and has_hooks(module):
                raise RuntimeError(f"{name} has hooks, which a replay would not call")
        for name, parameter in self._model.named_parameters() if self.keeps_gradients else ():
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise RuntimeError(f"{name} has hooks, which a replay would not call")
        captured: list[_CapturedPart] = []
        with preserve_state(self._model, images.device):
            x = images.clone()
            for part in self._parts:
                captured.append(_CapturedPart(part, x, autocast, self._recorder))
                x = captured[-1].output.detach().requires_grad_(captured[-1].trains)
            grad_output: Tensor | None = torch.empty_like(captured[-1].output)
            for captured_part in reversed(captured):
                if grad_output is not None and captured_part.trains:
                    grad_output = captured_part.record_backward(grad_output, self._recorder)
        self._captured[images.shape] = captured

    def discard(self) -> None:
        """Delete all graphs and restore the model's eager `forward`."""
        self._captured = {}
        self._parts = []
        del self._model.forward
        self._recorder.release()

    @property
    def parts(self) -> int:
        """Number of parts that are replayed in each pass."""
        return len(self._parts)

    @property
    def passes(self) -> int:
        """Number of forward passes so far, of all shapes."""
        return self._passes

    def _forward(self, images: Tensor) -> Tensor:
        if not (self._captured and self._model.training and torch.is_grad_enabled()):
            return cast(Tensor, self._eager(images))
        if images.shape not in self._captured:
            raise ValueError(
                f"batch of shape {tuple(images.shape)}, but the CUDA graphs were captured for "
                f"{', '.join(str(tuple(shape)) for shape in self._captured)}; use --compile off if shapes change"
            )
        x = images
        self._passes += 1
        for part in self._captured[images.shape]:
            differentiated_by = [self._anchor] if self.keeps_gradients and part.trains else part.parameters
            x = _Replay.apply(self, part, x, *differentiated_by)
        return x


class _Part(nn.Module):
    """A part of a model with one input and one output tensor, and the modules that own its parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor], *owners: nn.Module) -> None:
        super().__init__()
        self.owners = nn.ModuleList(owners)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    @cached_property
    def gradients(self) -> list[Tensor]:
        """Static gradients of the trained parameters. Must not be created during a capture.

        They are outside the graphs' pool, because accumulated gradients must survive the next forward pass, which may
        reuse the pool's memory. Each has separate memory with the strides of its parameter, so that AccumulateGrad
        adopts it without a copy (or it remains the parameter's `grad`), and clipping scales no element twice.
        """
        return [torch.empty_like(leaf, requires_grad=False) for leaf in self.leaves().values()]

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def leaves(self) -> dict[str, Tensor]:
        """Return tensors that share the parameters' memory, with respect to which gradients are computed.

        The AccumulateGrad nodes of the parameters, which DDP and DeepSpeed use, belong to the stream on which they were
        created. If they took part in the capture, autograd would include that stream.
        """
        return {name: parameter.detach().requires_grad_() for name, parameter in self.trained().items()}

    def run(self, leaves: dict[str, Tensor], x: Tensor, autocast: torch.dtype | None) -> Tensor:
        # Without autocast's cache, because every graph, and so every replay, must cast the weights again.
        cast_to = torch.autocast(x.device.type, autocast, enabled=autocast is not None, cache_enabled=False)
        with torch.enable_grad(), cast_to:
            return cast(Tensor, functional_call(self, leaves, (x,)))


def modules_by_part(model: nn.Module) -> list[list[nn.Module]]:
    """Return the modules of each part, in the order of the forward pass. A part's gradients are ready all at once."""
    return [list(part.owners) for part in _parts(model)]


def _parts(model: nn.Module) -> list[_Part]:
    if not isinstance(model, FAT):
        return [_Part(model.forward, model)]
    trunk = [_Part(module.__call__, module) for module in (model.stem, *model.stages)]
    return [*trunk, _Part(lambda x: model.forward_head(model.norm(x)), model.norm, model.head)]


class _CapturedPart:
    """The forward and backward graph of a part, and their static tensors: input, output and all gradients.

    Args:
        x: the static input.
    """

    def __init__(self, part: _Part, x: Tensor, autocast: torch.dtype | None, recorder: Recorder) -> None:
        self.input, self.parameters = x, list(part.trained().values())
        self._addresses = self._present_addresses()
        self._leaves, self._static_gradients = part.leaves(), part.gradients
        self.trains = x.requires_grad or bool(self._leaves)
        """Whether the part has a backward pass: it, or a part before it, has trained parameters."""
        self._kept: Tensor | None = None  # the last output with its autograd graph, until the backward pass frees it

        def forward() -> Results:
            self._kept = part.run(self._leaves, x, autocast)
            return [self._kept.detach()]

        results, self._replay_forward = recorder.record(forward)
        self.output = cast(Tensor, results[0])

    def record_backward(self, grad_output: Tensor, recorder: Recorder) -> Tensor | None:
        """Capture the backward pass from the output's static gradient; return the input's gradient, if required."""
        inputs = [self.input] if self.input.requires_grad else []
        leaves = list(self._leaves.values())
        static = self._static_gradients

        def backward() -> Results:
            output, self._kept = self._kept, None
            assert output is not None
            found = torch.autograd.grad(output, [*inputs, *leaves], grad_output, allow_unused=True)
            grads = found[len(inputs) :]
            used = [(s, g) for s, g in zip(static, grads, strict=True) if g is not None]
            torch._foreach_copy_([s for s, _ in used], [g for _, g in used])
            return [*found[: len(inputs)], *(None if g is None else s for s, g in zip(static, grads, strict=True))]

        self._grad_output = grad_output
        self._gradients, self._replay_backward = recorder.record(backward)
        self._parameter_grads = self._gradients[len(inputs) :]
        return self._gradients[0] if inputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Replay the forward pass on `x`. The next replay overwrites the result."""
        if self._present_addresses() != self._addresses:
            raise RuntimeError("parameters have moved in memory since the CUDA graphs were captured")
        _copy_to_static(self.input, x)
        self._replay_forward()
        return self.output.detach()

    def backward(self, grad_output: Tensor, *, keep: bool) -> Results:
        """Replay the backward pass; return the gradients of the input and of the parameters.

        The gradient of the input is None if it does not require one.

        Args:
            keep: keep the parameters' gradients in their `grad`, and return a single None instead.
        """
        if not keep:
            self._save_accumulated()
        _copy_to_static(self._grad_output, grad_output)
        self._replay_backward()
        grad_input = cast(Tensor, self._gradients[0]).detach() if self.input.requires_grad else None
        if not keep:
            return [grad_input, *(None if g is None else g.detach() for g in self._parameter_grads)]
        for parameter, gradient in zip(self.parameters, self._parameter_grads, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient
        return [grad_input, None]

    def _save_accumulated(self) -> None:
        """Copy accumulated gradients out of the static tensors, which the next replay overwrites.

        AccumulateGrad does not copy the first gradient of a parameter: it uses the static tensor as `grad`.
        """
        static_grads = [
            parameter
            for parameter, static in zip(self.parameters, self._parameter_grads, strict=True)
            if parameter.grad is not None and static is not None and parameter.grad.data_ptr() == static.data_ptr()
        ]
        if not static_grads:
            return
        copies = [torch.empty_like(cast(Tensor, parameter.grad)) for parameter in static_grads]
        torch._foreach_copy_(copies, [cast(Tensor, parameter.grad) for parameter in static_grads])
        for parameter, gradient in zip(static_grads, copies, strict=True):
            cast(Tensor, parameter.grad).data = gradient  # DeepSpeed may refer to this tensor object, so keep it

    def _present_addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.parameters]


class _Replay(torch.autograd.Function):
    """One autograd node that replays a part: (model, part, input, parameters) -> output.

    With `keeps_gradients`, a single anchor tensor takes the place of the parameters.
    """

    @staticmethod
    def forward(ctx: Any, graphs: GraphedModel, part: _CapturedPart, x: Tensor, *_: Tensor) -> Tensor:
        ctx.graphs, ctx.part, ctx.number = graphs, part, graphs.passes
        return part.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.number != ctx.graphs.passes:
            raise RuntimeError("a second forward pass has overwritten the activations of this backward pass")
        return None, None, *ctx.part.backward(grad_output, keep=ctx.graphs.keeps_gradients)


def _copy_to_static(static: Tensor, value: Tensor) -> None:
    """Copy `value` into a static tensor, unless the neighboring graph has already written it there."""
    if static.data_ptr() != value.data_ptr():
        static.detach().copy_(value)


@contextmanager
def preserve_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore buffers (BatchNorm statistics) and random generators on exit."""
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in values:
                    buffer.copy_(value)
