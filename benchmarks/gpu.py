"""Everything that needs a GPU, tests then benchmarks, in a bounded time; called again, it goes on where it stopped.

    python benchmarks/gpu.py --out DIR [--minutes 8] [--only NAME ...]

Needs neither an installed project nor a virtual environment: this Python with its packages is used as it is.
DIR/gpu.json holds all results by GPU, each with its machine and versions, and is all that a later call needs to go on,
on whatever machine: a part that has come to its end with these very sources on such a GPU is not run again. DIR/gpu.md
is a table of it, DIR/parts/ has each part's whole output. Exit status: 0 all parts have passed, 1 some failed, 2 no
GPU, 3 time was up before all had their turn.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_report import summary
from shards.durable import durable_write

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "nvidia-dali-cuda120", "accelerate", "deepspeed", "ffcv", "timm", "numpy")
SHOWN_LINES, FAILED_LINES = 12, 200  # of a part's output, in gpu.json
WHOLE_CALL = 460.0  # seconds: what a call of 8 minutes has
LEAST_SECONDS = 20.0  # with less time left, a part is left to the next call, if it does not say otherwise
GRACE = 10.0  # seconds for killed processes to be gone
BAD_INPUT, TIME_IS_UP = 2, 3
EAGER = ("contiguous", "library", "channels-last", "graph", "graph conv1x1")
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
    least: float = LEAST_SECONDS
    """With fewer seconds left, it is left to the next call: what is ended halfway has to begin anew."""
    makes: str = ""
    """What it leaves in {work} for others; it is run again where that is gone."""
    needs: tuple[str, ...] = ()
    """Modules without which it is left out."""


def parts() -> list[Part]:
    """In order: what tells most comes first."""
    pytest = ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider")
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    tests = {
        path.stem[5:]: Part(f"test {path.stem[5:]}", (*pytest, str(path.relative_to(ROOT))), limit=WHOLE_CALL, least=60)
        for path in files
    }
    # Each of its tests starts training several times: together they would outlast a call.
    del tests["training"]
    launches = re.findall(
        r"^def (test_\w+)", (ROOT / "tests/gpu/test_training.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    bench = ("-m", "pipeline.cli", "bench", "{work}/photos-shards", "--json", "{out}", "--chart")
    benches = {v: Part(f"bench {v[4:]}", (*bench, f"{{work}}/{v}.png", "--variant", v[4:]), least=60) for v in FAT}
    step = ("benchmarks/step.py", "--rounds", "5", "--out", "{out}", "--models")
    compiled = {
        name: Part(
            f"compiled {name}",
            (*step, name, "--ways", "channels-last", "compiled", "compiled graph"),
            limit=WHOLE_CALL,
            least=120,
            needs=() if name in FAT else ("timm",),
        )
        for name in (*FAT, *TIMM)
    }
    smallest, *between, largest = FAT
    return [
        tests.pop("kernels"),
        Part("kernels", ("benchmarks/kernels.py", "--out", "{out}"), limit=WHOLE_CALL, least=60),
        *(Part(f"step {name}", (*step, name, "--ways", *EAGER), least=40) for name in FAT),
        compiled[smallest],
        Part("photos", ("-m", "pipeline.cli", "sample", "photos", "{work}/photos", "--count", "2000"), makes="photos"),
        Part(
            "shards",
            ("-m", "pipeline.cli", "shard", "{work}/photos", "--out", "{work}/photos-shards", "--shard-size", "32"),
            makes="photos-shards",
        ),
        Part("decode", ("benchmarks/decode.py", "--rounds", "3", "--data", "{work}", "--out", "{out}"), least=90),
        benches[smallest],
        benches[largest],
        *tests.values(),
        Part("test augmentation", (*pytest, "tests/unit/test_augment_pixels.py"), least=40),
        compiled[largest],
        *(part for name in between for part in (benches[name], compiled[name])),
        *(
            Part(f"train {name[5:]}", (*pytest, f"tests/gpu/test_training.py::{name}"), limit=WHOLE_CALL, least=100)
            for name in launches
        ),
        *(Part(f"step {name}", (*step, name, "--ways", *EAGER), needs=("timm",)) for name in TIMM),
        *(compiled[name] for name in TIMM),
        Part("augmentation", ("benchmarks/augment.py", "--device", "cuda", "--out", "{out}")),
        Part("loaders", ("benchmarks/loader.py", "--rounds", "3", "--data", "{work}", "--out", "{out}"), least=60),
        *(
            Part(
                f"inference {name}",
                ("benchmarks/model.py", "--rounds", "5", "--variants", name, "--out", "{out}"),
                limit=WHOLE_CALL,
                least=120,
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
    here = machine()
    device = device_of(here)
    folder = options.out.absolute() / "parts"
    work = folder / f"work-{sources}"  # what other sources have made there may be half done, or no longer right
    work.mkdir(parents=True, exist_ok=True)
    outputs = folder / re.sub(r"\W+", "-", device)
    outputs.mkdir(exist_ok=True)
    everything = earlier(options.out, sources)
    results = everything.setdefault(device, {})
    chosen = [p for p in parts() if not options.only or p.name.startswith(tuple(options.only))]
    for part in chosen:
        if results.get(part.name, {}).get("state") not in {"passed", "left out"} or not (work / part.makes).exists():
            results[part.name] = run(part, outputs / part.name.replace(" ", "-"), work, deadline) | {"machine": here}
        print(f"{part.name:40} {summary(results[part.name])}", flush=True)
        write(options.out, sources, everything)
    states = {results[part.name]["state"] for part in chosen}
    return 1 if "failed" in states else TIME_IS_UP if states & {"time was up", "not run"} else 0


def earlier(out: Path, sources: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The results of earlier calls for these sources, by device and part."""
    try:
        found = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found["parts"] if found.get("sources") == sources else {}


def run(part: Part, path: Path, work: Path, deadline: float) -> dict[str, Any]:
    """Run a part. Its whole output goes to `path`.txt, its figures through `path`.json."""
    missing = [name for name in part.needs if subprocess.call([sys.executable, "-c", probe(name)]) != 0]
    left = deadline - time.monotonic()
    if missing:
        return {"state": "left out", "seconds": 0.0, "tail": f"{', '.join(missing)} cannot be imported here"}
    if left < part.least:
        return {"state": "not run", "seconds": 0.0, "tail": "time was up; call again"}
    out, output = path.with_suffix(".json"), path.with_suffix(".txt")
    out.unlink(missing_ok=True)
    if part.makes:
        shutil.rmtree(work / part.makes, ignore_errors=True)
    command = [word.format(out=out, work=work) for word in part.command]
    start = time.monotonic()
    seconds = min(part.limit, left)
    status = finish([sys.executable, *command], seconds, output)
    state = "passed" if status == 0 else "failed" if status is not None or part.limit <= left else "time was up"
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if status is None:
        lines.append(f"ended after {seconds:.0f} s")
    result = {
        "state": state,
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "command": part.command,
        "tail": "\n".join(lines[-SHOWN_LINES if state == "passed" else -FAILED_LINES :]),
    }
    with contextlib.suppress(FileNotFoundError, ValueError):  # a part that did not come to its end has some, too
        result["figures"] = json.loads(out.read_text(encoding="utf-8"))
    return result


def finish(command: list[str], seconds: float, output: Path) -> int | None:
    """Exit status, or None if it did not end in time. Ends its children too, in whatever session they are."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with output.open("wb") as sink:
        process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        try:
            return int(process.wait(timeout=seconds))
        except psutil.TimeoutExpired:
            family = [process, *process.children(recursive=True)]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family, timeout=GRACE)
            return None


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


def device_of(about: dict[str, Any]) -> str:
    """What a machine's results count for."""
    return ", ".join(about["gpus"]) or "cpu"


def write(out: Path, sources: str, everything: dict[str, dict[str, dict[str, Any]]]) -> None:
    """gpu.json and gpu.md, anew."""
    about = {"commit": commit(), "sources": sources}
    durable_write(out / "gpu.json", (json.dumps({**about, "parts": everything}, indent=1) + "\n").encode())
    lines = ["# GPU", "", f"commit {about['commit']}, sources {sources}"]
    for device, results in everything.items():
        machines = [", ".join(f"{key} {value}" for key, value in row["machine"].items()) for row in results.values()]
        lines += ["", f"## {device}", "", *dict.fromkeys(machines), "", "| part | result |", "|-|-|"]
        lines += [f"| {name} | {summary(result).replace('|', '/')} |" for name, result in results.items()]
    durable_write(out / "gpu.md", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
