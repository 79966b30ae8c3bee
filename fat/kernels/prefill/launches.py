"""Record the Triton kernels that a function would launch, without computing, compiling or launching anything.

No GPU is needed: tensors have no memory, and launches of the calling thread are intercepted.
"""

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

NAMESPACE = "fat"  # namespace of the operators that launch kernels
_INTERCEPTING = threading.Lock()


@dataclass(frozen=True)
class Launch:
    """The input of Triton's compiler for a launch: a kernel with the types and specialized values of its arguments."""

    module: str
    name: str
    """Name of the kernel in its module."""
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    """Known properties of an argument's value, such as divisibility by 16."""
    options: dict[str, Any]
    """Options of Triton's backend, such as numbers of warps and stages."""

    @property
    def source(self) -> ASTSource:
        """The kernel in the form that Triton's compiler accepts."""
        kernel = operator.attrgetter(self.name)(import_module(self.module))
        return ASTSource(kernel, self.signature, self.constants, self.attributes)


def cuda_target(capability: tuple[int, int]) -> GPUTarget:
    """Return the target that Triton's CUDA driver reports for a device of this compute capability."""
    major, minor = capability
    return GPUTarget("cuda", 10 * major + minor, 32)


def record(work: Callable[[], object], target: GPUTarget) -> list[Launch]:
    """Return the distinct launches of `work`, in the order of their first occurrence.

    Args:
        work: called once under `FakeTensorMode` on CPU tensors, with the operators of `fat.kernels` running their CUDA
            implementation. Real tensors that it uses are replaced by fake ones; it must not read their values.
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
    """Run the real implementation of custom operators instead of the fake one that only computes shapes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        definition = _maybe_get_opdef(func) if func.namespace == NAMESPACE else None
        call = func if definition is None else definition._init_fn
        return call(*args, **(kwargs or {}))


class _Pointer:
    """Replacement for a tensor argument of a launch. Allocated memory counts as aligned; a view of it may not be."""

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
    """Record the launches of this thread. Launches of other threads run as usual."""
    backend, thread = make_backend(target), threading.get_ident()
    binders: dict[int, Callable[..., Any]] = {}
    found: dict[str, Launch] = {}

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if threading.get_ident() != thread:
            return launch(kernel, *args, grid=grid, warmup=warmup, **options)
        # Like JITFunction.run up to the compilation, but for the given target.
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
