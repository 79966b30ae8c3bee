"""Everything that needs a GPU, tests then benchmarks, in a bounded time; called again, it goes on where it stopped.

    python benchmarks/gpu.py --out DIR [--minutes 8] [--only NAME ...]

Needs neither an installed project nor a virtual environment: this Python with its packages is used as it is. A part
whose whole result for these very sources lies in DIR is not run again; one that did not end is. DIR/gpu.json holds all
results with machine, versions and commit, DIR/gpu.md is a table of them, DIR/parts/ each part's own JSON and output.
Exit status: 0 all parts have passed, 1 some failed, 2 no GPU, 3 time was up before all had their turn.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "nvidia-dali-cuda120", "accelerate", "deepspeed", "ffcv", "timm", "numpy")
SHOWN_LINES = 12
WHOLE_CALL = 460.0  # seconds: what a call of 8 minutes has
LEAST_SECONDS = 20.0  # with less time left, a part is left to the next call
BAD_INPUT, TIME_IS_UP = 2, 3
FAT = ("fat_b0", "fat_b1", "fat_b2", "fat_b3")
TIMM = ("swin_tiny_patch4_window7_224", "convnext_tiny", "efficientnet_b0", "repvit_m1")


@dataclass(frozen=True)
class Part:
    """One thing to run."""

    name: str
    command: tuple[str, ...]
    """Arguments of Python; {out} is the JSON file that it writes, {work} a folder that parts share."""
    limit: float = 240.0
    """Seconds."""
    needs: tuple[str, ...] = ()
    """Modules without which it is left out."""


def parts() -> list[Part]:
    """In order: tests, then what is cheap and tells most."""
    pytest = ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider")
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    # Each of its tests starts training several times: together they would outlast a call.
    whole = [str(path.relative_to(ROOT)) for path in files if path.stem != "test_training"]
    launches = re.findall(
        r"^def (test_\w+)", (ROOT / "tests/gpu/test_training.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    step = ("benchmarks/step.py", "--rounds", "5", "--out", "{out}", "--models")
    bench = ("-m", "pipeline.cli", "bench", "{work}/photos-shards", "--json", "{out}", "--chart")
    eager = ("--ways", "contiguous", "channels-last", "graph")
    return [
        *(Part(f"test {Path(test).stem[5:]}", (*pytest, test), limit=WHOLE_CALL) for test in whole),
        Part("test augmentation", (*pytest, "tests/unit/test_augment_pixels.py")),
        *(
            Part(f"train {name[5:]}", (*pytest, f"tests/gpu/test_training.py::{name}"), limit=WHOLE_CALL)
            for name in launches
        ),
        Part("kernels", ("benchmarks/kernels.py", "--out", "{out}")),
        Part("photos", ("-m", "pipeline.cli", "sample", "photos", "{work}/photos", "--count", "2000")),
        Part(
            "shards",
            ("-m", "pipeline.cli", "shard", "{work}/photos", "--out", "{work}/photos-shards", "--shard-size", "32"),
        ),
        Part("decode", ("benchmarks/decode.py", "--rounds", "3", "--data", "{work}", "--out", "{out}")),
        *(Part(f"bench {v[4:]}", (*bench, f"{{work}}/{v}.png", "--variant", v[4:])) for v in FAT),
        *(Part(f"step {name}", (*step, name, *eager)) for name in FAT),
        *(Part(f"step {name}", (*step, name, *eager), needs=("timm",)) for name in TIMM),
        *(
            Part(
                f"compiled {name}",
                (*step, name, "--ways", "channels-last", "compiled", "compiled graph"),
                limit=WHOLE_CALL,
            )
            for name in FAT
        ),
        *(
            Part(
                f"compiled {name}",
                (*step, name, "--ways", "channels-last", "compiled", "compiled graph"),
                needs=("timm",),
            )
            for name in TIMM
        ),
        Part("augmentation", ("benchmarks/augment.py", "--device", "cuda", "--out", "{out}")),
        Part("loaders", ("benchmarks/loader.py", "--rounds", "3", "--out", "{out}")),
        *(
            Part(
                f"inference {name}",
                ("benchmarks/model.py", "--rounds", "5", "--variants", name, "--out", "{out}"),
                limit=WHOLE_CALL,
            )
            for name in FAT
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=8.0, help="end by then; the next call goes on")
    parser.add_argument("--only", nargs="+", help="parts by the start of their names")
    parser.add_argument("--cpu", action="store_true", help="run without a GPU: to see that the script itself works")
    options = parser.parse_args()
    if not options.cpu and not has_gpu():
        print(f"error: {sys.executable} finds no CUDA device (torch.cuda.is_available() is False)", file=sys.stderr)
        return BAD_INPUT
    deadline = time.monotonic() + 60 * options.minutes
    sources = digest_of_sources()
    folder = options.out.absolute() / "parts"
    work = folder / f"work-{sources}"  # what other sources have made there may be half done, or no longer right
    work.mkdir(parents=True, exist_ok=True)
    chosen = [p for p in parts() if not options.only or p.name.startswith(tuple(options.only))]
    results: dict[str, dict[str, Any]] = {}
    for part in chosen:
        path = folder / f"{part.name.replace(' ', '-')}.json"
        results[part.name] = earlier(path, sources) or run(part, path, sources, work, deadline)
        print(f"{part.name:40} {summary(results[part.name])}", flush=True)
        write(options.out, sources, results)
    states = {result["state"] for result in results.values()}
    return 1 if "failed" in states else TIME_IS_UP if states & {"time was up", "not run"} else 0


def earlier(path: Path, sources: str) -> dict[str, Any] | None:
    """The result of an earlier call for these sources, if it came to an end."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if result.get("sources") == sources and result["state"] in {"passed", "left out"} else None


def run(part: Part, path: Path, sources: str, work: Path, deadline: float) -> dict[str, Any]:
    """Run a part and keep its result."""
    missing = [name for name in part.needs if subprocess.call([sys.executable, "-c", probe(name)]) != 0]
    left = deadline - time.monotonic()
    result: dict[str, Any] = {"name": part.name, "sources": sources, "seconds": 0.0}
    if missing:
        result |= {"state": "left out", "tail": f"{', '.join(missing)} cannot be imported here"}
    elif left < LEAST_SECONDS:
        result |= {"state": "not run", "tail": "time was up; call again"}
    else:
        out = path.with_suffix(".out.json")
        out.unlink(missing_ok=True)
        command = [word.format(out=out, work=work) for word in part.command]
        start = time.monotonic()
        status, text = finish([sys.executable, *command], min(part.limit, left))
        short = min(part.limit, left) < part.limit
        state = "passed" if status == 0 else "failed" if status is not None or not short else "time was up"
        result |= {"state": state, "status": status, "seconds": round(time.monotonic() - start, 1)}
        result |= {"command": part.command, "tail": "\n".join(text.strip().splitlines()[-SHOWN_LINES:])}
        if out.exists():
            result["figures"] = json.loads(out.read_text(encoding="utf-8"))
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def finish(command: list[str], seconds: float) -> tuple[int | None, str]:
    """(exit status, or None if it did not end in time; what it printed). Ends its children too."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=seconds)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        text, _ = process.communicate()
        return None, text


def probe(name: str) -> str:
    return f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"


def digest_of_sources() -> str:
    """Of every file that could change a result, committed or not."""
    digest = hashlib.sha256()
    for path in sorted(path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith(".")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """Commit, and whether files differ from it; empty outside a repository."""
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return asked.stdout.strip()


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def machine() -> dict[str, Any]:
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": gpus, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), **versions}


def summary(result: dict[str, Any]) -> str:
    """A result in a line: what it found, or how it ended."""
    found, text = result.get("figures"), f"{result['state']}, {result['seconds']:.0f} s"
    if result["state"] != "passed":
        last = result["tail"].splitlines()
        return f"{text}: {last[-1] if last else ''}"
    if found is None:
        return f"{text}: {result['tail'].splitlines()[-1] if result['tail'] else ''}"
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
    rows = found.get("results", [])
    shown = [
        f"{row['mode']} {row['way']} {row.get('failed') or format(row['images/s'], ',.0f')}"
        for row in rows
        if "mode" in row
    ]
    return "; ".join(shown) or text


def write(out: Path, sources: str, results: dict[str, dict[str, Any]]) -> None:
    """gpu.json and gpu.md, anew."""
    about = {"commit": commit(), "sources": sources, "machine": machine()}
    (out / "gpu.json").write_text(json.dumps({**about, "parts": results}, indent=1) + "\n", encoding="utf-8")
    where = ", ".join(f"{key} {value}" for key, value in about["machine"].items())
    lines = ["# GPU", "", f"commit {about['commit']}, sources {sources}; {where}", "", "| part | result |", "|-|-|"]
    lines += [f"| {name} | {summary(result).replace('|', '/')} |" for name, result in results.items()]
    (out / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
