"""Converting a million images needs at most 500 MB of memory, and 100 MB per worker."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from shards.format.tar import END, header, padding
from tests.support.conversions import DRIVER, workers_of

MAIN_MB, WORKER_MB = 500, 100
CLASSES, EACH = 1000, 1000

LISTING = f"""
import re, sys
from pathlib import Path
from shards.sources.listing import Container, Listing, ListingBuilder
from shards.convert.conversion_plan import assign_to_shards
builder = ListingBuilder()
for c in range({CLASSES}):
    folder = Path(f"/data/imagenet/train/n{{c:08d}}")
    found = [(f"n{{c:08d}}/n{{c:08d}}_{{i}}.JPEG".encode(), 100_000 + i, 1_600_000_000, c) for i in range({EACH})]
    builder.add_files(Container(folder, 0, 0), found)
listing, bounds = assign_to_shards(builder.build(), "train", 0, 256 * 2**20)
listing.save(Path(sys.argv[1]) / "train.listing")
loaded = Listing.load(Path(sys.argv[1]) / "train.listing")
assert len(loaded) == {CLASSES * EACH}
assert sum(len(entry.name) for entry in loaded.entries(0, int(bounds[1]))) > 20 * bounds[1]
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
"""


def test_memory_of_a_listing_of_a_million_images(tmp_path: Path) -> None:
    # VmHWM instead of getrusage, in which Linux includes the memory of the parent before exec.
    done = subprocess.run([sys.executable, "-c", LISTING, tmp_path], capture_output=True, text=True, check=True)
    assert float(done.stdout) < MAIN_MB


def write_million(path: Path) -> None:
    """Write a tar like ImageNet's training tar, with images of one pixel."""
    out = io.BytesIO()
    Image.new("L", (1, 1)).save(out, "JPEG")
    image = out.getvalue()
    with path.open("wb") as file:
        for c in range(CLASSES):
            synset = f"n{c:08d}"
            members = [header(f"{synset}_{i}.JPEG", len(image)) + image + padding(len(image)) for i in range(EACH)]
            inner = b"".join(members) + END
            file.write(header(f"{synset}.tar", len(inner)) + inner + padding(len(inner)))
        file.write(END)


def own_memory_mb(pid: int) -> float:
    """Return the resident anonymous memory of a process, without file pages, which the system can reclaim."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) / 1024
    except (FileNotFoundError, ProcessLookupError, KeyError):
        return 0.0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_of_converting_a_million_images(tmp_path: Path) -> None:
    write_million(tmp_path / "ILSVRC2012_img_train.tar")
    command = [sys.executable, "-c", DRIVER, str(tmp_path), "--out", str(tmp_path / "set"), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    peaks: dict[int, float] = {}
    while process.poll() is None:
        try:
            pids = [process.pid, *workers_of(process.pid)]
        except FileNotFoundError:
            break
        for pid in pids:
            peaks[pid] = max(peaks.get(pid, 0), own_memory_mb(pid))
        time.sleep(0.2)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "1,000,000 train images" in stdout
    assert peaks.pop(process.pid) < MAIN_MB
    assert len(peaks) == 2
    assert max(peaks.values()) < WORKER_MB
    shutil.rmtree(tmp_path)  # 3 GB
