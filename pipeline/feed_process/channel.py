"""The channel between the training process and its feed process, and the messages that are sent through it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pickle
import select
import socket
import struct
import threading
import traceback
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.jobs import PreparedBatch
from pipeline.stage_trace import Event
from shards.errors import UserError

log = logging.getLogger(__name__)

HANDLES_PER_MESSAGE = 64  # file descriptors per message; Linux allows 253
_HEADER = struct.Struct("<Q")


@dataclass(frozen=True)
class Ready:
    """The feed process has imported its modules and received its task."""


@dataclass(frozen=True)
class NewBuffers:
    """Buffers whose file descriptors are sent with this message."""

    buffers: list[tuple[int, int]]
    """Number and size in bytes of each buffer."""


@dataclass(frozen=True)
class BatchMessage:
    """A prepared batch whose images are in shared buffers."""

    batch: PreparedBatch
    """The batch without its images."""
    spans: NDArray[np.int64]
    """int64 [n, 3]: buffer number, start offset and end offset in bytes of each image."""
    bad_ids: set[int]
    """Ids of all bad samples found so far."""
    dropped: list[int]
    """Numbers of the buffers that will not be used again."""
    events: list[Event]
    """Events of the feed process that were recorded since the last batch."""


@dataclass(frozen=True)
class Received:
    """The answer of the training process to each batch."""

    returned: list[int]
    """Numbers of the buffers that are not in use any more."""
    record: bool
    """Whether to record events."""


@dataclass(frozen=True)
class End:
    """The last message of the feed process."""

    error: BaseException | None
    """The error that ended the work, if any."""
    bad_ids: set[int]
    """Ids of all bad samples found."""


class Channel:
    """Sends and receives Python objects, with file descriptors, over a socket.

    Any number of threads may send; only one thread may receive.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._lock = connection, threading.Lock()

    def send(self, message: object, handles: Sequence[int] = ()) -> None:
        """Send an object and file descriptors. The caller closes its own copies of the descriptors."""
        self.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL), handles)

    def send_bytes(self, body: bytes, handles: Sequence[int] = ()) -> None:
        """Send an object that is pickled already."""
        data = memoryview(_HEADER.pack(len(body)) + body)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", handles))] if handles else []
        with self._lock:
            sent = self._socket.sendmsg([data], rights)
            if sent < len(data):
                self._socket.sendall(data[sent:])

    def receive(self) -> tuple[Any, list[int]]:
        """Wait for a message. Return the object and the file descriptors that were sent with it.

        Raises:
            EOFError: the peer has closed the channel or has died.
        """
        room = socket.CMSG_SPACE(HANDLES_PER_MESSAGE * array("i").itemsize)
        # MSG_WAITALL receives a message with few calls; each call releases the interpreter lock and waits for it.
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
        """Wait until a message arrives or the peer closes the channel. Return False after `seconds` without either."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def shut_down(self) -> None:
        """Close the connection, which ends every blocked `send` and `receive` on both sides."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close this side's socket."""
        self._socket.close()


def with_images(batch: PreparedBatch, images: list[NDArray[np.uint8]]) -> PreparedBatch:
    """Return a copy of the batch with these encoded images."""
    encoded = dataclasses.replace(batch.job.encoded, images=images)
    return dataclasses.replace(batch, job=dataclasses.replace(batch.job, encoded=encoded))


def address_of(array: NDArray[np.uint8]) -> int:
    """Return the memory address of an array's first byte."""
    address: int = array.__array_interface__["data"][0]
    return address


def picklable_error(error: BaseException) -> BaseException:
    """Return the error if it can be pickled without loss, else a RuntimeError with its type and text."""
    if not isinstance(error, UserError):
        error.add_note("in the feed process:\n" + "".join(traceback.format_exception(error)))
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:
        log.debug("cannot pickle an error of the feed process", exc_info=True)
    return RuntimeError(f"{type(error).__name__}: {error}")
