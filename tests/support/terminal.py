"""An interactive shell in a terminal, as a person uses it, through tmux."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.support.launching import ROOT
from tests.support.waiting import wait_until


class Terminal:
    """Context manager: bash in a terminal of its own."""

    def __init__(self, folder: Path, environment: Mapping[str, str], *, columns: int = 200, rows: int = 50) -> None:
        self._socket = folder / "tmux"
        self._environment = environment
        self._size = ("-x", str(columns), "-y", str(rows))

    def __enter__(self) -> Terminal:
        self._tmux("new-session", "-d", *self._size, "bash --norc --noprofile", env=self._environment)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tmux("kill-server")

    def run(self, *command: str | Path) -> None:
        """Type a command, and print its exit status after it."""
        self._tmux("send-keys", f"cd {ROOT}; clear; {shlex.join(map(str, command))}; echo STATUS=$?", "Enter")

    def press(self, key: str) -> None:
        """Press a key, such as C-c."""
        self._tmux("send-keys", key)

    def screen(self) -> str:
        """Return what the terminal shows, without spaces at the ends of lines."""
        return "\n".join(line.rstrip() for line in self._tmux("capture-pane", "-p", "-J").rstrip().splitlines())

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait until the screen shows a text."""
        wait_until(lambda: text in self.screen(), f"{text!r} on the screen", seconds, interval=0.1)

    def end(self, seconds: float = 60) -> list[str]:
        """Wait for the end of the command; return the lines on the screen, of which the last one is STATUS=N."""
        wait_until(lambda: "\nSTATUS=" in self.screen(), "the shell's prompt", seconds, interval=0.1)
        lines = self.screen().splitlines()
        return lines[: next(number for number, line in enumerate(lines) if line.startswith("STATUS=")) + 1]

    def _tmux(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            ["tmux", "-S", str(self._socket), *arguments],
            env=dict(env or os.environ),
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout
