"""Compute the size of a set of pixels before it is written, from the headers of the images in the source."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import numpy as np

from shards.convert.conversion_plan import LABEL_BYTES, ConversionPlan
from shards.convert.work_folder import WorkFolder
from shards.convert.writer import ContainerReader
from shards.errors import UserError
from shards.format.beton import ALLOCATION, METADATA, MIN_PAGE
from shards.format.tar import BLOCK, END, member_bytes
from shards.images.accept import stored_size
from shards.images.limits import MAX_PIXELS
from shards.images.rules import ImageRules, Rejected
from shards.memory import GIB, machine_memory
from shards.progress import Progress
from shards.workers.pool import run_jobs
from shards.workers.worker import Report

MAX_HEADERS = 20_000
"""Number of headers that are read at most (and one per shard). The samples are shuffled, so the headers of every n-th
sample give the size of ImageNet within 1 %."""
_HEADER_BYTES = 2**15  # read first; the frame header of nearly all JPEGs is in them


@dataclass(frozen=True)
class HeaderJob:
    """The images of one shard whose headers are read in a worker process."""

    work: WorkFolder
    split: str
    shard: int
    rules: ImageRules
    every: int
    """Read the header of every n-th image."""


def expect_bytes(work: WorkFolder, plan: ConversionPlan, workers: int | None) -> int:
    """Return the expected size of the files of a set of pixels, in bytes, if no image is rejected.

    Raises:
        UserError: the disk does not have as much free space.
    """
    images = _count_images(work, plan)
    every = max(1, -(-images // MAX_HEADERS))
    jobs = [HeaderJob(work, split, shard, plan.rules, every) for split, shard in plan.jobs]
    with Progress("reading headers", images // every, "headers") as progress:
        pixels = sum(run_jobs(sum_pixels, jobs, workers, progress))
    # In a tar, an image fills its last block by half on average. In a .beton, half an image is free in every page.
    tars = pixels + images * (int(member_bytes(np.int64(LABEL_BYTES))) + BLOCK + BLOCK // 2) + len(END) * len(jobs)
    tables = images * (METADATA.itemsize + ALLOCATION.itemsize) + len(plan.shards) * MIN_PAGE
    beton = pixels + pixels // MIN_PAGE * (pixels // images) // 2 + tables
    expected = tars * plan.keeps_tars + beton * (plan.beton is not None)
    free = shutil.disk_usage(work.out).free
    if expected > free:
        raise UserError(
            f"{work.out}: the pixels of {images:,} images take about {_gib(expected)}, but the disk has {_gib(free)} "
            "free; use --short-side, free some space, or specify another --out"
        )
    return expected


def describe_size(work: WorkFolder, plan: ConversionPlan) -> str:
    """Return a note with the expected size of a set of pixels, and the memory that holds it in the page cache."""
    size = plan.expected_bytes
    read = size // 2 if plan.keeps_tars and plan.beton else size  # training reads only the tars or only the .beton
    return (
        f"{work.out}: the pixels of {_count_images(work, plan):,} images take about {size:,} bytes ({_gib(size)}); "
        f"training reads them from memory after the first epoch if {_gib(read)} are free for the page cache (this "
        f"machine has {_gib(machine_memory())} of memory)"
    )


def sum_pixels(job: HeaderJob, report: Report) -> int:
    """Return the bytes of the pixels of a shard's images, estimated from every n-th image. Runs in a worker process."""
    listing, bounds = job.work.load_listing(job.split)
    start, stop = int(bounds[job.shard]), int(bounds[job.shard + 1])
    total = read = 0
    with ContainerReader() as reader:
        for i in range(start, stop, job.every):
            (entry,) = listing.entries(i, i + 1)
            report.start(entry.name)
            try:
                size = stored_size(reader.read(entry, _HEADER_BYTES), job.rules)
                if size is None:  # not a JPEG, or one with more metadata
                    size = stored_size(reader.read(entry), job.rules)
            except Rejected:
                size = None
            width, height = size or (0, 0)
            total += 3 * width * height if width * height <= MAX_PIXELS else 0
            read += 1
            report(1, 0)
    return total * (stop - start) // read


def _count_images(work: WorkFolder, plan: ConversionPlan) -> int:
    return sum(len(work.load_listing(split)[0]) for split in plan.shards)


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"
