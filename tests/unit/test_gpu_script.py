"""`make gpu` in itself: it goes on where it stopped, keeps to its time, and survives what fails or is missing."""

from __future__ import annotations

import json
import sys
from io import FileIO
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import gpu, gpu_report
from benchmarks.gpu import Part
from shards import durable

# Writes a letter more to a file at each run.
COUNT = "import pathlib, sys; file = pathlib.Path(sys.argv[1], sys.argv[2]); file.open('a').write('x')"


def run(patch: pytest.MonkeyPatch, out: Path, parts: list[Part], *options: str) -> tuple[int, dict[str, Any]]:
    patch.setattr(gpu, "parts", lambda: parts)
    patch.setattr(sys, "argv", ["gpu.py", "--cpu", "--out", str(out), *options])
    status = gpu.main()
    parts_of = json.loads((out / "gpu.json").read_text())["parts"]
    return status, parts_of[gpu.device_of(gpu.machine())]


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Part("good", ("-c", COUNT, str(tmp_path), "good-runs"))
    bad = Part("bad", ("-c", "print('why it failed'); raise SystemExit(5)"))
    absent = Part("absent", ("-c", ""), needs=("no_such_module",))
    status, parts = run(monkeypatch, tmp_path, [good, bad, absent])
    assert status == 1
    assert [part["state"] for part in parts.values()] == ["passed", "failed", "left out"]
    assert parts["bad"]["tail"] == "why it failed"
    mended = Part("bad", ("-c", COUNT, str(tmp_path), "mended-runs"))
    status, parts = run(monkeypatch, tmp_path, [good, mended, absent])
    assert status == 0
    assert (tmp_path / "good-runs").read_text() == (tmp_path / "mended-runs").read_text() == "x"


def test_it_goes_on_from_its_json_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine: what one part has made there for another is made anew."""
    made = COUNT + "; pathlib.Path(sys.argv[3]).mkdir()"
    maker = Part("maker", ("-c", made, str(tmp_path), "maker-runs", "{work}/made"), makes="made")
    good = Part("good", ("-c", COUNT, str(tmp_path), "good-runs"))
    for out in ("one", "other"):
        (tmp_path / out).mkdir()
        if out == "other":
            (tmp_path / "one" / "gpu.json").rename(tmp_path / "other" / "gpu.json")
        status, parts = run(monkeypatch, tmp_path / out, [maker, good])
        assert (status, list(parts)) == (0, ["maker", "good"])
    assert (tmp_path / "maker-runs").read_text() == "xx"
    assert (tmp_path / "good-runs").read_text() == "x"


def test_a_few_parts_leave_the_others_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = [Part("one", ("-c", "")), Part("other", ("-c", ""))]
    for name in ("one", "other"):
        _, parts = run(monkeypatch, tmp_path, two, "--only", name)
    assert [(name, part["state"]) for name, part in parts.items()] == [("one", "passed"), ("other", "passed")]


def test_other_sources_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Part("good", ("-c", COUNT, str(tmp_path), "runs"))
    for sources in ("one", "one", "other"):
        monkeypatch.setattr(gpu, "digest_of_sources", lambda sources=sources: sources)
        run(monkeypatch, tmp_path, [good])
    assert (tmp_path / "runs").read_text() == "xx"


def test_what_passed_elsewhere_has_not_passed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another GPU, or none: each has its own results, with the machine that they are of."""
    good = Part("good", ("-c", COUNT, str(tmp_path), "runs"))
    for gpus, cores in (([], 1), (["H100"], 2), (["H200"], 3), (["H100"], 4), ([], 5)):
        about = {"gpus": gpus, "cores": cores}
        monkeypatch.setattr(gpu, "machine", lambda about=about: about)
        run(monkeypatch, tmp_path, [good])
    assert (tmp_path / "runs").read_text() == "xxx"
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {device: results["good"]["machine"]["cores"] for device, results in found.items()} == {
        "cpu": 1, "H100": 2, "H200": 3,
    }  # fmt: skip
    table = (tmp_path / "gpu.md").read_text()
    assert [line for line in table.splitlines() if line.startswith("## ")] == ["## cpu", "## H100", "## H200"]
    assert "gpus ['H100'], cores 2" in table
    assert "cores 4" not in table


def test_what_was_found_survives_an_end_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, tmp_path, [Part("one", ("-c", ""))])
    before, real = (tmp_path / "gpu.json").read_text(), durable.write_all

    def ended(file: FileIO, content: bytes) -> None:
        real(file, content[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(durable, "write_all", ended)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, [Part("other", ("-c", ""))])
    assert (tmp_path / "gpu.json").read_text() == before


def test_it_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = Part("endless", ("-c", "import time; time.sleep(60)"), least=0.5)
    late = Part("late", ("-c", ""), least=0.5)
    status, parts = run(monkeypatch, tmp_path, [endless, late], "--minutes", "0.04")
    assert status == gpu.TIME_IS_UP
    assert [part["state"] for part in parts.values()] == ["time was up", "not run"]
    assert parts["endless"]["seconds"] < 10


def test_what_would_not_come_to_its_end_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = Part("long", ("-c", ""), least=100), Part("short", ("-c", ""), least=0)
    status, parts = run(monkeypatch, tmp_path, [long, short], "--minutes", "1")
    assert status == gpu.TIME_IS_UP
    assert [part["state"] for part in parts.values()] == ["not run", "passed"]


def test_children_in_sessions_of_their_own_end_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = "import subprocess, sys; subprocess.run(['sleep', '61.25'], start_new_session=True)"
    _, parts = run(monkeypatch, tmp_path, [Part("launches", ("-c", child), limit=1.0)])
    assert parts["launches"]["state"] == "failed"
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "61.25"]]


def test_a_part_that_hangs_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, parts = run(monkeypatch, tmp_path, [Part("hangs", ("-c", "import time; time.sleep(60)"), limit=0.5)])
    assert (status, parts["hangs"]["state"]) == (1, "failed")
    assert parts["hangs"]["tail"] == "ended after 0 s"


def test_figures_end_up_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"results": [{"mode": "training", "way": "graph", "images/s": 1234.5}]}
    write = f"import pathlib, sys; pathlib.Path(sys.argv[1]).write_text({json.dumps(rows)!r})"
    run(monkeypatch, tmp_path, [Part("step", ("-c", write.replace("{", "{{").replace("}", "}}"), "{out}"))])
    assert "| step | training graph 1,234 |" in (tmp_path / "gpu.md").read_text()


def test_every_benchmark_is_said_in_a_line() -> None:
    shares = [{"kernel": "a", "ours": {"us": 1.0, "share": share}} for share in (0.5, 0.75, 1.0)]
    kernels = {"copy GB/s": 4000.0, "results": shares}
    assert gpu_report.said(kernels) == "copy 4,000 GB/s; 3 kernels, shares of it: ours 0.75 (0.50 to 1.00)"
    inference = {"results": [{"variant": "b0", "way": "fused", "inference images/s": 9000.4}]}
    assert gpu_report.said(inference) == "fused inference 9,000"
    failed = {"results": [{"mode": "training", "way": "graph", "failed": "OutOfMemoryError: no room"}]}
    assert gpu_report.said(failed) == "training graph OutOfMemoryError: no room"


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    assert gpu.main() == gpu.BAD_INPUT
    assert "no CUDA device" in capsys.readouterr().err


def test_every_part_names_files_that_exist() -> None:
    for part in gpu.parts():
        for word in part.command:
            if word.endswith(".py"):
                assert (gpu.ROOT / word).is_file(), part
