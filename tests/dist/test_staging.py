"""Remote sets in real processes: ranks of a node share staged shards, downloads survive SIGKILL, S3 works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.forked import Launcher
from tests.dist.ranks import Ranks, Sequence
from tests.support.cached import cached
from tests.support.launching import ROOT, environment, free_port
from tests.support.serving import Site, serve
from tests.support.waiting import wait_until

STEPS = 14
OPTIONS = ("--size", "32", "--augment", "fat", "--global-batch", "96", "--epochs", "3", "--warmup-epochs", "0")

if os.environ.get("CI") != "true":
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")


@pytest.fixture(scope="module")
def local(launch: Launcher, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence:
    """Batches of the local set."""
    ranks = Ranks(launch, tmp_path_factory.mktemp("local"), "--data", digits, *OPTIONS)
    ranks.start(1, 0, STEPS)
    return ranks.join().steps


@pytest.fixture
def site(digits: Path) -> Iterator[Site]:
    with serve(digits) as site:
        yield site


def shards(path: Path) -> dict[str, int]:
    return {shard.name: shard.stat().st_size for shard in path.glob("train-*.tar")}


def test_two_ranks_stage_each_shard_once(
    launch: Launcher, site: Site, digits: Path, tmp_path: Path, local: Sequence
) -> None:
    ranks = Ranks(launch, tmp_path, "--data", site.url, "--cache", tmp_path / "cache", *OPTIONS)
    ranks.start(2, 0, STEPS, pace=0.2)
    assert ranks.join().steps == local
    whole = {name: times for name, times in site.whole_reads().items() if name in shards(digits)}
    assert whole == dict.fromkeys(shards(digits), 1)
    assert {path.name for path in cached(tmp_path / "cache", "train-*")} == set(shards(digits))
    site.log.clear()
    ranks.start(3, 0, STEPS, pace=0.1)
    assert ranks.join().steps == local
    assert not site.whole_reads().keys() & set(shards(digits)), "all shards are in the cache"


# Downloads in small pieces, so that the process can be killed in the middle of a shard.
DOWNLOADER = """
import sys, torch, pipeline.storage.remote.client
from pathlib import Path
from pipeline.augment.recipe import augment_recipe
from pipeline.loader import TrainLoader
from pipeline.batch_shape import BatchShape
from pipeline.plan import TrainPlan
from pipeline.storage.remote.shard_set import open_set
pipeline.storage.remote.client.PIECE = int(sys.argv[3])
dataset = open_set(sys.argv[1], cache=Path(sys.argv[2]))
plan = TrainPlan(dataset.shard_samples("train"), global_batch=96, seed=0)
recipe, shape, device = augment_recipe("light", size=32), BatchShape(global_batch=96), torch.device("cpu")
with TrainLoader(dataset, plan, shape, recipe, epochs=99999, device=device) as loader:
    for number, batch in enumerate(loader.stream()):
        if number == 0:
            print("first", flush=True)
        if len(list(dataset.path.glob("train-*.tar"))) == int(sys.argv[4]):
            break
print("staged", flush=True)
"""
PIECE = 1 << 16


def downloader(tmp_path: Path, site: Site, files: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DOWNLOADER, site.url, str(tmp_path / "cache"), str(PIECE), str(files)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path), stdout=pipe, stderr=pipe, text=True)


def test_downloads_are_resumed_after_the_process_was_killed(site: Site, digits: Path, tmp_path: Path) -> None:
    sizes = shards(digits)

    def pieces() -> Counter[tuple[str, int]]:
        """Return how often each piece of a shard was sent; requests for samples are shorter."""
        sent = [(name, start, stop) for name, start, stop in list(site.log) if name in sizes]
        return Counter(
            (name, start) for name, start, stop in sent if stop - start == PIECE or stop == sizes[name] > start + 10_000
        )

    total = sum(-(size // -PIECE) for size in sizes.values())
    site.before = lambda name, start, stop: time.sleep(0.1 if stop - start == PIECE else 0)
    for killed_at in (total // 4, total // 2):
        process = downloader(tmp_path, site, len(sizes))
        while pieces().total() < killed_at:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.kill()
        process.communicate()
    process = downloader(tmp_path, site, len(sizes))
    stdout, stderr = process.communicate(timeout=200)  # long, because the machine may be busy
    assert stdout == "first\nstaged\n", stderr
    # Only the pieces that were being downloaded at a kill are requested again: at most one per shard and kill.
    assert pieces().total() - len(pieces()) <= 2 * len(sizes)
    for name in sizes:
        (staged,) = cached(tmp_path / "cache", name)
        assert staged.read_bytes() == (digits / name).read_bytes()


def test_ctrl_c_ends_a_run_whose_server_hangs(site: Site, tmp_path: Path) -> None:
    hangs, resume = threading.Event(), threading.Event()

    def hang(name: str, start: int, stop: int) -> None:
        if hangs.is_set() or stop - start == PIECE:
            resume.wait(120)

    site.before = hang
    process = downloader(tmp_path, site, 99)
    assert process.stdout is not None
    assert process.stdout.readline() == "first\n", "the first batch needs samples but no shard"
    hangs.set()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=100)  # shorter than the server hangs
    resume.set()
    assert "KeyboardInterrupt" in stderr


@pytest.fixture
def s3(digits: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A local S3 server with the set at s3://bucket/digits; yields the environment variables for it."""
    import boto3

    url = f"http://127.0.0.1:{free_port()}"
    access = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, "-m", "moto.server", "-p", url.rpartition(":")[2]]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: answers(url), "moto", interval=0.1)
            client = boto3.client(
                "s3",
                endpoint_url=url,
                aws_access_key_id="test",
                aws_secret_access_key="test",
                region_name="us-east-1",
            )
            client.create_bucket(Bucket="bucket")
            for path in digits.iterdir():
                client.upload_file(str(path), "bucket", f"digits/{path.name}")
            yield {"AWS_ENDPOINT_URL": url, **access}
        finally:
            server.kill()


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except OSError:
        return False
    return True


def test_s3(
    launch: Launcher,
    s3: dict[str, str],
    digits: Path,
    tmp_path: Path,
    local: Sequence,
) -> None:
    cache = tmp_path / "cache"
    ranks = Ranks(launch, tmp_path, "--data", "s3://bucket/digits", "--cache", cache, *OPTIONS, **s3)
    ranks.start(2, 0, STEPS, pace=0.1)
    assert ranks.join().steps == local
    for name in shards(digits):
        (staged,) = cached(cache, name)
        assert staged.read_bytes() == (digits / name).read_bytes()
    command = [sys.executable, "launch/train.py", "--data", "s3://bucket/nothing-here", "--cache", str(cache)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path, **s3), capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert "s3://bucket/nothing-here/dataset.json: not found on the server" in result.stderr
    assert result.stderr.count("error") == 1
