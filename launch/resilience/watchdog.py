"""Watchdog: when training makes no progress for too long, report the ranks at fault and end the process.

Every rank has one. A thread checks the time of the last progress. When the hang timeout expires, every rank that is
alive writes its stack traces to RUN/stacks-rankN.txt, RUN/status becomes `stalled` and names the ranks that are silent
or behind, and the process ends with `EXIT_STATUS`, which requests another start. The thread itself accesses no files,
because the file system may be what hangs: helper threads do, with a timeout. If the thread cannot run because a library
holds the GIL, a timer in C (`faulthandler`) writes the stack traces and ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from launch.machine.network import START_TIMEOUT, shorten_timeouts
from launch.machine.simple_launcher import LAUNCHER
from launch.machine.world import World
from launch.resilience.heartbeat import FOLDER, Heartbeat, new_start
from launch.resilience.rank_status import describe_failure, failing_hosts
from launch.run.files import open_regular, unwritable
from launch.run.status import EXIT_STATUS, read_status, write_status
from shards.errors import reason_of

T = TypeVar("T")

log = logging.getLogger(__name__)

# Longest interval between heartbeats of a rank.
INTERVAL_SECONDS = 5.0
# The interval is shorter if needed, so that at least this many intervals fit into the hang timeout.
INTERVALS_IN_TIMEOUT = 15
# Number of ranks that read all heartbeats: enough to survive the loss of several hosts, few enough for slow storage.
OBSERVERS = 16
# Time limit for watching the heartbeats of all ranks, and waiting for their stack traces, after the hang timeout:
# four intervals, because shared storage may be slow. The full time passes only if a rank is silent.
ANSWER_SECONDS = 20.0
# Time limit for `_report`, which reads and writes files. All of `_end` must take less than the 45 s after which the
# hanging collective times out as well (`AFTER_WATCHDOG`).
REPORT_SECONDS = ANSWER_SECONDS + 5.0
# Time limit for each write to standard error, which may be a pipe whose reader hangs.
PRINT_SECONDS = 1.0
# Wait before exiting, which closes the connections to other ranks: they may still be writing stack traces.
FAREWELL_SECONDS = 3.0
CLOSE_SECONDS = 5.0
# Delay of the timer in C after the hang timeout, in which the thread can finish its report and end the process.
LAST_RESORT_SECONDS = 60.0


class Watchdog:
    """Context manager for the training loop, which must call `beat`. Collective: all ranks enter it.

    Args:
        run: run folder.
        timeout: seconds without progress after which the process ends; 0: never. Until the first step is done, the
            timeout is at least half an hour.
        close: called before the process ends; it restores the terminal.
    """

    def __init__(self, run: Path, world: World, *, timeout: float, close: Callable[[], object] = lambda: None) -> None:
        self._run, self._world, self._timeout, self._close = run, world, timeout, close
        self._limit = max(timeout, START_TIMEOUT.total_seconds())
        self._steps, self._beat_at = 0, time.monotonic()
        self._stepped = self._evaluated = False
        self._ends = threading.Event()
        self._dumping = threading.Lock()
        self._heartbeat: Heartbeat | None = None
        self.stacks = run / f"stacks-rank{world.rank}.txt"
        """File for this rank's stack traces; removed at the end if it is empty."""

    def __enter__(self) -> Watchdog:
        if self._timeout:
            try:
                self._run.mkdir(parents=True, exist_ok=True)  # rank 0 may not have created the folder yet
                # Keep traces of earlier starts. Another user may have made a FIFO, which would block.
                handle = open_regular(self.stacks, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                self._file = os.fdopen(handle, "a", encoding="utf-8")
            except OSError as error:
                raise unwritable(self._run, error) from error
            if self._world.size > 1:
                folder = self._run / FOLDER
                self._heartbeat = Heartbeat(
                    folder,
                    new_start(folder, self._world),
                    self._world,
                    interval=min(INTERVAL_SECONDS, self._timeout / INTERVALS_IN_TIMEOUT),
                    progress=self._progress,
                    dump=self.dump,
                )
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._timeout:
            return
        self._ends.set()
        self._thread.join()
        if self._heartbeat is not None:
            self._heartbeat.close()
        if not self._dumping.acquire(timeout=CLOSE_SECONDS):  # the file system hangs; process exit closes the file
            return
        self._file.close()
        self._dumping.release()
        with contextlib.suppress(OSError):  # an empty file that remains does no harm
            if self.stacks.stat().st_size == 0:
                self.stacks.unlink()

    def beat(self, steps: int | None = None) -> None:
        """Record progress.

        Args:
            steps: optimizer steps done; None: progress other than a completed step.
        """
        if steps is not None:
            self._steps = steps
            if not self._stepped and self._timeout:
                self._stepped, self._limit = True, self._timeout
                if self._world.size > 1:
                    shorten_timeouts(self._timeout)
        self._beat_at = time.monotonic()

    def beat_on_each(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`, and record progress at each. The first has the timeout of the first step: it may compile."""
        for item in items:
            self.beat()
            limit = self._limit
            if not self._evaluated:
                self._limit = max(limit, START_TIMEOUT.total_seconds())
            yield item
            self._evaluated, self._limit = True, limit
        self.beat()

    def dump(self) -> None:
        """Write the stack traces of all threads of this rank."""
        with self._dumping:
            if self._file.closed:
                return
            self._file.write(f"{time.strftime('%F %T')}: rank {self._world.rank}, {self._steps} steps done\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)

    def _progress(self) -> tuple[int, float]:
        """Return the optimizer steps done, and the seconds since the last progress."""
        return self._steps, time.monotonic() - self._beat_at

    def _watch(self) -> None:
        interval, warned = min(1.0, self._timeout / 10), False
        while not self._ends.wait(interval):
            try:
                _, idle = self._progress()
                if idle > self._limit:
                    self._end()
                faulthandler.dump_traceback_later(self._limit + LAST_RESORT_SECONDS, file=self._file, exit=True)
            except Exception as error:  # the thread must survive every exception
                if not warned:
                    warned = True
                    log.warning("watchdog: unexpected error, continuing: %s: %s", type(error).__name__, error)
        faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        """Report the hang and end the process. The process group is not destroyed, because that might hang too."""
        try:
            steps, idle = self._progress()
            self._reason = (
                f"rank {self._world.rank} on {self._world.host}: no progress for {idle:.0f} s after step {steps}"
            )
            stacks = f"the stack traces are in {self.stacks}"
            if not finishes(lambda: self._report(steps), REPORT_SECONDS):
                self._reason += f"; {self._run} did not answer for {REPORT_SECONDS:.0f} s"
                stacks = "the stack traces are above"
                finishes(dump_to_stderr, PRINT_SECONDS)
            finishes(self._close, PRINT_SECONDS)
            line = f"stalled: {self._reason}; {stacks}"
            finishes(lambda: print(line, file=sys.stderr, flush=True), PRINT_SECONDS)
            time.sleep(FAREWELL_SECONDS)
            if self._heartbeat is not None:
                self._heartbeat.close()
        finally:
            LAUNCHER.exit(EXIT_STATUS)

    def _report(self, steps: int) -> None:
        """Write this rank's stack traces, request those of all ranks, and name the ranks at fault in RUN/status."""
        try:
            self.dump()
        except OSError as error:
            log.warning("%s: cannot be written (%s); the stack traces follow", self.stacks, reason_of(error))
            dump_to_stderr()
        nodes: list[str] = []
        if self._heartbeat is None:
            self._reason += "; this is the only rank, so the input data, the file system or the device hangs"
        elif not is_observer(self._world.rank, self._world.size):
            time.sleep(ANSWER_SECONDS)  # meanwhile, observers need this rank's heartbeat and connections
        else:
            heartbeat = self._heartbeat
            ranks = heartbeat.watch(ANSWER_SECONDS)
            own = ranks[self._world.rank]
            if own.silent_seconds or own.beat is None:
                cause = heartbeat.failure or "the file system hangs"
                self._reason += f"; cannot write heartbeats to {heartbeat.folder} ({cause})"
                self._reason += ", so the state of the other ranks is unknown"
            else:
                self._reason += f"; {describe_failure(ranks, self._world.rank, steps)}"
                nodes = failing_hosts(ranks)
        if nodes or read_status(self._run) != "stalled":
            write_status(self._run, "stalled", reason=self._reason, nodes=nodes)


def is_observer(rank: int, ranks: int) -> bool:
    """Return whether `rank` reads all heartbeats when training hangs: every rank if there are few, else some ranks."""
    return ranks <= OBSERVERS or rank in {number * ranks // OBSERVERS for number in range(OBSERVERS)}


def finishes(task: Callable[[], object], seconds: float) -> bool:
    """Run `task` in a thread, and return whether it ended within `seconds`. A hanging thread is abandoned."""
    thread = threading.Thread(target=task, name="watchdog-task", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # if no thread can be started and the task hangs, the timer in C ends the process
        task()
        return True
    thread.join(seconds)
    return not thread.is_alive()


def dump_to_stderr() -> None:
    """Write the stack traces of all threads to standard error."""
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
