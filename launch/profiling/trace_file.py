"""Add the events of a loader to a trace of torch.profiler (Chrome trace event format, which Perfetto reads)."""

from __future__ import annotations

import gzip
import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.profiler import profile

from launch.profiling.stages import FEED_THREAD, LOADER_THREAD
from pipeline.stage_trace import Event, Span
from shards.files.durable import durable_write

STEP_LABEL = "optimizer step"
"""Name of the annotation around each profiled step."""
LOADER_PID = 1 << 22  # Linux's process ids are smaller
# Threads in the order of the tracks; other threads follow.
TRACKS = {"MainThread": "training loop", LOADER_THREAD: "loader", FEED_THREAD: "feed process"}


def write_trace(torch_profile: profile, events: Iterable[Event], step_starts: Sequence[int], path: Path) -> bool:
    """Write the trace of torch.profiler with the loader's events to a .json.gz file.

    Args:
        step_starts: nanoseconds of `time.monotonic_ns` at which each annotation `STEP_LABEL` was entered, by which the
            two clocks are aligned.

    Returns:
        Whether the trace has kernels of a GPU.

    Raises:
        OSError: a file cannot be written.
        ValueError: the trace of torch.profiler lacks the annotations.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".trace-") as folder:
        exported = Path(folder) / "torch.json"
        torch_profile.export_chrome_trace(str(exported))
        trace = json.loads(exported.read_bytes())
    found = trace["traceEvents"]
    trace["traceEvents"] = [*found, *trace_events(events, clock_offset(found, step_starts))]
    durable_write(path, gzip.compress(json.dumps(trace).encode(), 6))
    return any(event.get("cat") == "kernel" for event in found)


def clock_offset(found: Iterable[dict[str, Any]], step_starts: Sequence[int]) -> float:
    """Return what to add to microseconds of `time.monotonic_ns` to get times of the trace.

    Raises:
        ValueError: the annotations in the trace are not those of `step_starts`.
    """
    labels = sorted(e["ts"] for e in found if e.get("name") == STEP_LABEL and e.get("cat") == "user_annotation")
    if len(labels) != len(step_starts) or not labels:
        raise ValueError(f"the trace has {len(labels)} steps, expected {len(step_starts)}")
    # The median, because the thread may be interrupted between the reading of the clock and the annotation.
    return statistics.median(ts - start / 1e3 for ts, start in zip(labels, step_starts, strict=True))


def trace_events(events: Iterable[Event], offset: float) -> Iterator[dict[str, Any]]:
    """Yield the events of a loader as trace events: a process with one track per thread and one counter per queue."""
    events = list(events)
    yield _metadata("process_name", 0, name="data loader")
    yield _metadata("process_sort_index", 0, sort_index=-1)
    names = sorted({event.thread for event in events if isinstance(event, Span)}, key=_track_order)
    tracks = {name: number for number, name in enumerate(names, start=1)}
    for name, track in tracks.items():
        yield _metadata("thread_name", track, name=TRACKS.get(name, name))
        yield _metadata("thread_sort_index", track, sort_index=track)
    for event in events:
        if isinstance(event, Span):
            yield {
                "ph": "X",
                "cat": "loader",
                "name": event.stage,
                "pid": LOADER_PID,
                "tid": tracks[event.thread],
                "ts": round(event.start / 1e3 + offset, 3),
                "dur": round((event.end - event.start) / 1e3, 3),
                "args": {} if event.batch is None else {"batch": event.batch},
            }
        else:
            yield {
                "ph": "C",
                "cat": "loader",
                "name": f"queue: {event.queue}",
                "pid": LOADER_PID,
                "tid": 0,
                "ts": round(event.time / 1e3 + offset, 3),
                "args": {"batches": event.batches},
            }


def _metadata(kind: str, tid: int, **values: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": LOADER_PID, "tid": tid, "args": values}


def _track_order(thread: str) -> tuple[int, str]:
    return (list(TRACKS).index(thread) if thread in TRACKS else len(TRACKS)), thread
