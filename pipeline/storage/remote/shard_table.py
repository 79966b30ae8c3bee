"""The state of every shard of a remote set, and the upcoming requests for shards."""

from __future__ import annotations

import enum
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.plan import ShardRequest
from pipeline.storage.cache.partial_file import Busy
from pipeline.storage.remote.staging import Progress, StagedFile

# Maximum number of requested shards; each needs a file descriptor. Released shards stay in the cache until evicted.
MAX_LOCAL = 400
# Maximum number of accepted requests. Without it, a set of few shards would accept all requests up to the last epoch.
MAX_REQUESTS = 1024


class ShardState(enum.Enum):
    """State of a shard in this process: REMOTE -> DOWNLOADING -> LOCAL -> REMOTE, or back if staging fails."""

    REMOTE = "on the server, from which its samples are read; also while another process stages it"
    DOWNLOADING = "being staged by a thread of this process; its samples are still read from the server"
    LOCAL = "leased in the cache, from which its samples are read"


@dataclass(slots=True)
class Shard:
    """State of one shard in this process."""

    state: ShardState = ShardState.REMOTE
    lease: int = -1
    """File descriptor, if LOCAL."""
    requests: int = 0
    """Number of accepted requests that include the shard."""
    readers: int = 0
    """Number of threads that are reading from the shard."""
    retry_at: float = 0.0
    """Earliest time (`time.monotonic`) of the next attempt to stage the shard."""
    progress: Progress = field(default_factory=Progress)
    """Progress of another process that stages the shard."""


class ShardTable:
    """States of all shards. Not thread-safe: the caller holds a lock.

    Args:
        max_bytes: maximum total size of the requested shards.
    """

    def __init__(self, files: Sequence[StagedFile], *, max_bytes: int) -> None:
        self._files, self._max_bytes = files, max_bytes
        self._shards = [Shard() for _ in files]
        self._upcoming: Iterator[ShardRequest] = iter(())
        self._next: ShardRequest | None = None
        self._requests: deque[ShardRequest] = deque()
        self._requested: dict[int, None] = {}  # shards of `_requests`, in the order of their first request
        self._requested_bytes = 0

    def __getitem__(self, file: int) -> Shard:
        return self._shards[file]

    def lease(self, file: int) -> int | None:
        """Return the file descriptor of a LOCAL shard; None in the other states."""
        shard = self._shards[file]
        return shard.lease if shard.state is ShardState.LOCAL else None

    def begin(self, file: int) -> bool:
        """Change REMOTE to DOWNLOADING; return False if the shard is in another state."""
        shard = self._shards[file]
        if shard.state is not ShardState.REMOTE:
            return False
        shard.state = ShardState.DOWNLOADING
        return True

    def end(self, file: int, lease: int | Busy | None, *, retry_at: float = 0.0) -> None:
        """Change DOWNLOADING to LOCAL if there is a lease, else back to REMOTE."""
        shard = self._shards[file]
        if isinstance(lease, int):
            shard.state, shard.lease, shard.progress = ShardState.LOCAL, lease, Progress()
            self.release(file)  # requests for the shard may have been dropped during the download
        else:
            shard.state, shard.retry_at = ShardState.REMOTE, retry_at

    def release(self, file: int) -> None:
        """Change LOCAL to REMOTE, unless the shard still has requests or readers. Its file stays in the cache until it
        is evicted."""
        shard = self._shards[file]
        if shard.state is ShardState.LOCAL and not shard.requests and not shard.readers:
            os.close(shard.lease)
            shard.state, shard.lease = ShardState.REMOTE, -1

    def next_to_stage(self, now: float) -> int | None:
        """Change the first requested shard that may be staged now to DOWNLOADING and return it; None if none may be."""
        for file in self._requested:
            if self._shards[file].retry_at <= now and self.begin(file):
                return file
        return None

    # -- requests --------------------------------------------------------------------------------------------------

    def prefetch(self, requests: Iterator[ShardRequest]) -> None:
        """Set the iterator of upcoming requests, which `look_ahead` accepts in order."""
        self._upcoming = requests

    def look_ahead(self) -> Iterator[int]:
        """Accept upcoming requests up to `max_bytes`; yield the size of each in bytes before it is accepted."""
        while len(self._requests) < MAX_REQUESTS:
            self._next = self._next or next(self._upcoming, None)
            if self._next is None:
                return
            yield sum(self._files[file].bytes for file in self._next.shards)
            new = [file for file in self._next.shards if file not in self._requested]
            size = sum(self._files[file].bytes for file in new)
            full = self._requested_bytes + size > self._max_bytes or len(self._requested) + len(new) > MAX_LOCAL
            if self._requested and full:
                return
            self._requested_bytes += size
            for file in self._next.shards:
                self._requested.setdefault(file)
                self._shards[file].requests += 1
            self._requests.append(self._next)
            self._next = None

    def drop_before(self, step: float) -> None:
        """Drop the requests that only batches before `step` need."""
        while self._requests and self._requests[0].last < step:
            for file in self._requests.popleft().shards:
                self._shards[file].requests -= 1
                if not self._shards[file].requests:
                    del self._requested[file]
                    self._requested_bytes -= self._files[file].bytes
                    self.release(file)
