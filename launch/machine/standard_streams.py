"""Protection of a run against failing standard streams: closed, a pipe without a reader, a full disk."""

from __future__ import annotations

import io
import os
import sys


def open_missing_streams() -> None:
    """Open closed standard streams on /dev/null.

    Call this before any file is opened. Otherwise the file gets the descriptor of the closed stream, and what libraries
    write to stderr ends up in the file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # `open` returns the lowest free descriptor, which is `number`
            mode = "r" if number == 0 else "w"
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - stays open
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def ignore_failing_output() -> None:
    """Make stdout and stderr discard output that cannot be written, so that printing and logging raise no errors."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Streams that tests or notebooks have substituted are not wrapped.
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            buffer: io.BufferedIOBase = io.BufferedWriter(_DiscardFailedWrites(stream.fileno(), "w", closefd=False))  # type: ignore[type-var]
            # A path may contain characters that the terminal's encoding cannot represent.
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True))


class _DiscardFailedWrites(io.FileIO):
    def write(self, content: bytes) -> int:  # type: ignore[override]
        try:
            written = super().write(content)
        except OSError:
            written = None
        return len(content) if written is None else written
