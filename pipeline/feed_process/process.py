"""Prepare batches in a separate process, which does not compete with training for the interpreter lock.

The process runs a `JobStream` and hands over each `PreparedBatch`. Encoded images are passed in shared memory (memfd:
it does not depend on the size of /dev/shm and leaves no files behind), everything else through a socket. A buffer is
reused once the training process holds no reference to it. The process is a new interpreter without torch, never a
fork of a process that uses CUDA. It ends with the thread that started it.
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

from pipeline.feed_process.channel import BatchMessage, Channel, End, NewBuffers, Ready, address_of, with_images
from pipeline.jobs import JobStream, PreparedBatch
from pipeline.storage.bad_samples import BadSamples
from pipeline.storage.files import Interrupted
from shards.errors import UserError, first_line

log = logging.getLogger(__name__)

# Of importing NumPy and the like on a busy machine; half a second is usual.
START_SECONDS = 120.0
# After its connection has ended, the process itself ends within milliseconds.
_EXIT_SECONDS = 5.0
# Ctrl-C and a job's signals go to all processes of a group; training decides what becomes of them.
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


class FeedUnavailable(Exception):
    """The process cannot be started; whoever wants its batches can prepare them in threads."""


class FeedProcessDied(UserError):
    """The process was killed, or failed outside of its work."""

    exit_code = 1


class FeedProcess:
    """The prepared batches of a stream, made in a process of their own.

    To be made, iterated and closed by one thread, with which the process ends; `interrupt` is for any thread.

    Args:
        stream: what to prepare.
        bad: what is known of bad samples; kept up to date.
        page_lock: let the GPU read the encoded images without a further copy on the host.

    Raises:
        FeedUnavailable: it cannot be started.
    """

    def __init__(self, stream: JobStream, bad: BadSamples, *, page_lock: bool = False) -> None:
        self._bad, self._page_lock, self._interrupted = bad, page_lock, False
        self._buffers: dict[int, _MappedBuffer] = {}
        self._returned: deque[int] = deque()
        try:
            self._task = pickle.dumps((stream, bad, logging.getLogger().getEffectiveLevel()), pickle.HIGHEST_PROTOCOL)
            own, other = socket.socketpair()
        except Exception as error:  # of whatever cannot be pickled
            raise FeedUnavailable(f"--feed-process: {type(error).__name__}: {first_line(error)}") from error
        self._channel = Channel(own)
        start = f"import sys; sys.path[:] = {sys.path!r}; from pipeline.feed_process.worker import main; "
        # Blocked signals stay blocked in the new process: there is no moment at which it could be ended by them.
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
        """Of the process."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Give the process its task and wait until it has begun.

        Raises:
            FeedUnavailable: it does not begin.
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
        """The batches, in order. Their images are read-and-write views of memory shared with the process.

        Raises:
            FeedProcessDied: the process ended before its work did.
            Interrupted: `interrupt` was called.
            Exception: whatever was raised in the process, after the batches that came before it.
        """
        while True:
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
        """Let the thread go that waits for the process: what is under way ends with `Interrupted`."""
        self._interrupted = True
        self._channel.shut_down()

    def close(self) -> None:
        """End the process. Idempotent.

        It is killed: files that it stages are left as by a killed run, for the next one to go on with.
        """
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # storage may hold it, as long as it does not answer
            self._process.wait(_EXIT_SECONDS)
        self._channel.close()
        self._buffers.clear()

    def _receive(self) -> object:
        try:
            message, handles = self._channel.receive()
            if isinstance(message, BatchMessage):
                returned = [self._returned.popleft() for _ in range(len(self._returned))]
                self._channel.send(returned)
        except (OSError, EOFError):
            if self._interrupted:
                raise Interrupted from None
            raise self._died() from None
        if isinstance(message, NewBuffers):
            if len(handles) < len(message.buffers):
                raise UserError("--feed-process: too many open files; raise the limit ('ulimit -n'), or use off")
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
        """The whole buffer; its number is returned when neither the array nor a view of it is referred to any more."""
        lease = self._buffers[number].array()
        # Holding on to the buffer as well: it stays page-locked as long as somebody has it.
        weakref.finalize(lease, _give_back, self._returned, number, self._buffers[number]).atexit = False
        return lease

    def _map(self, handle: int, size: int) -> _MappedBuffer:
        buffer = _MappedBuffer(handle, size)
        if self._page_lock:
            try:
                buffer.page_lock()
            except RuntimeError as error:  # it is not worth ending a run
                self._page_lock = False
                _clear_cuda_error()
                log.warning("no page-locked memory for encoded images (%s); decoding takes longer", first_line(error))
        return buffer

    def _died(self) -> FeedProcessDied:
        try:
            status = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        how = f"ended with exit status {status}"
        if status is None:
            how = "closed its connection"
        elif status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        return FeedProcessDied(
            f"process {self.pid}, which reads and prepares the batches, {how}; if memory ran out (see dmesg), lower "
            "--read-ahead, else try --feed-process off"
        )


def _give_back(returned: deque[int], number: int, _: _MappedBuffer) -> None:
    returned.append(number)


def _clear_cuda_error() -> None:
    """Take a failed call's error from CUDA, which would report it again at this thread's next kernel launch."""
    import torch

    with contextlib.suppress(Exception):
        torch.zeros(1, device="cuda")


class _MappedBuffer:
    """A buffer of the process, mapped into this one."""

    def __init__(self, handle: int, size: int) -> None:
        try:
            self._memory = mmap.mmap(handle, size)
        finally:
            os.close(handle)
        self._locked_at: int | None = None

    def array(self) -> NDArray[np.uint8]:
        """All of it, uint8 [size]. Views of the array refer to the array, see `BufferPool.bytes`."""
        return np.frombuffer(self._memory, np.uint8)

    def page_lock(self) -> None:
        """Page-lock it for CUDA.

        Raises:
            RuntimeError: CUDA refuses.
        """
        import torch

        array = self.array()
        address = address_of(array)
        # Compared as a number: the binding's enum is unequal to every int.
        code = int(torch.cuda.cudart().cudaHostRegister(address, array.nbytes, 0))
        if code:
            raise RuntimeError(f"cudaHostRegister: CUDA error {code}")
        self._locked_at = address

    def __del__(self) -> None:
        if getattr(self, "_locked_at", None) is not None:
            with contextlib.suppress(Exception):  # at the interpreter's end torch may be gone
                import torch

                torch.cuda.cudart().cudaHostUnregister(self._locked_at)
