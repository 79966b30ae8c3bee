"""The program of the feed process: run a `JobStream` and send each `PreparedBatch` to the training process."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import logging.handlers
import mmap
import os
import signal
import socket
import sys
import threading
import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

from pipeline.feed_process.channel import (
    HANDLES_PER_MESSAGE,
    BatchMessage,
    Channel,
    End,
    NewBuffers,
    Ready,
    Received,
    address_of,
    picklable_error,
    with_images,
)
from pipeline.jobs import JobStream, PreparedBatch
from pipeline.stage_trace import WAIT_FOR_SPACE, StageTrace
from pipeline.storage.bad_samples import BadSamples
from pipeline.storage.buffer_pool import BufferPool
from shards.redact import protect_output, redacted_traceback

# Maximum number of batches sent but not yet received: one is decoded while another is prepared.
SENT_AHEAD = 2
_PR_SET_PDEATHSIG = 1


def main(handle: int, parent: int) -> None:
    """Run the feed process.

    Args:
        handle: file descriptor of the socket.
        parent: process id of the training process.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before prctl took effect
        os._exit(1)
    channel = Channel(socket.socket(fileno=handle))
    try:
        stream, bad, level = channel.receive()[0]
        os.close(os.memfd_create("feed-process"))
    except EOFError:
        os._exit(1)
    except Exception as error:
        channel.send(picklable_error(error))
        os._exit(1)
    channel.send(Ready())
    protect_output()
    logging.getLogger().setLevel(level)
    logging.getLogger().addHandler(logging.handlers.QueueHandler(_LogQueue(channel)))  # type: ignore[arg-type]
    _BatchSender(channel).run(stream, bad)


class _BatchSender:
    """Prepares and sends batches, and tracks which buffers the training process is using."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._buffers, self._trace = channel, SharedBuffers(), StageTrace("feed process")
        self._room = threading.Semaphore(SENT_AHEAD)
        self._lent: dict[int, NDArray[np.uint8]] = {}
        self._listener = threading.Thread(target=self._listen, name="feed-returns", daemon=True)

    def run(self, stream: JobStream, bad: BadSamples) -> None:
        """Send all batches, then wait until the training process ends this process."""
        self._listener.start()
        error: BaseException | None = None
        try:
            reader = stream.reader(self._buffers, self._trace)
            for number, batch in enumerate(stream.run(reader, bad, self._trace)):
                self._trace.call(WAIT_FOR_SPACE, number, self._room.acquire)
                self._trace.call("send", number, self._send, batch, bad)
        except BaseException as raised:  # the consumer raises the error, whatever its type
            error = picklable_error(raised)
        with contextlib.suppress(OSError):
            self._channel.send(End(error, bad.ids))
        self._listener.join()

    def _send(self, batch: PreparedBatch, bad: BadSamples) -> None:
        # A replacement sample is in a different buffer than the other samples of its batch.
        leases: dict[int, NDArray[np.uint8]] = {}
        spans = []
        for image in batch.job.encoded.images:
            lease = _lease_of(image)
            number, start = self._buffers.locate(lease)
            leases[number] = lease
            offset = address_of(image) - start
            spans.append((number, offset, offset + image.size))
        self._lent.update(leases)
        new = self._buffers.new()
        for part in (new[at : at + HANDLES_PER_MESSAGE] for at in range(0, len(new), HANDLES_PER_MESSAGE)):
            handles = [handle for *_, handle in part]
            self._channel.send(NewBuffers([(number, size) for number, size, _ in part]), handles)
            for handle in handles:
                os.close(handle)
        dropped = self._buffers.dropped()
        spans_array = np.array(spans, np.int64).reshape(-1, 3)
        events = self._trace.drain()
        self._channel.send(BatchMessage(with_images(batch, []), spans_array, bad.ids, dropped, events))

    def _listen(self) -> None:
        try:
            while True:
                received: Received = self._channel.receive()[0]
                for number in received.returned:
                    del self._lent[number]
                if received.record != self._trace.recording:
                    (self._trace.start if received.record else self._trace.stop)()
                self._room.release()
        except (OSError, EOFError):
            os._exit(0)
        except BaseException as error:  # exit on every error, or the training process would wait forever
            print(redacted_traceback(error), end="", file=sys.stderr, flush=True)
            os._exit(1)


class SharedBuffers(BufferPool):
    """A pool of buffers that another process can map."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count()
        self._starts: dict[int, int] = {}
        self._new: deque[tuple[int, int, int]] = deque()
        self._dropped: deque[int] = deque()

    def locate(self, lease: NDArray[np.uint8]) -> tuple[int, int]:
        """Return the number and the address of the buffer of an array that `bytes` returned."""
        address = address_of(lease)
        return next((number, start) for number, start in list(self._starts.items()) if start == address)

    def new(self) -> list[tuple[int, int, int]]:
        """Return (number, size in bytes, file descriptor) of every buffer created since the last call.

        The caller closes the file descriptors.
        """
        return [self._new.popleft() for _ in range(len(self._new))]

    def dropped(self) -> list[int]:
        """Return the numbers of the buffers released to the system since the last call."""
        return [self._dropped.popleft() for _ in range(len(self._dropped))]

    def _allocate(self, size: int) -> NDArray[np.uint8]:
        handle = os.memfd_create("encoded-images", os.MFD_CLOEXEC)
        os.ftruncate(handle, size)
        memory = np.frombuffer(mmap.mmap(handle, size), np.uint8)
        number = next(self._numbers)
        self._starts[number] = address_of(memory)
        self._new.append((number, size, handle))
        weakref.finalize(memory, self._drop, number).atexit = False
        return memory

    def _drop(self, number: int) -> None:
        del self._starts[number]
        self._dropped.append(number)


class _LogQueue:
    """Sends log records to the training process, with the queue interface that `QueueHandler` requires."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def put_nowait(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._channel.send(record)


def _lease_of(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the array from `BufferPool.bytes` that an image is a view of."""
    assert isinstance(image.base, np.ndarray)
    return image.base
