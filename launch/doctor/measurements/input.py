"""Speed of reading shards from their storage, and of decoding their images."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import simplejpeg

from pipeline.storage.files import Interrupted
from pipeline.storage.remote.client import Remote
from pipeline.storage.remote.url import is_remote
from shards.errors import ShardSetError, StorageFailed, storage_error
from shards.format.dataset import ShardSet
from shards.format.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from shards.format.manifest_digest import split_digest
from shards.images.jpeg import START
from shards.redact import redact

PIECE = 8 << 20  # bytes per request
KEPT = 16 << 20  # bytes of the first shard that are kept for decoding
BLOCKS = 6  # of which the fastest counts
MAX_READ = 4 << 30  # bytes per rank
MAX_IMAGES = 64
OPEN_SECONDS = 15.0
FIRST_REQUEST = 1 << 18  # bytes of the first request to a server
SHORT_REQUEST_SECONDS = 0.2


@dataclass(frozen=True)
class ShardFile:
    """One file of a set, or a part of it that one rank reads."""

    name: str
    size: int
    start: int = 0


@dataclass(frozen=True)
class InputFiles:
    """The shards of a set, in a folder or at a URL."""

    location: Path | str
    files: tuple[ShardFile, ...]
    tars: bool
    pixels: bool
    """Whether images are stored as pixels, which are not decoded."""


@dataclass(frozen=True)
class ReadResult:
    rate: float
    """Bytes/s."""
    beginning: bytes
    """First bytes of the first file that was read."""


Read = Callable[[ShardFile], Iterator[bytes]]
"""Yields consecutive pieces of a file."""


def open_input(location: Path | str) -> InputFiles:
    """Return the files of a set's training split, or of its first split if it has none.

    Raises:
        UserError: the set does not exist, is damaged, or cannot be reached.
    """
    plain, digest = split_digest(location, None)
    place = str(plain) if is_remote(plain) else Path(plain)
    if isinstance(place, str):
        content = _read_manifest(place)
        if digest is not None:
            digest.check(content, f"{place}/{MANIFEST_NAME}")
        manifest = Manifest.parse(content, f"{place}/{MANIFEST_NAME}")
    else:
        manifest = ShardSet(place, digest=digest).manifest
    split = manifest.splits.get("train") or next(iter(manifest.splits.values()))
    if split.tars:
        files = tuple(ShardFile(shard.name, shard.bytes) for shard in split.shards)
        return InputFiles(place, files, tars=True, pixels=split.pixels)
    assert split.beton is not None
    step = max(PIECE, split.beton.bytes // len(split.shards))
    parts = (
        ShardFile(split.beton.name, min(step, split.beton.bytes - at), at) for at in range(0, split.beton.bytes, step)
    )
    return InputFiles(place, tuple(parts), tars=False, pixels=split.beton.mode == "raw")


def _read_manifest(url: str) -> bytes:
    remote = Remote(url)
    with _interrupted_after(OPEN_SECONDS, remote):
        try:
            return remote.read_all(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        except Interrupted:
            raise StorageFailed(
                f"{redact(url)}/{MANIFEST_NAME}: not received within {OPEN_SECONDS:g} s; check the server"
            ) from None


@contextlib.contextmanager
def _interrupted_after(seconds: float, remote: Remote) -> Iterator[None]:
    """Make the requests of `remote` raise `Interrupted` after `seconds`, if the block has not ended before."""
    timer = threading.Timer(seconds, remote.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def measure_reading(found: InputFiles, *, rank: int, ranks: int, seconds: float, seed: int = 0) -> ReadResult:
    """Read shards for about `seconds`, different ones on every rank; if there are few, read them again.

    Local files are removed from the page cache first, so that the storage is measured. This has no effect on file
    systems in memory, and on pages that another process uses.

    Args:
        seed: of the order of the shards, equal on all ranks.

    Raises:
        ShardSetError: a shard is missing, or cannot be read.
    """
    own = files_of_rank(found.files, rank=rank, ranks=ranks, seed=seed)
    if isinstance(found.location, Path):
        return _read_in_time(own, _local(found.location), seconds)
    remote = Remote(found.location)
    with _interrupted_after(seconds, remote):
        return _read_in_time(own, _remote(remote), seconds)


def files_of_rank(files: tuple[ShardFile, ...], *, rank: int, ranks: int, seed: int) -> tuple[ShardFile, ...]:
    """Return the files that a rank reads: others than all other ranks, if there is one for each rank.

    Their order is random: a file server may have the first shards in its cache, which would otherwise make the hosts
    of the first ranks faster than the others.
    """
    shuffled = random.Random(seed).sample(files, len(files))
    return tuple(shuffled[rank % len(files) :: ranks])


def _read_in_time(files: tuple[ShardFile, ...], read: Read, seconds: float) -> ReadResult:
    """Read files again and again for `seconds`."""
    begun = time.perf_counter()
    beginning, total = bytearray(), 0
    times, totals = [0.0], [0]
    try:
        for number, piece in _again_and_again(files, read):
            if number == 0 and len(beginning) < KEPT:
                beginning += piece
            total += len(piece)
            now = time.perf_counter() - begun
            if now >= times[-1] + seconds / BLOCKS:
                times.append(now)
                totals.append(total)
            if now > seconds or total > MAX_READ:
                break
    except Interrupted:
        pass  # the server did not send more in time
    times.append(time.perf_counter() - begun)
    totals.append(total)
    return ReadResult(best_rate(times, totals, shortest=seconds / BLOCKS / 2), bytes(beginning))


def best_rate(times: Sequence[float], totals: Sequence[int], *, shortest: float) -> float:
    """Return the highest rate between two consecutive times, because slower blocks were disturbed by other work.

    Args:
        times: ascending seconds, at least two.
        totals: bytes read until each of them.
        shortest: blocks shorter than this are not counted, unless there is only one.
    """
    blocks = [
        (stop - start, last - first)
        for (start, stop), (first, last) in zip(pairwise(times), pairwise(totals), strict=True)
    ]
    rates = [size / spent for spent, size in blocks if spent >= shortest]
    return max(rates) if rates else totals[-1] / max(times[-1], 1e-9)


def _again_and_again(files: tuple[ShardFile, ...], read: Read) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the file, consecutive piece) of the files, without end."""
    for number in itertools.count():
        for piece in read(files[number % len(files)]):
            yield number, piece


def _local(folder: Path) -> Read:
    def read(file: ShardFile) -> Iterator[bytes]:
        path = folder / file.name
        try:
            with path.open("rb", buffering=0) as opened:
                os.posix_fadvise(opened.fileno(), file.start, file.size, os.POSIX_FADV_DONTNEED)
                opened.seek(file.start)
                left = file.size
                while left and (piece := opened.read(min(PIECE, left))):
                    left -= len(piece)
                    yield piece
        except OSError as error:
            raise storage_error(path, error) from error
        if left:
            raise ShardSetError(f"{path}: truncated: {left:,} bytes are missing; copy it again")

    return read


def _remote(remote: Remote) -> Read:
    """Read in requests that grow to `PIECE`, because the bytes of an unfinished request do not count."""
    step = FIRST_REQUEST

    def read(file: ShardFile) -> Iterator[bytes]:
        nonlocal step
        at, stop = file.start, file.start + file.size
        if not remote.has_ranges(file.name):
            yield from remote.pieces(file.name, at, stop, whole=True)
            return
        while at < stop:
            begun = time.perf_counter()
            yield from remote.pieces(file.name, at, min(at + step, stop))
            at += step
            step = min(PIECE, 2 * step) if time.perf_counter() - begun < SHORT_REQUEST_SECONDS else step

    return read


def measure_decoding(found: InputFiles, beginning: bytes, *, cores: int, seconds: float) -> float | None:
    """Decode JPEGs on one core; return the images/s of `cores` cores. None: there are no JPEGs to decode."""
    images = _images(beginning) if found.tars and not found.pixels else []
    if not images:
        return None
    for image in images[:4]:
        simplejpeg.decode_jpeg(image, "RGB")
    done, begun, cpu = 0, time.perf_counter(), time.thread_time()
    while done < len(images) or time.perf_counter() - begun < seconds:
        simplejpeg.decode_jpeg(images[done % len(images)], "RGB")
        done += 1
        if time.perf_counter() - begun > 4 * seconds:  # huge images
            break
    return cores * done / max(time.thread_time() - cpu, 1e-9)


def _images(beginning: bytes) -> list[bytes]:
    """Return the first JPEGs of a tar of which only the beginning is given."""
    images: list[bytes] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(beginning)) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                data = content.read() if content else b""
                if data.startswith(START):
                    images.append(data)
                if len(images) == MAX_IMAGES:
                    break
    except tarfile.TarError:
        pass  # the last member is incomplete, which `read` reports
    return images
