"""One rank of a training with a memory cache, for test_memory_cache.py: record batches, hits and the memory."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline import LoaderOptions, train_loader
from pipeline.feed_process.process import FeedProcess
from pipeline.loaders import node_cache

EPOCHS = 2
GLOBAL = 48


def main(data: str, out: str, mode: str) -> None:
    """Run one mode: plain (no cache), run, wait (until the process is killed) or "too large"."""
    if mode != "plain":
        dist.init_process_group("gloo")
    if mode == "too large" and dist.get_rank() == 0:
        node_cache.free_memory = lambda: 1000
    cached: dict[str, Any] = {} if mode == "plain" else {"memory_cache": 1.0, "feed_process": "on"}
    options = LoaderOptions(read_ahead=1, decode_threads=1, **cached)
    record: dict[str, Any] = {"images": [], "hits": [], "samples": []}
    with train_loader(data, global_batch=GLOBAL, size=32, augment="light", device="cpu", options=options) as loader:
        for _ in range(EPOCHS):
            before = loader.cache_use
            for batch in loader:
                record["images"].append([hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.images])
                if mode != "plain":
                    dist.barrier()  # as the gradients' all-reduce does: no rank runs ahead
            if before is not None and (use := loader.cache_use) is not None:
                record["hits"].append(use.hits - before.hits)
                record["samples"].append(use.samples - before.samples)
        if mode != "plain":
            dist.barrier()
            cache, feed = loader._memory_cache, loader._source
            assert cache is not None
            assert isinstance(feed, FeedProcess)
            status = os.stat(cache.path)
            (mapped,) = _mapped(feed.pid)
            record |= {"inode": status.st_ino, "used": status.st_blocks * 512, "stored_bytes": cache.used()[1]}
            record |= {"feed_inode": mapped, "feed": feed.pid}
            dist.barrier()
        Path(out).write_text(json.dumps(record), encoding="utf-8")
        if mode == "wait":
            time.sleep(1000)


def _mapped(process: int) -> set[int]:
    """Return the inodes of the memory caches that a process has mapped."""
    lines = Path(f"/proc/{process}/maps").read_text(encoding="utf-8").splitlines()
    return {int(line.split()[4]) for line in lines if "memfd:decoded-images" in line}


if __name__ == "__main__":
    main(*sys.argv[1:])
