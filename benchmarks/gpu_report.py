"""What `benchmarks/gpu.py` says of a part: its figures in a line."""

from __future__ import annotations

from statistics import median
from typing import Any


def summary(result: dict[str, Any]) -> str:
    """A result in a line: what it found, or how it ended."""
    found = said(result["figures"]) if result.get("figures") else ""
    text, last = f"{result['state']}, {result['seconds']:.0f} s", result["tail"].splitlines()[-1:]
    if result["state"] == "passed":
        return found or ": ".join([text, *last])
    return ": ".join([text, *last, *filter(None, [found])])


def said(found: dict[str, Any]) -> str:
    """The figures of one of the benchmarks, in a line."""
    if "verdict" in found:
        return (
            f"both/model {found['both_of_model']:.3f}, model {found['model']['rate']:,.0f} images/s = "
            f"{found['model_of_roofline']:.2f} of its roofline, MFU {found['mfu']:.1%}: {found['verdict']}"
        )
    if "on a GPU" in found:
        return "; ".join(
            f"{row['part']} by {row['way']}: {row['launches']} launches, {row['device ms']:.3f} ms, "
            f"{row['share of a step']:.1%} of a step"
            for row in found["on a GPU"]["rows"]
        )
    if "medians" in found:
        rates = sorted(((name, row["rate"]) for name, row in found["medians"].items()), key=lambda row: -row[1])
        return "; ".join(f"{name} {rate:,.0f}/s" for name, rate in rates)
    if "copy GB/s" in found:
        rows = found["results"]
        shares = "; ".join(
            f"{way} {median(some):.2f} ({min(some):.2f} to {max(some):.2f})"
            for way in ("ours", "channels-last", "contiguous")
            if (some := [row[way]["share"] for row in rows if way in row])
        )
        return f"copy {found['copy GB/s']:,.0f} GB/s; {len(rows)} kernels, shares of it: {shares}"
    if "recipes" in found:
        return "; ".join(f"{name} {row['ours']:.1f} us an image" for name, row in found["recipes"].items())
    lines = []
    for row in found.get("results", []):
        rates = [
            f"{key.removesuffix('images/s')}{value:,.0f}" for key, value in row.items() if key.endswith("images/s")
        ]
        lines.append(
            " ".join([*([row["mode"]] if "mode" in row else []), row["way"], row.get("failed") or ", ".join(rates)])
        )
    return "; ".join(lines)
