"""The training process's side of the feed process, which prepares batches without competing for the interpreter lock.

The feed process runs a `JobStream` and sends each `PreparedBatch`. Encoded images are passed in shared memory (memfd,
which does not depend on the size of /dev/shm and leaves no files behind), everything else through a socket. A buffer is
reused once the training process has no reference to it. The feed process is a new interpreter without torch, not a fork
of a process that uses CUDA. It ends when the thread that started it ends.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.feed_process.channel import (
    BatchMessage,
    Channel,
    End,
    NewBuffers,
    Ready,
    Received,
    address_of,
    with_images,
)
from pipeline.jobs import JobStream, PreparedBatch
from pipeline.stage_trace import WAIT_FOR_FEED, StageTrace
from pipeline.storage.bad_samples import BadSamples
from pipeline.storage.files import Interrupted
from shards.errors import UserError, first_line

log = logging.getLogger(__name__)

# Timeout for the start: imports take half a second, but longer on a busy machine.
START_SECONDS = 120.0
# Timeout for the exit, which normally takes milliseconds after the connection is closed.
_EXIT_SECONDS = 5.0
# Ctrl-C and the job's signals go to all processes of a process group, but only the training process handles them.
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


class FeedUnavailable(Exception):
    """The feed process cannot be started. The caller can prepare the batches in threads instead."""


class FeedProcessDied(UserError):
    """The feed process was killed or exited unexpectedly."""

    exit_code = 1


class FeedProcess:
    """A feed process and the prepared batches that it sends.

    One thread must create, iterate and close the object; the process ends when that thread ends. `interrupt` may be
    called from any thread.

    Args:
        stream: the batches to prepare.
        bad: the bad samples found so far, updated as batches arrive.
        page_lock: page-lock the shared memory, so that the GPU can read encoded images without another copy.
        trace: records the waits for the process, and the events that the process records while this trace does.

    Raises:
        FeedUnavailable: the process cannot be started.
    """

    def __init__(
        self, stream: JobStream, bad: BadSamples, *, page_lock: bool = False, trace: StageTrace | None = None
    ) -> None:
        self._bad, self._page_lock, self._interrupted = bad, page_lock, False
        self._trace = trace or StageTrace()
        self._buffers: dict[int, _MappedBuffer] = {}
        self._returned: deque[int] = deque()
        try:
            self._task = pickle.dumps((stream, bad, logging.getLogger().getEffectiveLevel()), pickle.HIGHEST_PROTOCOL)
            own, other = socket.socketpair()
        except Exception as error:  # pickling can raise any exception
            raise FeedUnavailable(
                f"--feed-process: the task cannot be pickled ({type(error).__name__}: {first_line(error)})"
            ) from error
        self._channel = Channel(own)
        start = f"import sys; sys.path[:] = {sys.path!r}; from pipeline.feed_process.worker import main; "
        # The new process inherits the blocked signals, so there is no moment at which they could end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"{start}main({other.fileno()}, {os.getpid()})"],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        except OSError as error:
            own.close()
            raise FeedUnavailable(f"--feed-process: the process cannot be started ({error.strerror})") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            other.close()

    @property
    def pid(self) -> int:
        """Process id of the feed process."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Send the process its task and wait until it is ready to run it.

        Raises:
            FeedUnavailable: the process failed to start.
            Interrupted: `interrupt` was called.
        """
        try:
            self._channel.send_bytes(self._task)
            answer = self._channel.receive()[0] if self._channel.wait(START_SECONDS) else None
        except (OSError, EOFError):
            answer = None
        del self._task
        if self._interrupted:
            raise Interrupted
        if not isinstance(answer, Ready):
            self.close()
            reason = f" ({first_line(answer)})" if isinstance(answer, BaseException) else ""
            raise FeedUnavailable(f"--feed-process: the process did not start{reason}")

    def batches(self) -> Iterator[PreparedBatch]:
        """Yield the batches in order. Their images are writable views of memory that is shared with the process.

        Raises:
            FeedProcessDied: the process ended before it sent all batches.
            Interrupted: `interrupt` was called.
            Exception: an error of the feed process, raised after the batches that precede it.
        """
        while True:
            with self._trace.span(WAIT_FOR_FEED):
                message = self._receive()
            if isinstance(message, logging.LogRecord):
                logger = logging.getLogger(message.name)
                if logger.isEnabledFor(message.levelno):
                    logger.handle(message)
            elif isinstance(message, BatchMessage):
                yield self._mapped(message)
            elif isinstance(message, End):
                self._bad.ids.update(message.bad_ids)
                if message.error is not None:
                    raise message.error
                return

    def interrupt(self) -> None:
        """Raise `Interrupted` in the thread that waits for the process. May be called from any thread."""
        self._interrupted = True
        self._channel.shut_down()

    def close(self) -> None:
        """Kill the process. Idempotent.

        Shards that it is staging remain as partial files, which the next process resumes, as after a killed run.
        """
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # slow storage may block the process in a system call
            self._process.wait(_EXIT_SECONDS)
        self._channel.close()
        self._buffers.clear()

    def _receive(self) -> object:
        try:
            message, handles = self._channel.receive()
            if isinstance(message, BatchMessage):
                returned = [self._returned.popleft() for _ in range(len(self._returned))]
                self._channel.send(Received(returned, record=self._trace.recording))
                self._trace.extend(message.events)
        except (OSError, EOFError):
            if self._interrupted:
                raise Interrupted from None
            raise self._died() from None
        if isinstance(message, NewBuffers):
            if len(handles) < len(message.buffers):
                raise UserError(
                    "--feed-process: too many open files; raise the limit ('ulimit -n'), or use --feed-process off"
                )
            for (number, size), handle in zip(message.buffers, handles, strict=True):
                self._buffers[number] = self._map(handle, size)
        return message

    def _mapped(self, message: BatchMessage) -> PreparedBatch:
        for number in message.dropped:
            self._buffers.pop(number, None)
        leases = {number: self._lease(number) for number in np.unique(message.spans[:, 0]).tolist()}
        images = [leases[number][start:end] for number, start, end in message.spans.tolist()]
        self._bad.ids.update(message.bad_ids)
        return with_images(message.batch, images)

    def _lease(self, number: int) -> NDArray[np.uint8]:
        """Return the whole buffer as an array.

        When neither the array nor a view of it is referenced any more, the buffer's number is added to the numbers
        that are returned to the feed process.
        """
        lease = self._buffers[number].array()
        # The finalizer also keeps a reference to the buffer, so that it stays page-locked while the array is in use.
        weakref.finalize(lease, _return_buffer, self._returned, number, self._buffers[number]).atexit = False
        return lease

    def _map(self, handle: int, size: int) -> _MappedBuffer:
        buffer = _MappedBuffer(handle, size)
        if self._page_lock:
            try:
                buffer.page_lock()
            except RuntimeError as error:  # decoding works with pageable memory too
                self._page_lock = False
                _clear_cuda_error()
                log.warning("no page-locked memory for encoded images (%s); decoding is slower", first_line(error))
        return buffer

    def _died(self) -> FeedProcessDied:
        try:
            status = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        event = f"exited with status {status}"
        if status is None:
            event = "closed its connection"
        elif status < 0:
            event = f"was killed by {signal.Signals(-status).name}"
        return FeedProcessDied(
            f"process {self.pid}, which reads and prepares the batches, {event}; if memory ran out (see dmesg), lower "
            "--read-ahead, else try --feed-process off"
        )


def _return_buffer(returned: deque[int], number: int, _: _MappedBuffer) -> None:
    returned.append(number)


def _clear_cuda_error() -> None:
    """Clear the error of a failed CUDA call, which CUDA would report again at this thread's next kernel launch."""
    import torch

    with contextlib.suppress(Exception):
        torch.zeros(1, device="cuda")


class _MappedBuffer:
    """A buffer of the feed process, mapped into this process."""

    def __init__(self, handle: int, size: int) -> None:
        try:
            self._memory = mmap.mmap(handle, size)
        finally:
            os.close(handle)
        self._locked_at: int | None = None

    def array(self) -> NDArray[np.uint8]:
        """Return the whole buffer, uint8 [size]. Views of the array keep it referenced (see `BufferPool.bytes`)."""
        return np.frombuffer(self._memory, np.uint8)

    def page_lock(self) -> None:
        """Page-lock the buffer for CUDA.

        Raises:
            RuntimeError: CUDA cannot page-lock it.
        """
        import torch

        array = self.array()
        address = address_of(array)
        # Convert to int, because the binding's enum never equals an int.
        code = int(torch.cuda.cudart().cudaHostRegister(address, array.nbytes, 0))
        if code:
            raise RuntimeError(f"cudaHostRegister: CUDA error {code}")
        self._locked_at = address

    def __del__(self) -> None:
        if getattr(self, "_locked_at", None) is not None:
            with contextlib.suppress(Exception):  # torch may be unloaded at interpreter exit
                import torch

                torch.cuda.cudart().cudaHostUnregister(self._locked_at)
