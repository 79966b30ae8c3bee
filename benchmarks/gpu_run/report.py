"""Summarize the result of a part of `benchmarks/gpu.py` in one line."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

FACTS = ("GPUs", "libnvcuvid.so.1", "gcc", "Python.h")  # the most important facts of a machine


def summary(result: dict[str, Any]) -> str:
    """Return the part's state, duration and results in one line.

    The last line of its output is added if the part failed or has no results.
    """
    found = figures_in_a_line(result["figures"]) if result.get("figures") else ""
    last = result["tail"].splitlines()[-1:]
    ended = f"{result['state']}, {result['seconds']:.0f} s"
    parts = [ended, found] if result["state"] == "passed" and found else [ended, *last, found]
    return ": ".join(filter(None, parts))


def figures_in_a_line(found: dict[str, Any]) -> str:
    """Format the results of any benchmark in one line."""
    return next((describe(found) for key, describe in KINDS.items() if key in found), "")


def of_bench(found: dict[str, Any]) -> str:
    return (
        f"both/model {found['both_of_model']:.3f}, model {found['model']['rate']:,.0f} images/s = "
        f"{found['model_of_roofline']:.2f} of its roofline, MFU {found['mfu']:.1%}: {found['verdict']}"
    )


def of_augmentation(found: dict[str, Any]) -> str:
    if "on a GPU" not in found:
        return "; ".join(f"{name} {row['ours']:.1f} us an image" for name, row in found["recipes"].items())
    return "; ".join(
        f"{row['part']}, {row['way']}: {row['launches']} launches, {row['device ms']:.3f} ms, "
        f"{row['share of a step']:.1%} of a step"
        for row in found["on a GPU"]["rows"]
    )


def of_decoders(found: dict[str, Any]) -> str:
    return str(found["decoders"])


def of_decoding(found: dict[str, Any]) -> str:
    rates = sorted(((name, row["rate"]) for name, row in found["medians"].items()), key=lambda row: -row[1])
    return "; ".join(f"{name} {rate:,.0f}/s" for name, rate in rates)


def of_kernels(found: dict[str, Any]) -> str:
    rows = found["results"]
    shares = "; ".join(
        f"{way} {median(some):.2f} ({min(some):.2f} to {max(some):.2f})"
        for way in dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, dict))
        if (some := [row[way]["share"] for row in rows if way in row])
    )
    return f"copy {found['copy GB/s']:,.0f} GB/s; {len(rows)} kernels, fractions of that bandwidth: {shares}"


def of_training(found: dict[str, Any]) -> str:
    lines = found["training"]
    train, evaluation = lines.get("train"), lines.get("eval")
    parts = [f"top-1 {evaluation['top1']:.2%}"] if evaluation else []
    if train:
        parts.append(f"{train['images_per_second']:,.0f} images/s, waiting for data {train['data_wait']:.1%}")
        parts.append(f"loss {train['loss']:.3f} at step {train['step']}")
    return ", ".join(parts)


def of_facts(found: dict[str, Any]) -> str:
    return "; ".join(f"{name} {found['facts'][name]}" for name in FACTS)


def of_rows(found: dict[str, Any]) -> str:
    return "; ".join(row_in_a_line(row) for row in found["results"])


def row_in_a_line(row: dict[str, Any]) -> str:
    """Format a row of step.py, model.py, peers.py, kernel_times.py or dali_check.py."""
    if "check" in row:
        return f"{row['check']}: {row['found']}"
    if "kernels ms" in row:
        return f"{row['model']} {row['way']} {row['kernels ms']:.1f} ms of kernels in {row['ms']:.1f} ms"
    names = [row[key] for key in ("model", "mode", "way", "compiled") if row.get(key)]
    rates = [f"{key.removesuffix('images/s')}{value:,.0f}" for key, value in row.items() if key.endswith("images/s")]
    ratios = [f"{value:.2f} {key}" for key, value in row.items() if key.startswith("to fat")]
    return " ".join([*names, row.get("failed") or ", ".join([*rates, *ratios])])


# Formatter by a key that identifies the benchmark; the first key that is found is used.
KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "verdict": of_bench,
    "recipes": of_augmentation,
    "training": of_training,
    "facts": of_facts,
    "decoders": of_decoders,
    "medians": of_decoding,
    "copy GB/s": of_kernels,
    "results": of_rows,
}
