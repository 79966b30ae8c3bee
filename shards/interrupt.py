"""Ctrl-C in commands: one line at once, no traceback, exit status 130.

Python calls signal handlers in the main thread, between two bytecodes, so that during a long call into a C library
nothing would happen. Its C-level handler, however, writes the signal's number to a pipe at once
(`signal.set_wakeup_fd`), and a thread can read it. Only the standard library is imported here, because commands do this
first, before they import libraries for seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

INTERRUPTED = 130  # exit status that shells report for a process ended by Ctrl-C
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides the cursor until it ends
CLOSE_SECONDS = 1.0

Handler = Callable[[int, FrameType | None], Any]


class SignalThread:
    """Context manager that calls `react` with a signal's number in a thread, as soon as the signal arrives.

    SIGINT and SIGHUP stay ignored if they are, as in the background of a script or under nohup. Outside of the main
    thread, where Python allows no signal handlers, it does nothing.

    Args:
        handlers: functions that Python calls in the main thread, when this is possible.
    """

    def __init__(self, react: Callable[[int], None], handlers: Mapping[signal.Signals, Handler]) -> None:
        self._react, self._handlers = react, handlers
        self._old: dict[int, Any] = {}

    def __enter__(self) -> SignalThread:
        if threading.current_thread() is not threading.main_thread():
            return self
        ignored = {n for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_IGN}
        handlers = {number: handler for number, handler in self._handlers.items() if number not in ignored}
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)  # the C-level handler must never wait
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()
        self._old_pipe = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        if not self._old:
            return
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_pipe)
        os.close(self._write)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while numbers := os.read(self._read, 16):
            for number in numbers:
                if number in self._old:
                    self._react(number)
        os.close(self._read)


def exit_on_interrupt(end: Callable[[int], object] = os._exit, *, status: int | None = None) -> None:
    """From now on, end the process on Ctrl-C: during imports, after the work, or in commands without clean-up.

    Args:
        end: ends the process with a status.
        status: status with which the process is ending anyway; None: 130, and a line is printed.
    """

    def react(number: int) -> None:
        if status is None:
            write_line("interrupted")
        end(INTERRUPTED if status is None else status)

    SignalThread(react, {signal.SIGINT: _ignore}).__enter__()


def interruptible(command: Callable[[], int]) -> int:
    """Run a command; return its exit status, or 130 after Ctrl-C, which raises `KeyboardInterrupt` in the command.

    A second Ctrl-C ends the process at once, for example if a library ignores the exception.
    """
    pressed = threading.Event()

    def react(number: int) -> None:
        if pressed.is_set():
            os._exit(INTERRUPTED)
        pressed.set()
        write_line("interrupted")

    def quiet(error: Any) -> None:  # an object's `__del__` may be what is interrupted, and cannot raise
        if not isinstance(error.exc_value, KeyboardInterrupt):
            unraisable(error)

    unraisable = sys.unraisablehook
    sys.unraisablehook = quiet
    try:
        with SignalThread(react, {signal.SIGINT: signal.default_int_handler}):
            return command()
    except KeyboardInterrupt:
        if not pressed.is_set():  # another thread or a library has raised it
            write_line("interrupted")
        return INTERRUPTED
    except Exception:
        if not pressed.is_set():
            raise
        return INTERRUPTED  # a library has converted the exception
    finally:
        sys.unraisablehook = unraisable


def write_line(text: str) -> None:
    """Write a line to standard error from any thread; below a progress bar, whose hidden cursor it shows again."""
    if os.environ.get("RANK", "0") != "0":
        return
    with contextlib.suppress(OSError):
        start = f"\n{SHOW_CURSOR}" if os.isatty(2) else ""
        os.write(2, f"{start}{text}\n".encode(errors="backslashreplace"))


def _ignore(number: int, frame: FrameType | None) -> None:
    """Leave a signal to the thread."""
