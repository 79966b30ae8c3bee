"""`accelerate launch` of a single process: let it wait for the trainer, and keep its traceback off the terminal.

It starts the script as a subprocess and waits. On Ctrl-C it ends at once with a traceback, while the trainer still
saves; and if the trainer returns a status other than 0, a traceback of a dozen lines follows the trainer's error. It
has no option against this that could be set from outside. Other launchers are left alone: torch's forwards signals and
waits.

Linux only. Only the standard library is imported, because this happens before libraries are imported for seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def is_simple_launch(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Return whether a parent process with this command line is `accelerate launch` with this as its only process."""
    if "TORCHELASTIC_RUN_ID" in environment or environment.get("WORLD_SIZE", "1") != "1":
        return False
    names = {os.path.basename(argument) for argument in command[1:4]}
    if names & {"accelerate-launch", "accelerate.commands.launch"}:
        return True
    return bool(names & {"accelerate", "accelerate.commands.accelerate_cli"}) and "launch" in command[2:5]


class SimpleLauncher:
    """The parent process, if it is `accelerate launch` with this as its only process."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self._status = 0
        self._terminal: int | None = None
        self._old_group = os.getpgrp()

    def attach(self) -> None:
        """Find the launcher, take the terminal from it, and arrange that its end requests a stop."""
        parent = os.getppid()
        with contextlib.suppress(OSError):
            command = os.fsdecode(Path(f"/proc/{parent}/cmdline").read_bytes()).split("\0")
            if is_simple_launch(command, os.environ):
                self.pid = parent
        if self.pid is None:
            return
        atexit.register(self._end)  # registered first, hence called last
        self._take_terminal()
        # If the launcher is killed, the run is saved and stopped instead of training on unseen.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def run(self, main: Callable[[], int]) -> int:
        """Return the exit status of `main`; if it is not 0, the launcher ends with this process."""
        self._status = 1
        try:
            self._status = main()
        except SystemExit as end:
            self._status = end.code if isinstance(end.code, int) else int(bool(end.code))
            raise
        return self._status

    def exit(self, status: int) -> None:
        """End this process at once, and the launcher if `status` is not 0."""
        self._status = status
        self._end()
        os._exit(status)

    def _take_terminal(self) -> None:
        """Move this process to a group of its own in the foreground, so that Ctrl-C reaches it but not the launcher.

        Only if both are in the foreground, and neither reads from or writes to a pipe: the terminal's keys may be for
        the program at its other end, such as a pager.
        """
        if not (os.isatty(0) and os.isatty(2)):
            return
        with contextlib.suppress(OSError):
            terminal = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
            if os.tcgetpgrp(terminal) != self._old_group:
                return os.close(terminal)
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # otherwise, the kernel stops the group that is left behind
            signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # the shell would not notice that only this process stops
            os.setpgid(0, 0)
            os.tcsetpgrp(terminal, os.getpgrp())
            self._terminal = terminal

    def _end(self) -> None:
        """Give the terminal back; if this process fails, end the launcher before it prints a traceback."""
        if self.pid is None:
            return
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
        if self._terminal is not None:
            with contextlib.suppress(OSError):
                os.tcsetpgrp(self._terminal, self._old_group)
        if self._status and os.getppid() == self.pid:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            # The launcher only waits for this process. SIGTERM ends it without a word; its status is 143 instead of 1.
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGTERM)
            os._exit(self._status)  # at once, because the shell's prompt returns now


LAUNCHER = SimpleLauncher()
"""The launcher of this process."""
