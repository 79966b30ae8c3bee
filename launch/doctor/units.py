"""Format measurements for tables and messages."""

from __future__ import annotations

from shards.memory import GIB


def flops(value: float) -> str:
    return f"{value / 1e12:,.1f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:,.1f} GFLOP/s"


def bandwidth(value: float) -> str:
    return f"{value / 1e9:,.2f} GB/s" if value >= 1e8 else f"{value / 1e6:,.2f} MB/s"


def latency(value: float) -> str:
    return f"{1e3 * value:,.1f} ms" if value >= 1e-2 else f"{1e6 * value:,.0f} us"


def bytes_text(value: float) -> str:
    return f"{value / GIB:,.1f} GiB" if value >= GIB else f"{value / 2**20:,.0f} MiB"
