"""Store the results of `benchmarks/gpu.py` in a work folder, and copy them atomically to the output folder."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_run.report import summary
from shards.files.durable import TEMPORARY, durable_write

Result = dict[str, Any]
COPY_EVERY = 15.0  # seconds between copies to the output folder
LARGEST = 8 << 20  # maximum bytes of a file in the archive, which excludes checkpoints
FILE, TABLE, ARCHIVE = "gpu.json", "gpu.md", "results.tar.gz"


class Results:
    """The newest result of each part, by device.

    Args:
        work: work folder on this machine; its gpu.json is written whenever a part starts or ends.
        out: folder for copies: gpu.json, gpu.md and results.tar.gz, each replaced atomically. The results of an
            existing gpu.json are kept, so that a run can continue on another machine with this file.
        device: device of this run.
        sources: digest of the current source files.
    """

    def __init__(self, work: Path, out: Path, device: str, sources: str) -> None:
        self.work, self.out, self.device, self.sources = work, out, device, sources
        self.parts = work / "parts" / "".join(c if c.isalnum() else "-" for c in device)
        self.parts.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        for folder in (work, out):
            for file in (FILE, TABLE, ARCHIVE):
                for leftover in folder.glob(f".{file}.*{TEMPORARY}"):  # temporary file of a run that was killed
                    leftover.unlink()
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._devices: dict[str, dict[str, Result]] = {}
        for folder in (out, work):
            for name, results in read(folder / FILE).items():
                known = self._devices.setdefault(name, {})
                known |= {p: r for p, r in results.items() if p not in known or known[p]["at"] <= r["at"]}
        self.here = self._devices.setdefault(device, {})
        for name, result in self.here.items():  # restore the result files, which later parts read
            if "figures" in result and not (figures := self.parts / f"{name}.json").exists():
                figures.write_text(json.dumps(result["figures"], indent=1))

    def passed(self, name: str) -> bool:
        """Return whether a part has passed on this device with the current sources."""
        result = self.here.get(name, {})
        return result.get("state") == "passed" and result["sources"] == self.sources

    def record(self, name: str, result: Result) -> None:
        """Store the new result of a part. `copied` will copy it to the output folder."""
        with self._lock:
            self.here[name] = result | {"sources": self.sources, "at": time.time()}
            durable_write(self.work / FILE, self._json())
        self._news.set()

    def copy(self) -> None:
        """Write the three files of the output folder."""
        with self._lock:
            files = {FILE: self._json(), TABLE: self._table()}
        for name, content in files.items():
            durable_write(self.out / name, content)
        durable_write(self.out / ARCHIVE, archive(self.work / "parts", files))

    @contextlib.contextmanager
    def copied(self) -> Iterator[None]:
        """Copy the results at the start of the block, after every new result, every 15 s, and at the end."""
        ended = threading.Event()

        def copy_regularly() -> None:
            while True:
                self._news.wait(COPY_EVERY)
                self._news.clear()
                if ended.is_set():
                    return
                try:
                    self.copy()
                except OSError as error:  # the next copy may succeed, for example after the disk was full
                    print(f"warning: cannot copy the results to {self.out}: {error}", file=sys.stderr, flush=True)

        self.copy()
        thread = threading.Thread(target=copy_regularly, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            self._news.set()
            thread.join()
            self.copy()

    def _json(self) -> bytes:
        return (json.dumps({"devices": self._devices}, indent=1) + "\n").encode()

    def _table(self) -> bytes:
        lines = ["# GPU results"]
        for device, results in self._devices.items():
            machines = [", ".join(f"{key} {value}" for key, value in r["machine"].items()) for r in results.values()]
            lines += ["", f"## {device}", "", *dict.fromkeys(machines), "", "| part | s | result |", "|-|-|-|"]
            for name, result in results.items():
                older = "" if result["sources"] == self.sources else f" (other source files, {result['sources']})"
                lines.append(f"| {name} | {result['seconds']:.0f} | {summary(result).replace('|', '/')}{older} |")
        return ("\n".join(lines) + "\n").encode()


def read(file: Path) -> dict[str, dict[str, Result]]:
    """Read results by device and part from a gpu.json; return an empty dict if it does not exist."""
    try:
        found: dict[str, dict[str, Result]] = json.loads(file.read_text(encoding="utf-8"))["devices"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError):
        print(f"warning: {file}: not a results file of this script; it will be replaced", file=sys.stderr)
        return {}
    return found


def archive(folder: Path, files: dict[str, bytes]) -> bytes:
    """Return a .tar.gz of `files` and of the files in a folder. Each is read only once, because it may be changing."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz", compresslevel=3) as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_size <= LARGEST:
                    add(tar, str(path.relative_to(folder.parent)), path.read_bytes())
        for name, content in files.items():
            add(tar, name, content)
    return sink.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = len(content), int(time.time())
    tar.addfile(entry, io.BytesIO(content))
