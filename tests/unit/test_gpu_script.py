"""`make gpu` (benchmarks/gpu.py) respects its time limit, keeps results when it is killed, and continues when rerun."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import tyro

from benchmarks import gpu
from benchmarks.gpu_run import parts as table
from benchmarks.gpu_run import report, runner
from benchmarks.gpu_run.parts import Part
from benchmarks.gpu_run.results import FILE, Results
from launch import cli
from launch.config import command_line
from shards.files import durable

# Appends a letter to a file in each run.
COUNT = "import pathlib, sys; file = pathlib.Path(sys.argv[1], sys.argv[2]); file.open('a').write('x')"
PROFILE = "contact"


def part(name: str, *command: str, **settings: Any) -> Part:
    """Return a part that runs Python with these arguments."""
    return Part(
        **{"name": name, "profile": PROFILE, "commands": (("python", *command),), "expected": 20, "least": 0} | settings
    )


def counted(name: str, folder: Path, **settings: Any) -> Part:
    return part(name, "-c", COUNT, str(folder), f"{name}-runs", **settings)


def run(patch: pytest.MonkeyPatch, folder: Path, parts: Sequence[Part], *options: str) -> tuple[int, dict[str, Any]]:
    """Run the script with separate output and work folders; return its exit status and the results by part."""
    patch.setattr(gpu, "parts", lambda: list(parts))
    patch.setattr(gpu, "START", time.monotonic())
    patch.setenv("TRITON_CACHE_DIR", str(folder / "triton-cache"))
    where = ("--out", str(folder / "out"), "--work", str(folder / "work"))
    patch.setattr(sys, "argv", ["gpu.py", "--cpu", *where, *options])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = gpu.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    results = json.loads((folder / "out" / "gpu.json").read_text())["devices"]
    return status, results[gpu.device_of(gpu.machine())]


# -- the table ---------------------------------------------------------------------------------------------------------


def expected(profile: str) -> float:
    """Return the expected seconds of a profile; of parallel parts, the longest chain counts."""
    groups = runner.groups([part for part in table.parts() if part.profile == profile])
    return sum(table.longest_chain(group) for group in groups)


def test_contact_and_measure_are_expected_to_fit_into_the_budget() -> None:
    assert expected("contact") <= 230
    assert expected("contact") + expected("measure") <= table.BUDGET == 590


def test_the_longest_chain_respects_the_order_of_parallel_parts() -> None:
    first, other = part("a", expected=3), part("b", expected=5)
    assert table.longest_chain([first, other]) == 5
    assert table.longest_chain([first, other, part("c", expected=4, after=("a",))]) == 7


def test_every_part_is_consistent() -> None:
    parts = table.parts()
    names = [part.name for part in parts]
    assert len(names) == len(set(names))
    made = {path for part in parts for path in part.makes}
    for number, part in enumerate(parts):
        assert part.least <= part.expected <= part.limit == max(2 * part.expected, 30)
        assert set(part.uses) <= made
        assert set(part.after) <= set(names[:number])
        assert not part.after or part.together
        assert part.profile in table.PROFILES


def test_every_part_names_files_and_tests_that_exist() -> None:
    for part in table.parts():
        for word in (word for command in part.commands for word in command):
            file, _, test = word.partition("::")
            if file.endswith(".py"):
                assert (gpu.ROOT / file).is_file(), part
                assert not test or f"def {test}(" in (gpu.ROOT / file).read_text(encoding="utf-8"), part


class Accepted(Exception):
    """Raised after a script has parsed its options."""


def accept(words: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    """Raise Accepted if the program that this command starts takes its options; SystemExit if not."""

    def after(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parsed(*args: Any, **options: Any) -> Any:
            parse(*args, **options)
            raise Accepted

        return parsed

    match list(words):
        case ["python", "-m", "launch.cli", *options]:
            for verb in cli.SUBCOMMANDS.values():
                patch.setattr(verb, "run", after(lambda self, *training: [*map(command_line.parse, training)]))
            cli.main(options)
        case ["python", "-m", "accelerate.commands.launch", "launch/train.py", *options]:
            after(command_line.parse)(options)
        case ["python", script, *options] if script.startswith("benchmarks/"):
            patch.setattr(sys, "path", [*sys.path])  # because scripts add the project's folder to it
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            patch.setattr(sys, "argv", [script, *options])
            patch.setattr(argparse.ArgumentParser, "parse_args", after(argparse.ArgumentParser.parse_args))
            patch.setattr(tyro, "cli", after(tyro.cli))
            module.main()
        case _:  # pytest, tarfile and the kit's script are not checked
            raise Accepted


@pytest.mark.parametrize("on_cpu", [False, True], ids=["gpu", "rehearsal"])
@pytest.mark.parametrize("part", table.parts(), ids=lambda part: part.name)
def test_every_command_line_is_accepted(part: Part, on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    places = dict.fromkeys(("out", "run", "data", "site", "caches", "parts"), "/tmp/none") | {"photos": "64"}
    for command in runner.commands(part, on_cpu=on_cpu):
        with monkeypatch.context() as patch, pytest.raises(Accepted):
            accept([word.format(**places) for word in command], patch)


def test_less_important_benchmarks_are_in_no_profile() -> None:
    words = [word for part in table.parts() for command in part.commands for word in command]
    for absent in ("inference", "ffcv", "tune", "benchmarks/model.py", "max-autotune"):
        assert absent not in words
    assert not [part.name for part in table.parts() if part.name.startswith("compiled-b") and "b0" not in part.name]


def test_every_file_of_gpu_tests_is_run() -> None:
    words = {word.partition("::")[0] for part in table.parts() for command in part.commands for word in command}
    assert {str(path.relative_to(gpu.ROOT)) for path in (gpu.ROOT / "tests/gpu").glob("test_*.py")} <= words


def test_timed_parts_run_alone() -> None:
    for group in runner.groups(table.parts()):
        timed = [p for p in group for c in p.commands if {"bench", "benchmarks/step.py", "benchmarks/decode.py"} & {*c}]
        assert len(group) == 1 or not timed


# -- continuing --------------------------------------------------------------------------------------------------------


def test_passed_parts_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = counted("good", tmp_path)
    bad = part("bad", "-c", "print('why it failed'); raise SystemExit(5)")
    absent = part("absent", "-c", "", modules=("no_such_module",))
    status, results = run(monkeypatch, tmp_path, [good, bad, absent])
    assert status == 1
    assert [result["state"] for result in results.values()] == ["passed", "failed", "left out"]
    assert results["bad"]["tail"] == "why it failed"
    assert "no_such_module" in results["absent"]["tail"]
    status, results = run(monkeypatch, tmp_path, [good, counted("bad", tmp_path), absent])
    assert status == 0
    assert (tmp_path / "good-runs").read_text() == (tmp_path / "bad-runs").read_text() == "x"


def test_a_new_machine_continues_from_gpu_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that a part creates for others are created again; figures of earlier parts are available to later ones."""
    made = COUNT + "; pathlib.Path(sys.argv[3]).mkdir(parents=True)"
    maker = part("maker", "-c", made, str(tmp_path), "maker-runs", "{data}/made", makes=("data/made",))
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('[7]')"
    good = replace(counted("good", tmp_path), commands=(("python", "-c", write, "{out}"),))
    read = "import json, pathlib, sys; assert json.loads(pathlib.Path(sys.argv[1], 'good.json').read_text()) == [7]"
    for machine in ("one", "other"):
        (tmp_path / machine / "out").mkdir(parents=True)
        if machine == "other":
            (tmp_path / "one/out/gpu.json").rename(tmp_path / "other/out/gpu.json")
        parts = [maker, good] if machine == "one" else [maker, good, part("reader", "-c", read, "{parts}")]
        status, results = run(monkeypatch, tmp_path / machine, parts)
        assert (status, list(results)) == (0, [part.name for part in parts])
    assert (tmp_path / "maker-runs").read_text() == "xx"


def test_the_part_that_creates_missing_data_is_also_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = "import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir()"
    maker = part("maker", "-c", make, "{data}/made", makes=("data/made",))
    user = counted("user", tmp_path, uses=("data/made",), profile="measure")
    status, results = run(monkeypatch, tmp_path, [maker, user], "measure")
    assert (status, list(results)) == (0, ["maker", "user"])
    status, results = run(monkeypatch, tmp_path, [replace(maker, commands=(("python", "-c", ""),)), user], "measure")
    assert (tmp_path / "user-runs").read_text() == "x"


def test_a_part_whose_data_does_not_exist_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = part("maker", "-c", "raise SystemExit(1)", makes=("data/made",))
    status, results = run(monkeypatch, tmp_path, [maker, counted("user", tmp_path, uses=("data/made",))])
    assert (status, results["user"]["state"]) == (1, "not run")
    assert "data/made" in results["user"]["tail"]


def test_a_part_that_creates_data_runs_again_after_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data may be incomplete, although it has passed according to an older gpu.json in the output folder."""
    made = COUNT + "; pathlib.Path(sys.argv[3]).mkdir()"
    maker = part("maker", "-c", made, str(tmp_path), "maker-runs", "{data}/made", makes=("data/made",))
    run(monkeypatch, tmp_path, [maker])
    file = tmp_path / "work" / FILE
    results = Results(tmp_path / "work", tmp_path / "out", "cpu", gpu.digest_of_sources())
    results.record("maker", {"state": "begun", "seconds": 0.0, "tail": "", "machine": {}})
    assert json.loads(file.read_text())["devices"]["cpu"]["maker"]["state"] == "begun"
    run(monkeypatch, tmp_path, [maker])
    assert (tmp_path / "maker-runs").read_text() == "xx"


def test_a_run_of_one_part_keeps_the_results_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = [part("one", "-c", ""), part("other", "-c", "")]
    for name in ("^one", "her$"):
        _, results = run(monkeypatch, tmp_path, two, "--only", name)
    assert [(name, result["state"]) for name, result in results.items()] == [("one", "passed"), ("other", "passed")]


def test_parts_run_again_after_a_change_of_the_source_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then, the table keeps the earlier result and marks it."""
    for sources in ("first", "first", "second"):
        monkeypatch.setattr(gpu, "digest_of_sources", lambda sources=sources: sources)
        run(monkeypatch, tmp_path, [counted("good", tmp_path), part("rare", "-c", "")][: 1 + (sources == "first")])
    assert (tmp_path / "good-runs").read_text() == "xx"
    rows = {line.split(" ")[1]: line for line in (tmp_path / "out/gpu.md").read_text().splitlines() if "passed" in line}
    assert "(other source files, first)" in rows["rare"]
    assert "other source files" not in rows["good"]


def test_each_device_has_its_own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, cores in (([], 1), (["H100"], 2), (["H200"], 3), (["H100"], 4), ([], 5)):
        about = {"gpus": gpus, "cores": cores}
        monkeypatch.setattr(gpu, "machine", lambda about=about: about)
        run(monkeypatch, tmp_path, [counted("good", tmp_path)])
    assert (tmp_path / "good-runs").read_text() == "xxx"
    found = json.loads((tmp_path / "out/gpu.json").read_text())["devices"]
    assert {device: results["good"]["machine"]["cores"] for device, results in found.items()} == {
        "cpu": 1, "H100": 2, "H200": 3,
    }  # fmt: skip
    lines = (tmp_path / "out/gpu.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("## ")] == ["## cpu", "## H100", "## H200"]
    assert any("cores 2" in line for line in lines)


# -- time --------------------------------------------------------------------------------------------------------------


def test_the_time_limit_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = part("endless", "-c", "import time; print('begun', flush=True); time.sleep(60)", least=0.1)
    late = part("late", "-c", "", least=0.1)
    status, results = run(monkeypatch, tmp_path, [endless, late], "--seconds", "6")
    assert status == gpu.TIME_IS_UP
    assert [result["state"] for result in results.values()] == ["time ran out", "not run"]
    assert "run the script again" in results["late"]["tail"]


def test_a_part_is_not_started_if_too_little_time_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = part("long", "-c", "", least=100), part("short", "-c", "")
    status, results = run(monkeypatch, tmp_path, [long, short], "--seconds", "60")
    assert status == gpu.TIME_IS_UP
    assert [result["state"] for result in results.values()] == ["not run", "passed"]


def test_a_part_that_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Including children in other sessions."""
    child = "import subprocess; subprocess.run(['sleep', '61.25'], start_new_session=True)"
    monkeypatch.setattr(runner, "SLOWER", 1.0)
    monkeypatch.setattr(table, "LEAST_LIMIT", 0.0)
    status, results = run(monkeypatch, tmp_path, [part("hangs", "-c", child, expected=1.0)])
    assert (status, results["hangs"]["state"]) == (1, "failed")
    assert results["hangs"]["tail"].startswith("ended after")
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "61.25"]]


def test_parallel_parts_wait_for_the_parts_in_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`slow` ends only after `parallel` has started; `later` checks that `slow` has ended."""
    wait = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.05)\n"
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    parts = [
        part("slow", "-c", wait + "pathlib.Path(sys.argv[2]).touch()", str(begun), str(ended), together=True),
        part("parallel", "-c", f"import pathlib; pathlib.Path({str(begun)!r}).touch()", together=True),
        part(
            "later", "-c", f"import pathlib; assert pathlib.Path({str(ended)!r}).exists()",
            together=True, after=("slow",),
        ),
    ]  # fmt: skip
    status, results = run(monkeypatch, tmp_path, parts)
    assert (status, {result["state"] for result in results.values()}) == (0, {"passed"})


def test_two_runs_cannot_use_the_same_work_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = (str(tmp_path / name) for name in ("work", "out"))
    inner = part("inner", "benchmarks/gpu.py", "--cpu", "--work", work, "--out", out, expected=100)
    _, results = run(monkeypatch, tmp_path, [inner])
    assert results["inner"]["status"] == gpu.BAD_INPUT
    assert "is in use by another run; wait for it, or specify another --work" in results["inner"]["tail"]


# -- kills -------------------------------------------------------------------------------------------------------------

# Runs the script with many parts, each of which prints 400 lines, and copies the results continuously.
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from benchmarks import gpu
from benchmarks.gpu_run import results
from benchmarks.gpu_run.parts import Part
results.COPY_EVERY = 0.01
say = "import sys\\nfor i in range(400): print(hash(str(i)))\\nopen(sys.argv[1], 'w').write('[7]')"
gpu.parts = lambda: [
    Part(name=f"part{{i}}", profile="contact", commands=(("python", "-S", "-c", say, "{{out}}"),), expected=9, least=0)
    for i in range(200)
]
gpu.machine = lambda: {{"gpus": [], "cores": 1}}
sys.argv = ["gpu.py", "contact", "--cpu", "--seconds", "200", "--out", {out!r}, "--work", {work!r}]
sys.exit(gpu.main())
"""


# A part that starts a child in another session, as launchers do. The child does not end by itself.
STARTS_A_CHILD = "import subprocess, sys; subprocess.run(['sleep', {name!r}], start_new_session=True)"


@contextmanager
def started(folder: Path, script: str = SCRIPT) -> Iterator[subprocess.Popen[bytes]]:
    """Run the script in a new session and kill it at the end of the block."""
    code = script.format(root=str(gpu.ROOT), out=str(folder / "out"), work=str(folder / "work"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def passed_in(out: Path) -> set[str]:
    """Return the names of the passed parts in gpu.json, which must be complete if it exists."""
    if not (out / "gpu.json").exists():
        return set()
    found = json.loads((out / "gpu.json").read_text())["devices"].get("cpu", {})
    return {name for name, result in found.items() if result["state"] == "passed"}


@pytest.mark.slow
def test_a_kill_at_any_time_leaves_complete_files_and_keeps_all_results(tmp_path: Path) -> None:
    out, work, rng = tmp_path / "out", tmp_path / "work", random.Random(0)
    before: set[str] = set()
    for kill in (os.killpg, os.kill) * 3:  # the whole group or the script alone
        with started(tmp_path) as process:
            while len(passed_in(out)) < len(before) + 2:  # wait for progress, not for a time: the machine may be slow
                time.sleep(0.05)
                assert process.poll() is None
            time.sleep(rng.uniform(0, 0.3))
            kill(process.pid, signal.SIGKILL)
            process.wait()
        assert passed_in(out) > before
        before = passed_in(out)
        with tarfile.open(out / "results.tar.gz") as archive:
            held = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
        for name, result in json.loads(held["gpu.json"])["devices"]["cpu"].items():
            if result["state"] == "passed":
                assert held[f"parts/cpu/{name}.json"] == b"[7]"
                assert held[f"parts/cpu/{name}.txt"].count(b"\n") == 400
    assert passed_in(work) >= before


@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["script alone", "process group"])
def test_no_process_outlives_a_killed_script(kill: Callable[[int, int], None], tmp_path: Path) -> None:
    """Neither a part nor its children in other sessions: they would keep the GPU busy during the next run."""
    seconds = f"3600.{random.SystemRandom().randrange(10**9)}"
    child = STARTS_A_CHILD.format(name=seconds)

    def running() -> list[int]:
        return [p.pid for p in psutil.process_iter(["cmdline"]) if seconds in " ".join(p.info["cmdline"] or [])]

    with started(tmp_path, SCRIPT.replace("say = ", f"say = {child!r}\nunused = ")) as process:
        try:
            while len(running()) < 2:  # the part and its child
                time.sleep(0.05)
                assert process.poll() is None
            kill(process.pid, signal.SIGKILL)
            process.wait()
            while running():  # if a process survives, the test hangs here
                time.sleep(0.05)
        finally:
            for pid in running():
                os.kill(pid, signal.SIGKILL)


def test_a_leftover_of_a_killed_copy_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    leftover = tmp_path / "out" / f".results.tar.gz.0123abcd{durable.TEMPORARY}"
    leftover.write_bytes(b"half")
    run(monkeypatch, tmp_path, [part("one", "-c", "")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.md", "results.tar.gz"]


def test_results_are_copied_as_soon_as_a_part_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second part waits for the first one's result in the output folder."""
    monkeypatch.setattr("benchmarks.gpu_run.results.COPY_EVERY", 3600.0)
    wait = (
        "import json, pathlib, sys, time\nfile = pathlib.Path(sys.argv[1], 'gpu.json')\n"
        "found = lambda: json.loads(file.read_text())['devices']['cpu'].get('first', dict()).get('state')\n"
        "while found() != 'passed': time.sleep(0.05)"
    )
    parts = [part("first", "-c", ""), part("second", "-c", wait, str(tmp_path / "out"))]
    _, results = run(monkeypatch, tmp_path, parts)
    assert [result["state"] for result in results.values()] == ["passed", "passed"]


def test_sigterm_ends_the_running_parts_and_saves_the_results(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    with started(tmp_path, SCRIPT.replace("print(hash(str(i)))", "__import__('time').sleep(1)")) as process:
        while not (work / "parts/cpu/part0.txt").exists():
            time.sleep(0.05)
            assert process.poll() is None
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
    assert json.loads((out / "gpu.json").read_text())["devices"]["cpu"]["part0"]["state"] == "time ran out"
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(work) in " ".join(p.info["cmdline"] or [])]


def test_a_signal_that_another_thread_receives_ends_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python runs signal handlers in the main thread, which such a signal does not wake: the test hangs if that thread
    blocks indefinitely."""

    def end_when_begun() -> None:
        while not (tmp_path / "work/parts/cpu/endless.txt").exists():
            time.sleep(0.05)
        time.sleep(0.2)  # until the main thread waits
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    thread = threading.Thread(target=end_when_begun)
    thread.start()
    _, results = run(
        monkeypatch, tmp_path, [part("endless", "-c", "import time; time.sleep(3600)")], "--seconds", "600"
    )
    thread.join()
    assert results["endless"]["state"] == "time ran out"


def test_checkpoints_are_not_in_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = (
        "import pathlib, sys; run = pathlib.Path(sys.argv[1])\n"
        "for name, size in ('log', 9), ('model.safetensors', 9 << 20): (run / name).write_bytes(bytes(size))"
    )
    run(monkeypatch, tmp_path, [part("trains", "-c", write, "{run}")])
    with tarfile.open(tmp_path / "out/results.tar.gz") as archive:
        assert archive.getnames() == ["parts/cpu/trains.run/log", "parts/cpu/trains.txt", "gpu.json", "gpu.md"]


# -- output ------------------------------------------------------------------------------------------------------------


def test_the_environment_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/the/callers")
    monkeypatch.setenv("HF_HOME", "/its/own")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    show = "import json, os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(json.dumps(dict(os.environ)))"
    _, results = run(monkeypatch, tmp_path, [part("env", "-c", show, "{out}", environment={"OMP_NUM_THREADS": "3"})])
    found, work = results["env"]["figures"], tmp_path / "work"
    assert found["PYTHONPATH"].split(os.pathsep) == [str(gpu.ROOT), str(work / "site"), "/the/callers"]
    assert found["TRITON_CACHE_DIR"] == str(tmp_path / "triton-cache")
    assert found["TORCHINDUCTOR_CACHE_DIR"] == str(work / "inductor")
    assert (found["HF_HOME"], found["OMP_NUM_THREADS"]) == ("/its/own", "3")
    assert found["DS_IGNORE_CUDA_DETECTION"] == "1"


def test_the_kit_is_unpacked_first_if_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = tmp_path / ".kit"
    kit.mkdir()
    (kit / "unpack.sh").write_text('mkdir "$1"; cat "$2" "$3" > "$1/kit_module.py"\n')
    for number, line in enumerate(("X =", " 1\n")):
        (kit / f"kit.tar.xz.0{number}").write_text(line)
    (tmp_path / "packed/triton-cache").mkdir(parents=True)
    (tmp_path / "packed/triton-cache/kernel").touch()
    with tarfile.open(kit / "triton-cache.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "packed/triton-cache", "triton-cache")
    monkeypatch.setattr(table, "KIT", kit)
    unpacking = [part for part in table.parts() if part.name in ("kernel-cache", "kit")]
    user = part("user", "-c", "import kit_module; assert kit_module.X == 1", profile="measure")
    status, results = run(monkeypatch, tmp_path, [*unpacking, user], "measure")
    assert (status, list(results)) == (0, ["kernel-cache", "kit", "user"])
    assert (tmp_path / "triton-cache/kernel").exists()


def test_without_a_kit_nothing_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "KIT", gpu.ROOT / "no-such-kit")
    unpacking = [part for part in table.parts() if part.name in ("kernel-cache", "kit")]
    status, results = run(monkeypatch, tmp_path, unpacking)
    assert (status, [result["state"] for result in results.values()]) == (0, ["left out", "left out"])
    assert results["kit"]["tail"] == "no-such-kit/unpack.sh does not exist"


def test_a_training_run_is_summarized_by_its_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"kind": "eval", "top1": 0.1}, {"kind": "eval", "top1": 0.9}]
    write = (
        "import json, pathlib, sys; file = pathlib.Path(sys.argv[1], 'metrics.jsonl')\n"
        "file.write_text(''.join(line + chr(10) for line in sys.argv[2:]))"
    )
    escaped = [json.dumps(line).replace("{", "{{").replace("}", "}}") for line in lines]
    run(monkeypatch, tmp_path, [part("trains", "-c", write, "{run}", *escaped)])
    assert "top-1 90.00%" in (tmp_path / "out/gpu.md").read_text()


def test_the_table_contains_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"results": [{"mode": "training", "way": "graph", "images/s": 1234.5}]}
    write = f"import pathlib, sys; pathlib.Path(sys.argv[1]).write_text({json.dumps(rows)!r})"
    run(monkeypatch, tmp_path, [part("step", "-c", write.replace("{", "{{").replace("}", "}}"), "{out}")])
    assert re.search(r"\| step \| \d+ \| passed, \d+ s: training graph 1,234 \|", (tmp_path / "out/gpu.md").read_text())


def test_every_benchmark_is_summarized_in_one_line() -> None:
    rows = [{"kernel": "a", "ours": {"us": 1.0, "share": fraction}} for fraction in (0.5, 0.75, 1.0)]
    rows[0]["other form"] = {"us": 2.0, "share": 0.25}
    kernels = {"copy GB/s": 4000.0, "results": rows}
    line = report.figures_in_a_line
    assert line(kernels) == (
        "copy 4,000 GB/s; 3 kernels, fractions of that bandwidth: ours 0.75 (0.50 to 1.00); "
        "other form 0.25 (0.25 to 0.25)"
    )
    assert line({"results": [{"mode": "training", "way": "graph", "failed": "OutOfMemoryError: no room"}]}) == (
        "training graph OutOfMemoryError: no room"
    )
    peer = {"model": "resnet50", "way": "compiled", "compiled": "whole", "images/s": 900.0, "to fat_b0": 0.5}
    assert line({"results": [peer]}) == "resnet50 compiled whole 900, 0.50 to fat_b0"
    assert line({"results": [{"check": "resize", "found": "64 images"}]}) == "resize: 64 images"
    times = {"way": "fat", "ms": 11.04, "kernels ms": 8.46, "busy": 0.766, "kernels": []}
    failed = {"model": "fat_b0", "way": "library", "failed": "OutOfMemoryError: no room"}
    assert line({"results": [{"model": "loader", **times}, failed]}) == (
        "loader fat 8.5 ms of kernels in 11.0 ms; fat_b0 library OutOfMemoryError: no room"
    )
    train = {"images_per_second": 12345.6, "data_wait": 0.004, "loss": 0.5, "step": 60}
    assert line({"training": {"train": train, "eval": {"top1": 0.991}, "end": {}}}) == (
        "top-1 99.10%, 12,346 images/s, waiting for data 0.4%, loss 0.500 at step 60"
    )
    assert line({"training": {"start": {}}}) == line({}) == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["contract"], "unknown profile contract: expected contact, measure, sweep, short-recipes, peers"),
        (["--only", "("], "not a valid regular expression"),
        (["measure", "--only", "step-b9"], "--only step-b9: no part matches; the parts are step-b3, bench-b3"),
    ],
)
def test_invalid_options_are_reported(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == gpu.BAD_INPUT
    assert message in capsys.readouterr().err


def test_a_missing_gpu_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    assert gpu.main() == gpu.BAD_INPUT
    assert "no CUDA device" in capsys.readouterr().err
