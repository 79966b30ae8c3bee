"""Prepare batches in a separate process, which does not compete with training for the interpreter lock.

The process runs a `JobStream` and hands over each `PreparedBatch`. Encoded images are passed in shared memory (memfd:
it does not depend on the size of /dev/shm and leaves no files behind), everything else through a socket. A buffer is
reused once the training process holds no reference to it. The process is a new interpreter without torch, never a
fork of a process that uses CUDA. It ends with the thread that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import logging
import logging.handlers
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import weakref
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.jobs import JobStream, PreparedBatch
from pipeline.storage.bad_samples import BadSamples
from pipeline.storage.buffer_pool import BufferPool
from pipeline.storage.files import Interrupted
from shards.errors import UserError, first_line
from shards.redact import protect_output, redacted_traceback

log = logging.getLogger(__name__)

# Batches that wait to be taken: one is prepared while another is decoded.
HANDED_AHEAD = 2
# Of importing NumPy and the like on a busy machine; half a second is usual.
START_SECONDS = 120.0
# After its connection has ended, the process itself ends within milliseconds.
_EXIT_SECONDS = 5.0
# Ctrl-C and a job's signals go to all processes of a group; training decides what becomes of them.
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_PR_SET_PDEATHSIG = 1
_HEADER = struct.Struct("<Q")
_HANDLES_PER_MESSAGE = 64  # the kernel passes 253


class FeedUnavailable(Exception):
    """The process cannot be started; whoever wants its batches can prepare them in threads."""


class FeedProcessDied(UserError):
    """The process was killed, or failed outside of its work."""

    exit_code = 1


@dataclass(frozen=True)
class _Ready:
    """The process has imported everything and knows what to do."""


@dataclass(frozen=True)
class _NewBuffers:
    """Buffers that come with this message, as file descriptors."""

    buffers: list[tuple[int, int]]
    """Number and bytes of each."""


@dataclass(frozen=True)
class _Handed:
    """A prepared batch whose images are in buffers."""

    batch: PreparedBatch
    """Without its images."""
    places: NDArray[np.int64]
    """int64 [n, 3]: number of the buffer, first byte and end of each image."""
    met: set[int]
    """All ids of bad samples met so far."""
    dropped: list[int]
    """Numbers of buffers that will not be used again."""


@dataclass(frozen=True)
class _End:
    """Nothing follows."""

    error: BaseException | None
    met: set[int]


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
        self._channel = _Channel(own)
        start = f"import sys; sys.path[:] = {sys.path!r}; from pipeline.feed_process import main; "
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
        if not isinstance(answer, _Ready):
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
            elif isinstance(message, _Handed):
                yield self._mapped(message)
            elif isinstance(message, _End):
                self._bad.met.update(message.met)
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
            if isinstance(message, _Handed):
                returned = [self._returned.popleft() for _ in range(len(self._returned))]
                self._channel.send(returned)
        except (OSError, EOFError):
            if self._interrupted:
                raise Interrupted from None
            raise self._died() from None
        if isinstance(message, _NewBuffers):
            if len(handles) < len(message.buffers):
                raise UserError("--feed-process: too many open files; raise the limit ('ulimit -n'), or use off")
            for (number, size), handle in zip(message.buffers, handles, strict=True):
                self._buffers[number] = self._map(handle, size)
        return message

    def _mapped(self, handed: _Handed) -> PreparedBatch:
        for number in handed.dropped:
            self._buffers.pop(number, None)
        leases = {number: self._lease(number) for number in np.unique(handed.places[:, 0]).tolist()}
        images = [leases[number][start:end] for number, start, end in handed.places.tolist()]
        self._bad.met.update(handed.met)
        return _with_images(handed.batch, images)

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
        address = _address(array)
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


class _Channel:
    """Python objects, in both directions, with file descriptors. Several threads may send, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._lock = connection, threading.Lock()

    def send(self, message: object, handles: Sequence[int] = ()) -> None:
        self.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL), handles)

    def send_bytes(self, body: bytes, handles: Sequence[int] = ()) -> None:
        """Send what `pickle.dumps` gave."""
        data = memoryview(_HEADER.pack(len(body)) + body)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", handles))] if handles else []
        with self._lock:
            sent = self._socket.sendmsg([data], rights)
            if sent < len(data):
                self._socket.sendall(data[sent:])

    def receive(self) -> tuple[Any, list[int]]:
        """A message and the file descriptors that came with it.

        Raises:
            EOFError: the other side has closed the channel, or is gone.
        """
        room = socket.CMSG_SPACE(_HANDLES_PER_MESSAGE * array("i").itemsize)
        # The whole of a message in one call: each call gives the interpreter lock away and waits for it.
        head, rights, *_ = self._socket.recvmsg(_HEADER.size, room, socket.MSG_WAITALL | socket.MSG_CMSG_CLOEXEC)
        handles = array("i")
        for level, kind, data in rights:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                handles.frombytes(data[: len(data) - len(data) % handles.itemsize])
        if len(head) < _HEADER.size:
            raise EOFError
        body = memoryview(bytearray(_HEADER.unpack(head)[0]))
        got = 0
        while got < len(body):
            count = self._socket.recv_into(body[got:], 0, socket.MSG_WAITALL)
            if count == 0:
                raise EOFError
            got += count
        return pickle.loads(body), handles.tolist()

    def wait(self, seconds: float) -> bool:
        """Wait for a message, or for the other side's end; False if there is neither."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def shut_down(self) -> None:
        """Let whoever sends or receives go, on both sides."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def main(handle: int, parent: int) -> None:
    """Be the process.

    Args:
        handle: file descriptor of the socket.
        parent: id of the process that started this one.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)
    channel = _Channel(socket.socket(fileno=handle))
    try:
        stream, bad, level = channel.receive()[0]
        os.close(os.memfd_create("feed-process"))
    except EOFError:
        os._exit(1)
    except Exception as error:
        channel.send(_portable(error))
        os._exit(1)
    channel.send(_Ready())
    protect_output()
    logging.getLogger().setLevel(level)
    logging.getLogger().addHandler(logging.handlers.QueueHandler(_Records(channel)))  # type: ignore[arg-type]
    _Feeder(channel).run(stream, bad)


class _Feeder:
    """The work of the process, and what it knows of the other side."""

    def __init__(self, channel: _Channel) -> None:
        self._channel, self._buffers = channel, SharedBuffers()
        self._room = threading.Semaphore(HANDED_AHEAD)
        self._lent: dict[int, NDArray[np.uint8]] = {}
        self._listener = threading.Thread(target=self._listen, name="feed-returns", daemon=True)

    def run(self, stream: JobStream, bad: BadSamples) -> None:
        """Hand over all batches, then wait to be ended."""
        self._listener.start()
        error: BaseException | None = None
        try:
            for batch in stream.run(stream.reader(self._buffers), bad):
                self._room.acquire()
                self._hand_over(batch, bad)
        except BaseException as raised:  # whatever it was, it belongs to the consumer
            error = _portable(raised)
        with contextlib.suppress(OSError):
            self._channel.send(_End(error, bad.met))
        self._listener.join()

    def _hand_over(self, batch: PreparedBatch, bad: BadSamples) -> None:
        # A substitute of a bad sample is in another buffer than its neighbours.
        leases: dict[int, NDArray[np.uint8]] = {}
        places = []
        for image in batch.job.encoded.images:
            lease = _lease_of(image)
            number, start = self._buffers.place(lease)
            leases[number] = lease
            at = _address(image) - start
            places.append((number, at, at + image.size))
        self._lent.update(leases)
        new = self._buffers.new()
        for some in (new[at : at + _HANDLES_PER_MESSAGE] for at in range(0, len(new), _HANDLES_PER_MESSAGE)):
            handles = [handle for *_, handle in some]
            self._channel.send(_NewBuffers([(number, size) for number, size, _ in some]), handles)
            for handle in handles:
                os.close(handle)
        dropped = self._buffers.dropped()
        handed = _Handed(_with_images(batch, []), np.array(places, np.int64).reshape(-1, 3), bad.met, dropped)
        self._channel.send(handed)

    def _listen(self) -> None:
        try:
            while True:
                returned, _ = self._channel.receive()
                for number in returned:
                    del self._lent[number]
                self._room.release()
        except (OSError, EOFError):
            os._exit(0)
        except BaseException as error:  # otherwise the other process would wait forever
            print(redacted_traceback(error), end="", file=sys.stderr, flush=True)
            os._exit(1)


class SharedBuffers(BufferPool):
    """Buffers that another process can map."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count()
        self._starts: dict[int, int] = {}
        self._new: deque[tuple[int, int, int]] = deque()
        self._dropped: deque[int] = deque()

    def place(self, lease: NDArray[np.uint8]) -> tuple[int, int]:
        """Number and address of the buffer that an array made by `bytes` is in."""
        address = _address(lease)
        return next((number, start) for number, start in list(self._starts.items()) if start == address)

    def new(self) -> list[tuple[int, int, int]]:
        """Number, bytes and file descriptor, to be closed, of every buffer made since the last call."""
        return [self._new.popleft() for _ in range(len(self._new))]

    def dropped(self) -> list[int]:
        """Numbers of the buffers given back to the system since the last call."""
        return [self._dropped.popleft() for _ in range(len(self._dropped))]

    def _fresh(self, size: int) -> NDArray[np.uint8]:
        handle = os.memfd_create("encoded-images", os.MFD_CLOEXEC)
        os.ftruncate(handle, size)
        memory = np.frombuffer(mmap.mmap(handle, size), np.uint8)
        number = next(self._numbers)
        self._starts[number] = _address(memory)
        self._new.append((number, size, handle))
        weakref.finalize(memory, self._drop, number).atexit = False
        return memory

    def _drop(self, number: int) -> None:
        del self._starts[number]
        self._dropped.append(number)


class _Records:
    """Where the process's log records go, as `QueueHandler` wants it."""

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel

    def put_nowait(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._channel.send(record)


def _with_images(batch: PreparedBatch, images: list[NDArray[np.uint8]]) -> PreparedBatch:
    encoded = dataclasses.replace(batch.job.encoded, images=images)
    return dataclasses.replace(batch, job=dataclasses.replace(batch.job, encoded=encoded))


def _lease_of(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The array made by `BufferPool.bytes` that an image is a part of."""
    assert isinstance(image.base, np.ndarray)
    return image.base


def _address(array: NDArray[np.uint8]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _portable(error: BaseException) -> BaseException:
    """The error as it can be raised in another process: itself, if it survives pickling."""
    if not isinstance(error, UserError):
        error.add_note("in the feed process:\n" + "".join(traceback.format_exception(error)))
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:
        log.debug("an error cannot be pickled", exc_info=True)
    return RuntimeError(f"{type(error).__name__}: {error}")
