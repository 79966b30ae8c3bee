"""Record the Triton kernels that a piece of work would launch. Nothing is computed, compiled or launched, and no device
is needed: tensors have no memory, and the launches of the calling thread are intercepted."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import _maybe_get_opdef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fat import kernels

NAMESPACE = "fat"  # of the operators that launch kernels
_INTERCEPTING = threading.Lock()


@dataclass(frozen=True)
class Launch:
    """What Triton compiles for a launch: a kernel with the types and specialised values of its arguments."""

    module: str
    name: str
    """Of the kernel in its module."""
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    """What is known of an argument's value, such as that 16 divides it."""
    options: dict[str, Any]
    """Warps, stages, architecture and the other options of the backend."""

    @property
    def source(self) -> ASTSource:
        """As Triton's compiler takes it."""
        kernel = operator.attrgetter(self.name)(import_module(self.module))
        return ASTSource(kernel, self.signature, self.constants, self.attributes)


def cuda_target(capability: tuple[int, int]) -> GPUTarget:
    """The device of a compute capability as Triton's CUDA driver describes it."""
    major, minor = capability
    return GPUTarget("cuda", 10 * major + minor, 32)


def record(work: Callable[[], object], target: GPUTarget) -> list[Launch]:
    """The distinct launches of `work`, in the order of their first occurrence.

    Args:
        work: is called once, under `FakeTensorMode` on CPU tensors, with the operators of `fat.kernels` doing what they
            do on a device. Real tensors that it uses are replaced by fake ones; it must not read values.
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.device("cpu"),
        _OperatorsOfDevice(),
        kernels.assume_available(),
        _intercepted(target) as found,
    ):
        work()
    return list(found.values())


class _OperatorsOfDevice(TorchDispatchMode):
    """Custom operators run their implementation, and not the fake one that only gives shapes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        definition = _maybe_get_opdef(func) if func.namespace == NAMESPACE else None
        call = func if definition is None else definition._init_fn
        return call(*args, **(kwargs or {}))


class _Pointer:
    """A tensor as Triton's launcher looks at it. Memory of the allocator is aligned; a view of it may not be."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address

    @staticmethod
    def ptr_range() -> int:
        return 0


@contextmanager
def _intercepted(target: GPUTarget) -> Iterator[dict[str, Launch]]:
    """Launches of this thread are recorded; those of other threads run."""
    backend, thread = make_backend(target), threading.get_ident()
    binders: dict[int, Callable[..., Any]] = {}
    found: dict[str, Launch] = {}

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if threading.get_ident() != thread:
            return launch(kernel, *args, grid=grid, warmup=warmup, **options)
        # The same as in JITFunction.run, up to the compilation, but with the target that was asked for.
        options["debug"] = options.get("debug", kernel.debug) or knobs.runtime.debug
        options["instrumentation_mode"] = knobs.compilation.instrumentation_mode
        if id(kernel) not in binders:
            binders[id(kernel)] = create_function_from_signature(kernel.signature, kernel.params, backend)
        pointers = [_Pointer(arg) if isinstance(arg, Tensor) else arg for arg in args]
        bound, specialization, others = binders[id(kernel)](*pointers, **options)
        parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, others)
        name, settings = kernel.fn.__qualname__, dict(parsed.__dict__)
        item = Launch(kernel.fn.__module__, name, signature, constants, attributes, settings)
        found.setdefault(repr(item), item)
        return None

    with _INTERCEPTING:
        launch = JITFunction.run
        with mock.patch.object(JITFunction, "run", run):
            yield found
