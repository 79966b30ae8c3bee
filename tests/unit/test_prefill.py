"""Compilation of Triton kernels ahead of time, with Triton's compiler and without a GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is only available on Linux; without it FAT uses plain PyTorch")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, which the interpreter does not use", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

import fat
from benchmarks import prefill as gpu_run
from fat import kernels
from fat.blocks import Block
from fat.kernels.prefill import command, compile_ahead, launches
from fat.kernels.prefill.work import evaluation, training_step
from tests.support.triton_offline import launches_only_compile

ROOT = Path(__file__).resolve().parents[2]
CAPABILITY = (9, 0)
TARGET = launches.cuda_target(CAPABILITY)
IMAGES = (2, 16, 8, 8)
Progress = list[tuple[int, int]]


@triton.jit
def _copy(source, target, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < numel), mask=at < numel)


@triton.jit
def _wrong(source):
    tl.static_assert(False, "wrong on purpose")


@triton.constexpr_function
def _die():
    __import__("os").kill(__import__("os").getpid(), 9)  # a constexpr function cannot use imported modules


@triton.jit
def _deadly(source):
    _die()


def copies(*blocks: int) -> Callable[[], object]:
    """Return a function that launches one kernel per block size."""

    def run() -> None:
        for block in blocks:
            _copy[(1,)](torch.empty(64), torch.empty(64), 64, BLOCK=block)

    return run


def block() -> Block:
    torch.manual_seed(0)
    return Block(16, 1, 3, 1)


def ahead(work: list[Callable[[], object]], **options: Any) -> compile_ahead.Report:
    return compile_ahead.compile_ahead(work, capability=CAPABILITY, processes=2, **options)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def launch_for_real(kind: str) -> None:
    """Print the kernels that Triton's launch code launches, and what had to be compiled or built for them.

    Args:
        kind: "training": a training step and an evaluation. "evaluation": only an evaluation.
    """
    from triton import knobs
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import build

    hits: list[tuple[str, bool]] = []
    built: list[str] = []
    knobs.compilation.listener = lambda *, src, cache_hit, **_: hits.append((src.name, cache_hit))
    images = torch.zeros(IMAGES, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with (
        launches._OperatorsOfDevice(),
        kernels.assume_available(),
        launches_only_compile(90) as offline,
        torch.autocast("cpu", torch.bfloat16),
    ):
        if kind == "training":
            block().train()(images).float().sum().backward()
        with torch.no_grad():
            block().eval()(images)
    with (
        mock.patch.object(build, "_build", lambda name, *_: built.append(name)),
        mock.patch.object(build, "_load_module_from_path"),
        mock.patch.object(nvidia, "library_dirs", return_value=[]),
        mock.patch("triton.runtime.driver.driver._active", offline),
    ):
        offline.utils = nvidia.CudaUtils()
        for kernel in offline.kernels.values():
            nvidia.CudaLauncher(kernel.src, kernel.metadata)
    print(json.dumps({"hits": hits, "built": built, "launched": offline.launched}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["evaluation", "training"])
def test_a_step_finds_all_its_kernels_in_the_cache(kind: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = [evaluation(block(), IMAGES)]
    if kind == "training":
        work.insert(0, training_step(block(), IMAGES))
    seen: Progress = []
    report = ahead(work, progress=lambda done, total: seen.append((done, total)))
    assert report.problem is None
    assert report.compiled == report.total > (10 if kind == "training" else 3)
    assert seen == [(done, report.total) for done in range(report.total + 1)]

    code = f"from tests.unit.test_prefill import launch_for_real; launch_for_real({kind!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    of_training = {"_patches", "_fold_gradient", "_update_running_stats"} if kind == "training" else set()
    assert {"_blocks", *of_training} <= set(found["launched"])
    assert [name for name, hit in found["hits"] if not hit] == []
    assert len(found["hits"]) == report.total
    assert found["built"] == []
    for extension in cache.rglob("*.so"):  # otherwise the extension cannot be loaded
        needed = subprocess.run(["readelf", "-d", extension], capture_output=True, text=True, check=True).stdout
        assert "Shared library: [libcuda.so.1]" in needed

    monkeypatch.setattr(compile_ahead, "_compile", lambda *args: pytest.fail("compiles again"))
    again = ahead(work)
    assert (again.compiled, again.cached, again.problem) == (0, report.total, None)


def test_all_launches_of_a_step_of_fat_b0_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: Counter[str] = Counter()
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **options: launched.update([kernel.fn.__name__]))
    model = fat.create_model("fat_b0")
    images = torch.zeros(2, 3, 64, 64, dtype=torch.bfloat16)
    with launches._OperatorsOfDevice(), kernels.assume_available(), torch.autocast("cpu", torch.bfloat16):
        model.train()(images).float().sum().backward()
    assert launched.total() > 400
    recorded = launches.record(training_step(model, (2, 3, 64, 64)), TARGET)
    assert {launch.name for launch in recorded} == launched.keys()


@pytest.mark.parametrize("model", ["fat_b0", pytest.param("fat_b3", marks=pytest.mark.slow)])
def test_sizes_that_bound_loops_are_not_specialized(model: str) -> None:
    """The number of kernels stays small. Only blocks and the stem have one kernel per number of channels."""
    with torch.device("meta"):
        step = training_step(fat.create_model(model), (256, 3, 224, 224))
    names = Counter(launch.name for launch in launches.record(step, TARGET))
    assert names["_join"] == 2
    assert names["_normalize"] <= 2
    assert names["_input_gradient"] <= 3
    assert names.total() <= 120


def test_recording_does_not_change_the_model() -> None:
    model = fat.create_model("fat_b0", num_classes=10).eval()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    kinds = [type(module) for module in model.modules()]
    state = torch.get_rng_state()
    launches.record(training_step(model, (2, 3, 64, 64), freeze_bn=True), TARGET)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert [type(module) for module in model.modules()] == kinds
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0], name
        assert torch.equal(tensor, before[name][1]), name
        assert tensor.grad is None, name


def test_frozen_norms_launch_no_batchnorm_kernels() -> None:
    def names(**options: bool) -> set[str]:
        return {launch.name for launch in launches.record(training_step(block(), IMAGES, **options), TARGET)}

    assert names() - names(freeze_bn=True) >= {"_join", "_fold", "_update_running_stats"}


def test_unaligned_memory_is_recorded_as_another_kernel() -> None:
    def run() -> None:
        for start in (0, 1, 4):  # elements of 4 bytes
            _copy[(1,)](torch.empty(64)[start:], torch.empty(64), 60, BLOCK=64)

    aligned, shifted = launches.record(run, TARGET)
    assert aligned.attributes[0,] == [["tt.divisibility", 16]]
    assert not shifted.attributes[0,]


def test_launches_of_other_threads_are_not_intercepted(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **options: launched.append(kernel.fn.__name__))

    def run() -> None:
        copies(32)()
        other = threading.Thread(target=copies(64))
        other.start()
        other.join()

    assert len(launches.record(run, TARGET)) == 1
    assert launched == ["_copy"]


def test_kernels_that_fail_to_compile_are_named_and_all_others_compiled(cache: Path) -> None:
    def unreadable() -> None:
        assert torch.zeros(1).item() == 0

    work = [
        lambda: _deadly[(1,)](torch.empty(1)),
        copies(32, 64),
        lambda: _wrong[(1,)](torch.empty(1)),
        unreadable,
    ]
    report = ahead(work)
    assert (report.total, report.compiled) == (4, 2)
    assert report.problem is not None
    assert "\n" not in report.problem
    assert "_wrong (CompileTimeAssertionFailure: wrong on purpose)" in report.problem
    assert "_deadly (the compiler process was killed by signal 9)" in report.problem
    assert "unreadable (DataDependentOutputException" in report.problem
    assert ahead([copies(32, 64)]).cached == 2


def test_a_compiler_that_does_not_start_is_reported(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    report = ahead([copies(32)])
    assert (report.total, report.compiled, report.cached) == (1, 0, 0)
    assert report.problem is not None


def test_a_cache_that_cannot_be_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    report = ahead([copies(32)])
    assert (report.total, report.compiled, report.cached) == (1, 0, 0)
    assert report.problem is not None
    assert "set TRITON_CACHE_DIR" in report.problem
    assert "\n" not in report.problem


def test_an_incomplete_cache_entry_is_compiled_again(cache: Path) -> None:
    assert ahead([copies(32, 64, 128, 256)]).compiled == 4
    folders = sorted(path.parent for path in cache.rglob("_copy.cubin"))
    for folder, name in zip(folders, ("_copy.json", "__grp___copy.json", "_copy.cubin"), strict=False):
        (folder / name).write_bytes(b"")
    again = ahead([copies(32, 64, 128, 256)])
    assert (again.compiled, again.cached, again.problem) == (3, 1, None)
    assert ahead([copies(32, 64, 128, 256)]).cached == 4


def test_two_callers_at_once_compile_each_kernel_once(cache: Path) -> None:
    reports: list[compile_ahead.Report] = []
    threads = [threading.Thread(target=lambda: reports.append(ahead([copies(32, 64)]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.problem for report in reports] == [None, None]
    assert sum(report.compiled for report in reports) == 2
    assert sum(report.cached for report in reports) == 2


@pytest.fixture
def holder(cache: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the cache's lock."""
    cache.mkdir()
    code = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(); input()"
    command = [sys.executable, "-c", code, str(cache / compile_ahead.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_a_lock_is_waited_for_and_released_when_its_holder_dies(holder: subprocess.Popen[bytes]) -> None:
    late = ahead([copies(32)], wait=0.0)
    assert late.compiled == 0
    assert late.problem is not None
    assert "another process has held" in late.problem
    holder.kill()
    assert ahead([copies(32)]).compiled == 1


def test_a_symbolic_link_in_place_of_the_lock_file_is_not_followed(cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    (tmp_path / "mine").write_text("mine")
    (cache / compile_ahead.LOCK).symlink_to(tmp_path / "mine")
    report = ahead([copies(32)])
    assert report.problem is not None
    assert "cannot be used" in report.problem
    assert (tmp_path / "mine").read_text() == "mine"


def test_nothing_is_compiled_without_a_gpu_and_a_capability(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compile_ahead.compile_ahead([copies(32)]) == compile_ahead.Report()
    assert not cache.exists()


def test_kernels_are_found_after_torch_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile sets the variables of Triton's cache folder and assembler, if they are not set."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
    from triton.backends.nvidia.compiler import get_ptxas_version

    for name in ("TRITON_CACHE_DIR", "TRITON_PTXAS_PATH"):
        monkeypatch.setenv(name, "")  # so that both are restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    get_ptxas_version.cache_clear()
    assert ahead([copies(32)]).compiled == 1

    get_ptxas_version.cache_clear()
    compile_ahead.pin_cache_location()
    assembler = tmp_path / "ptxas"
    assembler.write_text("#!/bin/sh\necho Cuda compilation tools, release 99.9, V99.9.0\n")
    assembler.chmod(0o755)
    os.environ.setdefault("TRITON_PTXAS_PATH", str(assembler))
    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(0))
    try:
        assert ahead([copies(32)]).cached == 1
    finally:
        get_ptxas_version.cache_clear()


def test_the_command_fills_and_prunes_the_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "WORK", {"step": lambda model, shape, dtype: copies(shape[0], shape[2])})
    options = ["--batch", "32", "--size", "64", "128", "--capability", "8.0", "--processes", "1", "--prune"]
    monkeypatch.setattr(sys, "argv", ["prefill", *options])
    assert command.main() == 0
    shown = capsys.readouterr().out
    assert "compiling kernels 3/3" in shown
    assert "3 kernels: 3 compiled, 0 in the cache" in shown
    kept = Counter(path.suffix for path in cache.rglob("*") if path.is_file())
    assert kept.keys() == {".cubin", ".json", ".so"}
    assert kept[".cubin"] == 3
    assert command.main() == 0
    assert "3 kernels: 0 compiled, 3 in the cache" in capsys.readouterr().out


@pytest.mark.parametrize("kind", list(gpu_run.WORK))
def test_launches_of_a_benchmark_run_are_recorded(kind: str) -> None:
    work = list(gpu_run.WORK[kind](argparse.Namespace(models=["fat_b0"], batch=2, size=224, sweep=[])))
    found = launches.record(work[0 if kind in ("check", "tests") else -1], TARGET)
    names = {launch.name for launch in found}
    compared = {"_patches", "_strips"}
    expected = {
        "sweep": {"_convolve", "_blocks", "_spread", "_spread_blocks"},
        "step": {
            "_convolve",
            "_blocks",
            "_patches",
            "_spread_blocks",
            "_add_parts",
            "_sums",
            "_channel_sums",
            "_norm_relu",
        },
        "eval": {"_convolve", "_blocks", "_normalize"},
        "augment": {"_histogram_tables", "_apply", "_finish"},
        "check": {
            "_convolve",
            "_blocks",
            "_patches",
            "_spread_blocks",
            "_fold_gradient",
            "_sums",
            "_update_running_stats",
            "_channel_sums",
        },
        "digits": {"_finish"},
        "benchmarks": {
            *compared,
            "_convolve",
            "_blocks",
            "_spread_blocks",
            "_gate",
            "_gate_gradient",
            "_sums",
            "_fold",
        },
        "tests": {*compared, "_convolve", "_blocks", "_spread_blocks", "_gate", "_gate_gradient", "_sums", "_fold"},
    }
    assert names >= expected[kind]
