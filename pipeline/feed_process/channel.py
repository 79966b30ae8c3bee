"""The channel between training and its feed process, and the messages that pass through it."""

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
from shards.errors import UserError

log = logging.getLogger(__name__)

HANDLES_PER_MESSAGE = 64  # the kernel passes 253
_HEADER = struct.Struct("<Q")


@dataclass(frozen=True)
class Ready:
    """The process has imported everything and knows what to do."""


@dataclass(frozen=True)
class NewBuffers:
    """Buffers that come with this message, as file descriptors."""

    buffers: list[tuple[int, int]]
    """Number and bytes of each."""


@dataclass(frozen=True)
class BatchMessage:
    """A prepared batch whose images are in buffers."""

    batch: PreparedBatch
    """Without its images."""
    spans: NDArray[np.int64]
    """int64 [n, 3]: number of the buffer, first byte and end of each image."""
    bad_ids: set[int]
    """Ids of all bad samples found so far."""
    dropped: list[int]
    """Numbers of buffers that will not be used again."""


@dataclass(frozen=True)
class End:
    """Nothing follows."""

    error: BaseException | None
    bad_ids: set[int]


class Channel:
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
        room = socket.CMSG_SPACE(HANDLES_PER_MESSAGE * array("i").itemsize)
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


def with_images(batch: PreparedBatch, images: list[NDArray[np.uint8]]) -> PreparedBatch:
    encoded = dataclasses.replace(batch.job.encoded, images=images)
    return dataclasses.replace(batch, job=dataclasses.replace(batch.job, encoded=encoded))


def address_of(array: NDArray[np.uint8]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def picklable_error(error: BaseException) -> BaseException:
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
