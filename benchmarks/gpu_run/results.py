"""Keep the results of `benchmarks/gpu.py` in a work folder, and copy them so that no kill leaves half a file."""

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
COPY_EVERY = 15.0  # seconds between two copies to the output folder
LARGEST = 8 << 20  # bytes of a file in the archive: outputs and figures are smaller, checkpoints larger
FILE, TABLE, ARCHIVE = "gpu.json", "gpu.md", "results.tar.gz"


class Results:
    """Results by device and part; of several for the same part, the newest counts.

    Args:
        work: folder of this machine; gpu.json there is written whenever a part begins or ends.
        out: folder of the copies: gpu.json, gpu.md and results.tar.gz, each of which is replaced atomically. What its
            gpu.json holds is taken over, so that it is all that another machine needs to continue.
        device: on which parts run now.
        sources: digest of the sources that run now.
    """

    def __init__(self, work: Path, out: Path, device: str, sources: str) -> None:
        self.work, self.out, self.device, self.sources = work, out, device, sources
        self.parts = work / "parts" / "".join(c if c.isalnum() else "-" for c in device)
        self.parts.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        for folder in (work, out):
            for file in (FILE, TABLE, ARCHIVE):
                for leftover in folder.glob(f".{file}.*{TEMPORARY}"):  # of a call that was killed
                    leftover.unlink()
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._devices: dict[str, dict[str, Result]] = {}
        for folder in (out, work):
            for name, results in read(folder / FILE).items():
                known = self._devices.setdefault(name, {})
                known |= {p: r for p, r in results.items() if p not in known or known[p]["at"] <= r["at"]}
        self.here = self._devices.setdefault(device, {})
        for name, result in self.here.items():  # later parts read the figures of earlier ones
            if "figures" in result and not (figures := self.parts / f"{name}.json").exists():
                figures.write_text(json.dumps(result["figures"], indent=1))

    def passed(self, name: str) -> bool:
        """Whether a part has passed on this device with these sources."""
        result = self.here.get(name, {})
        return result.get("state") == "passed" and result["sources"] == self.sources

    def record(self, name: str, result: Result) -> None:
        """Keep a part's new result; `copied` copies it soon."""
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
        """Copy at the start, after every new result, every 15 s, and at the end of the block, however it ends."""
        ended = threading.Event()

        def copy_regularly() -> None:
            while True:
                self._news.wait(COPY_EVERY)
                self._news.clear()
                if ended.is_set():
                    return
                try:
                    self.copy()
                except OSError as error:  # such as a full disk, which may have room again later
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
                older = "" if result["sources"] == self.sources else f" (of other sources, {result['sources']})"
                lines.append(f"| {name} | {result['seconds']:.0f} | {summary(result).replace('|', '/')}{older} |")
        return ("\n".join(lines) + "\n").encode()


def read(file: Path) -> dict[str, dict[str, Result]]:
    """Results by device and part in a gpu.json; none where there is no such file."""
    try:
        found: dict[str, dict[str, Result]] = json.loads(file.read_text(encoding="utf-8"))["devices"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError):
        print(f"warning: {file} is no results file of this script; it is replaced", file=sys.stderr)
        return {}
    return found


def archive(folder: Path, files: dict[str, bytes]) -> bytes:
    """A .tar.gz of these files and of the folder's. Files may change meanwhile: each is read once, as it is then."""
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
