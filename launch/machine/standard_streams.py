"""Keep failing standard streams (closed, a pipe without a reader, a full disk) from ending a run."""

from __future__ import annotations

import io
import os
import sys


def open_missing_streams() -> None:
    """Connect closed standard streams with /dev/null.

    Call this before any file is opened. Otherwise that file gets the descriptor of the closed stream, and output that a
    library writes to stderr goes into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
            mode = "r" if number == 0 else "w"
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def ignore_failing_output() -> None:
    """Let stdout and stderr drop what cannot be written, instead of raising in the caller that prints or logs."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Tests and notebooks replace the streams; leave theirs alone.
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            buffer: io.BufferedIOBase = io.BufferedWriter(_DiscardFailedWrites(stream.fileno(), "w", closefd=False))  # type: ignore[type-var]
            # A path may hold characters that the terminal's encoding cannot represent.
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True))


class _DiscardFailedWrites(io.FileIO):
    def write(self, content: bytes) -> int:  # type: ignore[override]
        try:
            written = super().write(content)
        except OSError:
            written = None
        return len(content) if written is None else written
