"""Count, on a CPU, the calls that would make the host wait for the device if the code ran on a GPU."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators for which the host reads the result, or its size, from the device. `masked_fill` with a tensor as value is
# one of them, because its CUDA implementation reads the value.
READS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "equal",
    "masked_select",
    "unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave.Tensor",
    "masked_fill.Tensor",
    "masked_fill_.Tensor",
}
# Python functions that call no operator on the CPU.
COPIES_TO_HOST = {"cpu", "numpy", "tolist", "__array__"}
# If called with a device and without a tensor, these copy from pageable memory, which waits for the stream.
COPIES_FROM_HOST = {"tensor", "as_tensor"}
ROOT = Path(__file__).resolve().parents[2]


class HostWaits(contextlib.AbstractContextManager["HostWaits"]):
    """Counts waits in the thread that enters the context. That includes the backward pass, which on a CPU runs in the
    same thread, but not the loader's threads, which may wait.

    Counted are operators whose result the host reads (`READS`), copies between host and device, and explicit
    synchronization of torch.cuda and of DeepSpeed's accelerator. Not detected are waits inside C++ that depend on CUDA
    streams, such as those of the caching allocator or of DistributedDataParallel's runtime statistics.
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        """"operation < file:line of the caller < ..." -> number of waits."""
        self._stack = contextlib.ExitStack()
        self._thread = 0

    def __enter__(self) -> HostWaits:
        self._thread = threading.get_ident()
        self._stack.enter_context(_Functions(self._note))
        self._stack.enter_context(_Operators(self._note))
        for owner, name in _synchronizations():
            self._stack.enter_context(self._counted(owner, name))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def _counted(self, owner: Any, name: str) -> Iterator[None]:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self._thread:  # other threads call the replaced attribute too
                self._note(f"{getattr(owner, '__name__', type(owner).__name__)}.{name}")
            return original(*args, **kwargs)

        setattr(owner, name, counted)
        try:
            yield
        finally:
            setattr(owner, name, original)

    def _note(self, what: str) -> None:
        frames = [
            f"{frame.filename.rpartition('site-packages/')[2].removeprefix(f'{ROOT}/')}:{frame.lineno}"
            for frame in reversed(traceback.extract_stack())
            if "/torch/" not in frame.filename and frame.filename != __file__ and "contextlib" not in frame.filename
        ]
        self.found[" < ".join([what, *frames[:4]])] += 1


class _Operators(TorchDispatchMode):
    def __init__(self, note: Any) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in READS or f"{name}.{func._overloadname}" in READS or by_mask:
            self._note(name)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, note: Any) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = getattr(func, "__name__", ""), kwargs or {}
        start = args[0] if args else options.get("data")
        to_device = name == "new_tensor" or (name in COPIES_FROM_HOST and options.get("device") is not None)
        if name in COPIES_TO_HOST or (to_device and not (name == "as_tensor" and isinstance(start, torch.Tensor))):
            self._note(name)
        return func(*args, **options)


def _synchronizations() -> list[tuple[Any, str]]:
    """Return functions that wait for the device, as (owner, attribute)."""
    found: list[tuple[Any, str]] = [
        (torch.cuda, "synchronize"),
        (torch.cuda.Stream, "synchronize"),
        (torch.cuda.Event, "synchronize"),
    ]
    with contextlib.suppress(ImportError):
        from deepspeed.accelerator import get_accelerator

        found.append((get_accelerator(), "synchronize"))
    return found
