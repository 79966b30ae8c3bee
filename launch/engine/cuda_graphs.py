"""Training passes of a model as CUDA graphs.

An eager step of FAT-B0 launches some 1,700 kernels, at 85 us of one CPU core each on the host of an H200: the host
limits the speed, whatever the GPU is. A CUDA graph launches all kernels of a pass by one call.

Each part of the model (stem, four stages, head) has a graph for its forward and one for its backward pass, so that DDP
and DeepSpeed reduce the gradients of later parts while the backward graphs of earlier parts run. All graphs share one
memory pool, which is right as long as they are replayed in the order in which they were captured: that is the order of
training, and `_CapturedPart.backward` raises at any other. Gradients of parameters lie outside the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from fat.layers import has_hooks
from fat.model import FAT
from launch.engine.cuda_graph_capture import Recorder, Results


class GraphedModel:
    """Replays the training passes of a model once `capture` has recorded them.

    Replaces `model.forward` on the instance, so that names, wrappers and checkpoints do not change. A pass in eval mode
    or without gradients runs eagerly. Each forward pass must be followed by its backward pass before the next one.

    Args:
        model: one tensor in, one tensor out; before DDP or DeepSpeed wrap it.
        recorder: captures and replays.
        keeps_gradients: replays write the parameters' `grad` themselves, in memory that stays, instead of handing
            gradients to autograd one by one: each backward pass overwrites those of the one before, and no hook is
            called. Not for micro-batches that add up, nor where DDP or DeepSpeed wait for gradients.
    """

    def __init__(self, model: nn.Module, recorder: Recorder, *, keeps_gradients: bool = False) -> None:
        self._model, self._recorder, self.keeps_gradients = model, recorder, keeps_gradients
        self._eager = model.forward
        self._parts = _parts(model)
        self._captured: list[_CapturedPart] = []
        # Makes autograd call the backward passes where it is not told of the parameters; gets no gradient.
        self._anchor = torch.zeros((), requires_grad=True)
        model.forward = self._forward

    def warm_up(self, images: Tensor, autocast: torch.dtype | None) -> None:
        """Run forward and backward eagerly. Gradients, buffers and random generators are left as they were.

        Args:
            images: float [B, C, H, W] on the model's device, of the shape, dtype and memory format of every batch.
            autocast: dtype of autocast; None = without.
        """
        leaves = [part.leaves() for part in self._parts]

        def both() -> None:
            x = images
            for part, own in zip(self._parts, leaves, strict=True):
                x = part.run(own, x, autocast)
            # A dense gradient, as in the capture: that of a sum has strides of 0, for which other kernels may run.
            by_output = torch.ones_like(x)
            torch.autograd.grad(x, [leaf for own in leaves for leaf in own.values()], by_output, allow_unused=True)

        with _unchanged(self._model, images.device):
            self._recorder.warm_up(both)

    def capture(self, images: Tensor, autocast: torch.dtype | None) -> None:
        """Record forward and backward of every part. Gradients, buffers and random generators are left as they were.

        To be called outside autocast, in the modes (training or evaluation of each layer) of the steps to come. For the
        arguments see `warm_up`.

        Raises:
            Exception: something in the model cannot be captured, or memory does not suffice; call `discard` then.
        """
        for name, module in self._model.named_modules():
            if name and has_hooks(module):
                raise RuntimeError(f"{name} has hooks, which a replay does not call")
        for name, parameter in self._model.named_parameters() if self.keeps_gradients else ():
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise RuntimeError(f"{name} has hooks, which a replay does not call")
        captured: list[_CapturedPart] = []
        with _unchanged(self._model, images.device):
            x = images.clone()
            for part in self._parts:
                captured.append(_CapturedPart(part, x, autocast, self._recorder))
                x = captured[-1].output.detach().requires_grad_()
            by_output: Tensor | None = torch.empty_like(captured[-1].output)
            for step in reversed(captured):
                assert by_output is not None
                by_output = step.record_backward(by_output, self._recorder)
        self._captured = captured

    def discard(self) -> None:
        """Let the model run eagerly for good."""
        self._captured = []
        del self._model.forward
        self._recorder.release()

    @property
    def parts(self) -> int:
        """How many parts are replayed."""
        return len(self._captured)

    def _forward(self, images: Tensor) -> Tensor:
        if not (self._captured and self._model.training and torch.is_grad_enabled()):
            return cast(Tensor, self._eager(images))
        if images.shape != self._captured[0].input.shape:
            raise ValueError(
                f"a batch of shape {tuple(images.shape)}: the CUDA graphs were captured for "
                f"{tuple(self._captured[0].input.shape)}; use --compile off where shapes change"
            )
        x, keep = images, self.keeps_gradients
        for part in self._captured:
            differentiated_by = [self._anchor] if keep else part.parameters
            x = _Replay.apply(part, keep, x, *differentiated_by)
        return x


class _Part(nn.Module):
    """A section of a model, one tensor in and one out, and the modules whose parameters it uses."""

    def __init__(self, function: Callable[[Tensor], Tensor], *owners: nn.Module) -> None:
        super().__init__()
        self.owners = nn.ModuleList(owners)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def leaves(self) -> dict[str, Tensor]:
        """Tensors on the memory of the parameters, to differentiate by.

        AccumulateGrad nodes of the parameters themselves, which DDP and DeepSpeed hold, belong to the stream on which
        they were made: autograd would draw that stream into the capture.
        """
        return {name: parameter.detach().requires_grad_() for name, parameter in self.trained().items()}

    def run(self, leaves: dict[str, Tensor], x: Tensor, autocast: torch.dtype | None) -> Tensor:
        # Without the cache: casts of the weights must be part of every graph, and of every replay.
        cast_to = torch.autocast(x.device.type, autocast, enabled=autocast is not None, cache_enabled=False)
        with torch.enable_grad(), cast_to:
            return cast(Tensor, functional_call(self, leaves, (x,)))


def _parts(model: nn.Module) -> list[_Part]:
    if not isinstance(model, FAT):
        return [_Part(model.forward, model)]
    trunk = [_Part(module.__call__, module) for module in (model.stem, *model.stages)]
    return [*trunk, _Part(lambda x: model.forward_head(model.norm(x)), model.norm, model.head)]


class _CapturedPart:
    """The two graphs of a part and their static tensors: input, output and all gradients.

    Args:
        x: the static input.
    """

    def __init__(self, part: _Part, x: Tensor, autocast: torch.dtype | None, recorder: Recorder) -> None:
        self.input, self.parameters = x, list(part.trained().values())
        self._addresses = self._present_addresses()
        self._leaves = part.leaves()
        self._passes = 0
        self._kept: Tensor | None = None  # the last output with its autograd graph, until the backward pass uses it up

        def forward() -> Results:
            self._kept = part.run(self._leaves, x, autocast)
            return [self._kept.detach()]

        results, self._replay_forward = recorder.record(forward)
        self.output = cast(Tensor, results[0])

    def record_backward(self, by_output: Tensor, recorder: Recorder) -> Tensor | None:
        """Capture the backward pass from the static gradient of the output; returns that of the input, if any."""
        inputs = [self.input] if self.input.requires_grad else []
        leaves = list(self._leaves.values())
        # Not in the graphs' pool: gradients that are accumulated must outlive the next forward pass, whose intermediate
        # results the pool may put where backward graphs have allocated theirs. Each has memory of its own, laid out as
        # its parameter: AccumulateGrad takes it over without a copy (or it stays the parameter's `grad`), and clipping
        # scales nothing twice.
        static = [torch.empty_like(leaf, requires_grad=False) for leaf in leaves]

        def backward() -> Results:
            output, self._kept = self._kept, None
            assert output is not None
            found = torch.autograd.grad(output, [*inputs, *leaves], by_output, allow_unused=True)
            own = found[len(inputs) :]
            used = [(s, g) for s, g in zip(static, own, strict=True) if g is not None]
            torch._foreach_copy_([s for s, _ in used], [g for _, g in used])
            return [*found[: len(inputs)], *(None if g is None else s for s, g in zip(static, own, strict=True))]

        self._by_output = by_output
        self._gradients, self._replay_backward = recorder.record(backward)
        self._by_parameters = self._gradients[len(inputs) :]
        return self._gradients[0] if inputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Replay on x; the result is overwritten by the next replay."""
        if self._present_addresses() != self._addresses:
            raise RuntimeError("parameters have moved in memory since the CUDA graphs were captured")
        self._passes += 1
        _put(self.input, x)
        self._replay_forward()
        return self.output.detach()

    def backward(self, by_output: Tensor, number: int, *, keep: bool = False) -> Results:
        """Replay on the gradient of forward pass `number`: gradients of input (None: it needs none) and parameters.

        Args:
            keep: leave the parameters' gradients in their `grad`, and return None for all of them together.
        """
        if number != self._passes:
            raise RuntimeError("a second forward pass has overwritten the activations of this backward pass")
        if not keep:
            self._save_accumulated()
        _put(self._by_output, by_output)
        self._replay_backward()
        by_input = cast(Tensor, self._gradients[0]).detach() if self.input.requires_grad else None
        if not keep:
            return [by_input, *(None if g is None else g.detach() for g in self._by_parameters)]
        for parameter, gradient in zip(self.parameters, self._by_parameters, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient
        return [by_input, None]

    @property
    def passes(self) -> int:
        """Forward passes so far."""
        return self._passes

    def _save_accumulated(self) -> None:
        """Move gradients of an earlier micro-batch out of the memory that is about to be overwritten.

        AccumulateGrad does not copy the first gradient of a parameter, it takes the static tensor itself.
        """
        taken = [
            parameter
            for parameter, static in zip(self.parameters, self._by_parameters, strict=True)
            if parameter.grad is not None and static is not None and parameter.grad.data_ptr() == static.data_ptr()
        ]
        if not taken:
            return
        kept = [torch.empty_like(cast(Tensor, parameter.grad)) for parameter in taken]
        torch._foreach_copy_(kept, [cast(Tensor, parameter.grad) for parameter in taken])
        for parameter, gradient in zip(taken, kept, strict=True):
            cast(Tensor, parameter.grad).data = gradient  # the same object, to which DeepSpeed may refer

    def _present_addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.parameters]


class _Replay(torch.autograd.Function):
    """(part, keep, input, parameters) -> output, as one node of autograd; with `keep` an anchor is all parameters."""

    @staticmethod
    def forward(ctx: Any, part: _CapturedPart, keep: bool, x: Tensor, *_: Tensor) -> Tensor:
        output = part.forward(x)
        ctx.part, ctx.number, ctx.keep = part, part.passes, keep
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.part.backward(by_output, ctx.number, keep=ctx.keep)


def _put(static: Tensor, value: Tensor) -> None:
    """Copy, unless the neighbouring graph has left the value here already."""
    if static.data_ptr() != value.data_ptr():
        static.detach().copy_(value)


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put buffers (BatchNorm's statistics) and random generators back afterwards."""
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in values:
                    buffer.copy_(value)
