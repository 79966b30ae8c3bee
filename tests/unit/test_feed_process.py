"""The feed process (pipeline/feed_process/): same batches, same errors, no leaked resources, no hangs."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.augment.recipe import augment_recipe
from pipeline.batch_shape import BatchShape
from pipeline.feed_process.process import FeedProcess, FeedProcessDied
from pipeline.feed_process.worker import SENT_AHEAD
from pipeline.jobs import JobStream, TrainJobs
from pipeline.loader import Batch, EvalLoader, LoaderOptions, TrainLoader
from pipeline.options import FeedProcess as FeedChoice
from pipeline.options import LoaderSettings
from pipeline.phases.train_phase import TrainPhase
from pipeline.plan import EvalPlan, Position, TrainPlan
from pipeline.storage.bad_samples import BadSamples
from pipeline.storage.files import Interrupted
from pipeline.storage.remote.errors import RemoteError
from pipeline.storage.remote.shard_set import open_set
from shards.errors import ShardSetError, UserError
from shards.format.dataset import ShardSet
from tests.support.damage import flip_a_bit
from tests.support.leftovers import children, feed_buffers, nothing_is_left_behind
from tests.support.serving import serve
from tests.support.waiting import is_running, wait_until

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
GLOBAL = 24
LIGHT, FAT = augment_recipe("light", size=32), augment_recipe("fat", size=32)


@pytest.fixture
def copied(photos: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "set"))


def train(dataset: ShardSet, *, recipe: Any = LIGHT, micro: int = GLOBAL, batch: int = GLOBAL, **options: Any) -> Any:
    plan = TrainPlan(
        dataset.shard_samples("train"), global_batch=batch, seed=5, shuffle_block_size=16, pairs=recipe.mixes
    )
    shape = BatchShape(global_batch=batch, micro_batch=min(micro, batch), pairs=recipe.mixes)
    chosen = LoaderOptions(**{"feed_process": "on", **options})
    return TrainLoader(dataset, plan, shape, recipe, epochs=2, device=CPU, options=chosen)


def evaluation(dataset: ShardSet, **options: Any) -> EvalLoader:
    chosen = LoaderOptions(**{"feed_process": "on", **options})
    plan = EvalPlan(dataset.split("val").samples, batch=5, world=2, rank=1)
    return EvalLoader(dataset, plan, size=32, mean=FAT.mean, std=FAT.std, device=CPU, options=chosen)


def contents(batch: Batch) -> list[Any]:
    tensors = (batch.images, batch.labels, batch.mask, batch.lam)
    arrays = [None if tensor is None else tensor.numpy().tobytes() for tensor in tensors]
    return [*arrays, batch.ids.tolist(), batch.planned.tolist(), batch.position, batch.micro]


def all_of(loader: TrainLoader | EvalLoader) -> list[list[Any]]:
    with loader:
        return [contents(batch) for batch in loader.stream()]


def job_stream(dataset: ShardSet, **options: Any) -> JobStream:
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=GLOBAL, seed=5, shuffle_block_size=16)
    phases = (TrainPhase(first_step=0, augment=LIGHT, shape=BatchShape(global_batch=GLOBAL)),)
    jobs = TrainJobs(plan=plan, phases=phases, epochs=50, start=Position(0, 0))
    return JobStream(dataset=dataset, split="train", jobs=jobs, options=LoaderOptions(**options))


@pytest.fixture
def process(photos: Path) -> Iterator[FeedProcess]:
    stream = job_stream(ShardSet(photos))
    process = FeedProcess(stream, BadSamples(budget=0, samples=80, seed=5))
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.close()


@pytest.mark.parametrize("options", [{}, {"read_ahead": 0, "ready": 1}, {"read_threads": 1, "check_hashes": False}])
@pytest.mark.parametrize(("recipe", "micro"), [(LIGHT, GLOBAL), (FAT, GLOBAL), (FAT, 8)])
def test_same_training_batches_with_and_without_the_process(
    photos: Path, recipe: Any, micro: int, options: dict[str, Any]
) -> None:
    with_it, without = (
        all_of(train(ShardSet(photos), recipe=recipe, micro=micro, feed_process=choice, **options))
        for choice in ("on", "off")
    )
    assert len(with_it) > 4
    assert with_it == without


def test_same_repeated_evaluations_with_and_without_the_process(photos: Path) -> None:
    expected = all_of(evaluation(ShardSet(photos), feed_process="off"))
    with evaluation(ShardSet(photos)) as loader:
        assert [contents(batch) for batch in loader] == expected
        next(iter(loader))
        assert [contents(batch) for batch in loader] == expected, "an interrupted pass starts again from the beginning"


def test_a_loader_resumes_from_its_state_with_the_next_batch(photos: Path) -> None:
    with train(ShardSet(photos), recipe=FAT) as loader:
        first = [contents(next(loader)) for _ in range(2)]
        state = loader.state_dict()
        expected = [contents(batch) for batch in loader.stream()]
    assert len(first) == state["step"] == 2
    with train(ShardSet(photos), recipe=FAT) as loader:
        next(loader)
        loader.load_state_dict(state)
        assert [contents(batch) for batch in loader.stream()] == expected


def test_same_batches_from_a_server_staged_by_the_process(photos: Path, tmp_path: Path) -> None:
    expected = all_of(train(ShardSet(photos), feed_process="off"))
    with serve(photos) as site:
        with train(open_set(site.url, cache=tmp_path)) as loader:
            found = [contents(next(loader))]
            tars = len(ShardSet(photos).split("train").shards)
            wait_until(lambda: len(list(tmp_path.rglob("*.tar"))) >= tars, "staged shards")
            found += [contents(batch) for batch in loader.stream()]
        assert found == expected
        assert site.whole_reads()["train.index.npy"] <= 2, "read to check and to stage the set, but not by the process"
        assert all_of(train(open_set(site.url, cache=tmp_path))) == expected


def test_bad_samples_are_replaced_counted_and_reported_like_without_the_process(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for sample in (3, 11, 40):
        flip_a_bit(copied, sample)
    seen = {}
    for choice in ("on", "off"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loader = train(ShardSet(copied), bad_samples="skip:3", feed_process=choice)
            batches = all_of(loader)
        seen[choice] = batches, loader.bad_samples, sorted(caplog.messages)
    assert seen["on"] == seen["off"]
    assert seen["on"][1] == 3
    assert len(seen["on"][2]) >= 3


def test_the_bad_samples_found_are_remembered_when_the_process_restarts(copied: Path) -> None:
    """The budget belongs to the loader: restarting the process does not reset it."""
    for sample in (3, 11):
        flip_a_bit(copied, sample)
    with train(ShardSet(copied), bad_samples="skip:1") as loader:
        loader._bad.ids.add(3)
        with pytest.raises(ShardSetError, match="2 bad samples, more than --bad-samples skip:1 allows"):
            list(loader.stream())
        assert loader.bad_samples == 2


def test_more_new_buffers_than_fit_into_one_message(digits: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(digits, tmp_path / "set"))
    dataset, batch = ShardSet(path), 96
    first = TrainPlan(dataset.shard_samples("train"), global_batch=batch, seed=5, shuffle_block_size=16).ids(
        Position(0, 0)
    )
    for sample in first[:80].tolist():
        flip_a_bit(path, sample)
    batches = []
    for choice in ("on", "off"):
        with train(dataset, micro=batch, batch=batch, bad_samples="skip:100", feed_process=choice) as loader:
            batches.append([contents(next(loader)) for _ in range(3)])
    assert batches[0] == batches[1]


def outcome(loader: TrainLoader) -> tuple[int, type, str, int]:
    """Return the number of batches delivered before the error, and the error."""
    delivered: list[Batch] = []
    with pytest.raises(UserError) as caught:
        delivered.extend(loader)  # keeps the batches before the error
    with pytest.raises(type(caught.value)):  # every later call raises it again, so no batch is skipped
        next(loader)
    return len(delivered), type(caught.value), str(caught.value), caught.value.exit_code


@pytest.mark.parametrize("bad_samples", ["raise", "skip:1"])
def test_a_damaged_sample_raises_the_same_error_after_the_same_batch(copied: Path, bad_samples: str) -> None:
    for sample in (11, 33):  # not first or last of their shards, which are checked earlier
        flip_a_bit(copied, sample)
    found = {}
    for choice in ("on", "off"):
        with train(ShardSet(copied), bad_samples=bad_samples, feed_process=choice) as loader:
            found[choice] = outcome(loader)
    assert found["on"] == found["off"]
    assert found["on"][1] is ShardSetError
    assert "\n" not in found["on"][2]


def test_a_missing_shard_and_a_failing_server_raise_the_same_errors(copied: Path, tmp_path: Path) -> None:
    found = {}
    for choice in ("on", "off"):
        loader = train(ShardSet(copied), feed_process=choice)
        lost = ShardSet(copied).shard_path("train", 1)
        hidden = lost.rename(tmp_path / "hidden.tar")
        with loader:
            found[choice] = outcome(loader)
        hidden.rename(lost)
    assert found["on"] == found["off"]
    assert "missing" in found["on"][2]
    with serve(copied) as site:
        loader = train(open_set(site.url, cache=tmp_path / "cache"))
        lost.unlink()
        with loader:
            _, kind, message, _ = outcome(loader)
    assert kind is RemoteError
    assert "not found on the server" in message


def test_an_unexpected_error_is_raised_with_its_traceback(
    photos: Path,
) -> None:
    broken = job_stream(ShardSet(photos))
    broken.jobs.epochs = "many"  # type: ignore[attr-defined]
    other = FeedProcess(broken, BadSamples(budget=0, samples=80, seed=5))
    try:
        other.wait_until_ready()
        with pytest.raises(TypeError) as caught:
            next(other.batches())
    finally:
        other.close()
    assert "pipeline/jobs.py" in caught.value.__notes__[0]


def test_a_killed_process_raises_one_error_immediately(photos: Path) -> None:
    before = children()
    with train(ShardSet(photos)) as loader:
        next(loader)
        (pid,) = children() - before
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(FeedProcessDied, match=f"process {pid}.*was killed by SIGKILL.*--read-ahead") as caught:
            list(loader.stream())
        assert caught.value.exit_code == 1
        with pytest.raises(FeedProcessDied):
            next(loader)
    assert not children() - before


def test_signals_to_the_process_group_do_not_end_it(process: FeedProcess) -> None:
    batches = process.batches()
    next(batches)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(process.pid, number)
    for _ in range(10):
        next(batches)


def test_signals_during_its_start_do_not_end_it(photos: Path) -> None:
    process = FeedProcess(job_stream(ShardSet(photos)), BadSamples(budget=0, samples=80, seed=5))
    try:
        os.kill(process.pid, signal.SIGTERM)
        process.wait_until_ready()
        next(process.batches())
    finally:
        process.close()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


CONSUMER = """
import os, sys, time, torch
from pathlib import Path
from pipeline.augment.recipe import augment_recipe
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.batch_shape import BatchShape
from pipeline.plan import TrainPlan
from shards.format.dataset import ShardSet
dataset = ShardSet(Path(sys.argv[1]))
plan = TrainPlan(dataset.shard_samples("train"), global_batch=24, seed=0)
options = LoaderOptions(feed_process="on")
recipe = augment_recipe("light", size=32)
loader = TrainLoader(
    dataset, plan, BatchShape(global_batch=24), recipe, epochs=99, device=torch.device("cpu"), options=options
)
next(loader)
print(*[pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()], flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["SIGKILL", "SIGINT", "return", "SIGKILL while it is stopped"])
def test_it_ends_with_the_training_process(photos: Path, end: str) -> None:
    command = [sys.executable, "-c", CONSUMER, str(photos), "return" if end == "return" else "wait"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as consumer:
        assert consumer.stdout is not None
        (pid,) = map(int, consumer.stdout.readline().split())
        if "stopped" in end:
            os.kill(pid, signal.SIGSTOP)
        if end != "return":
            consumer.send_signal(getattr(signal, end.split(maxsplit=1)[0]))
        consumer.wait(timeout=30)
    wait_until(lambda: not is_running(pid), "the end of the feed process")


def test_no_resources_are_leaked(digits: Path) -> None:
    def round_trip() -> None:
        with train(ShardSet(digits)) as loader:
            next(loader)
        loader.close()

    round_trip()
    with nothing_is_left_behind():
        for _ in range(4):
            round_trip()


def test_interrupt_ends_a_wait(process: FeedProcess) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(0.2, process.interrupt).start()
    with pytest.raises(Interrupted):
        list(process.batches())


@pytest.mark.parametrize(
    "derive",
    [
        lambda image: image,
        lambda image: image[3:],
        lambda image: image[3:][2:],
        lambda image: torch.from_numpy(image)[1:],
        lambda image: np.split(image, [4])[1],
    ],
)
def test_memory_is_reused_only_once_it_is_not_referenced(process: FeedProcess, derive: Callable[[Any], Any]) -> None:
    batches = process.batches()
    kept = derive(next(batches).job.encoded.images[0])
    before = np.asarray(kept).tobytes()
    for _ in range(30):
        next(batches)
    assert np.asarray(kept).tobytes() == before
    assert len(process._buffers) < 16, "buffers of other batches were reused"
    assert len(set(process._returned)) == len(process._returned)


def test_the_process_prepares_a_bounded_number_of_batches(process: FeedProcess) -> None:
    batches = process.batches()
    next(batches)
    statistics = Path(f"/proc/{process.pid}/stat")

    def seconds() -> int:
        fields = statistics.read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def rests() -> bool:
        before = seconds()
        time.sleep(0.3)
        return seconds() == before

    wait_until(rests, "a process that waits for its consumer")
    # Batches read ahead, being read, being prepared, sent ahead, and the one that was received.
    assert feed_buffers(process.pid) <= LoaderSettings().read_ahead + 2 + SENT_AHEAD + 2


def test_it_imports_no_torch() -> None:
    command = "import pipeline.feed_process.worker, sys; assert not {'torch', 'nvidia', 'numba'} & sys.modules.keys()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", command], check=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize("python", ["/no/such/python", "/bin/false"])
def test_if_it_cannot_start_threads_prepare_the_batches_with_one_warning(
    photos: Path, python: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = all_of(train(ShardSet(photos), feed_process="off"))
    monkeypatch.setattr(sys, "executable", python)
    with caplog.at_level(logging.WARNING):
        assert all_of(train(ShardSet(photos))) == expected
    (message,) = caplog.messages
    assert message.startswith("--feed-process: ")
    assert message.endswith("in threads of the training process instead")


class Cudart:
    """The two functions of the CUDA runtime that are used; registers at most `most` ranges."""

    def __init__(self, most: int) -> None:
        self.most, self.registered, self.asked = most, dict[int, int](), 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.asked += 1
        if len(self.registered) == self.most:
            return 2
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@pytest.mark.parametrize("most", [99, 1])
def test_buffers_are_page_locked_while_they_are_referenced(
    photos: Path, most: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cudart = Cudart(most)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    process = FeedProcess(job_stream(ShardSet(photos)), BadSamples(budget=0, samples=80, seed=5), page_lock=True)
    try:
        process.wait_until_ready()
        batches = process.batches()
        kept = next(batches).job.encoded.images[0]
        for _ in range(10):
            next(batches)
        assert len(cudart.registered) == min(most, len(process._buffers))
        address = kept.ctypes.data
    finally:
        process.close()
    if most > 1:
        ((start, size),) = cudart.registered.items()
        assert start <= address < start + size, "an address in the batch that is still referenced"
    del kept
    assert not cudart.registered
    failures = [message for message in caplog.messages if "no page-locked memory" in message]
    assert len(failures) == (most == 1)
    if most == 1:
        assert cudart.asked == 2, "page-locking is not tried again after a failure"


@pytest.mark.parametrize(
    ("choice", "device", "expected"),
    [
        ("auto", "cpu", "threads of the training process"),
        ("auto", "cuda", "separate process"),
        ("on", "cpu", "separate process"),
        ("off", "cuda", "threads of the training process"),
    ],
)
def test_loaders_on_a_gpu_use_the_process_and_report_it(
    photos: Path, choice: FeedChoice, device: str, expected: str
) -> None:
    loader = train(ShardSet(photos), feed_process=choice)
    loader._device = torch.device(device)
    assert loader.resolved["feed"] == expected
