"""`pipeline` exports the loaders and what they are made of, and `train_loader` and `eval_loader` for the usual case."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import pipeline
from pipeline import LoaderOptions, UserError, augment_recipe, eval_loader, open_set, train_loader
from shards.cores import cores

ROOT = Path(__file__).parents[2]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", pipeline.__all__)
def test_public_names_are_documented(name: str) -> None:
    found = getattr(pipeline, name)
    assert found.__name__ == name
    assert inspect.getdoc(found)
    assert f"::: pipeline.{name}\n" in (ROOT / "docs" / "api.md").read_text()


def test_there_are_no_other_public_names() -> None:
    assert set(pipeline.__all__) == pipeline._DEFINED_IN.keys()
    assert set(pipeline.__all__) <= set(dir(pipeline))
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'DataLoader'"):
        pipeline.DataLoader  # noqa: B018 - raises


def test_importing_the_package_imports_no_library() -> None:
    """The console script and the feed process import it, and do not need torch."""
    program = "import sys, pipeline; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_a_loader_from_a_path_and_a_batch_size(digits: Path) -> None:
    with train_loader(digits, batch_size=24, size=32) as loader:
        (batch, *_) = loader
    assert len(loader) == 1437 // 24
    assert (loader.rank, loader.world, loader.device) == (0, 1, torch.device("cpu"))
    assert loader.class_names[:2] == ["0_zero", "1_one"]
    assert batch.images.shape == (24, 3, 32, 32)
    assert batch.targets.shape == (24, 10)


def test_all_forms_of_the_arguments_give_the_same_batches(digits: Path) -> None:
    forms: list[dict[str, Any]] = [
        {"dataset": digits, "augment": "fat", "size": 32, "batch_size": 24},
        {"dataset": str(digits), "augment": augment_recipe("fat", size=32), "global_batch": 24, "device": "cpu"},
        {
            "dataset": open_set(digits),
            "augment": augment_recipe("fat", size=96),
            "size": 32,
            "global_batch": 24,
            "batch_size": 24,
            "device": torch.device("cpu"),
        },
    ]
    images = []
    for form in forms:
        with train_loader(form.pop("dataset"), **form) as loader:
            images.append(next(iter(loader)).images)
    assert all(torch.equal(each, images[0]) for each in images)


def test_the_batch_size_is_that_of_a_process(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with train_loader(digits, batch_size=24, size=32) as loader:
        assert (loader.rank, loader.world, len(loader)) == (1, 3, 1437 // 72)
        assert len(next(iter(loader)).ids) == 24
        assert loader.resolved["threads"] == f"{max(cores() // 3, 1)} decode, 32 read"
    with train_loader(digits, batch_size=24, global_batch=144, size=32) as loader:
        assert [batch.micro for batch in loader] == [0, 1] * (1437 // 144)
    with eval_loader(digits, batch_size=60, size=32) as evaluation:
        ids = [i for batch in evaluation for i in batch.ids.tolist()]
    assert len(evaluation) == 2
    assert ids == [*range(60, 120), *range(240, 300)]


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_torch_distributed_comes_before_the_environment(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with train_loader(digits, batch_size=24, size=32) as loader:
        assert (loader.rank, loader.world) == (0, 1)
    with train_loader(digits, batch_size=24, size=32, rank=4, world=5) as loader:
        assert (loader.rank, loader.world) == (4, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give batch_size (images per process) or global_batch"),
        ({"batch_size": 0}, "batch_size 0: expected a whole number, at least 1"),
        ({"batch_size": 8.0}, "batch_size 8.0: expected a whole number"),
        ({"batch_size": 7}, "batch_size 7: must be even, because mixup and CutMix mix images in pairs; use 8"),
        ({"batch_size": 4096}, "1437 training images are fewer than one global batch of 4096"),
        ({"global_batch": 50, "world": 4, "rank": 0}, "world size 4 does not divide the global batch of 50"),
        ({"global_batch": 48, "batch_size": 18}, "micro-batch 18 does not divide the 48 rows of a rank"),
        ({"batch_size": 8, "rank": 1}, "rank 1 and world None: give both"),
        ({"batch_size": 8, "rank": 2, "world": 2}, "rank 2 is out of range for a world size of 2"),
        ({"batch_size": 8, "device": "gpu"}, "device gpu: expected cpu, cuda or cuda:N"),
        ({"batch_size": 8, "device": "meta"}, "device meta: expected cpu, cuda or cuda:N"),
        ({"batch_size": 8, "size": 0}, "size 0: expected a whole number, at least 1"),
        ({"batch_size": 8, "epochs": -1}, "epochs -1: expected a whole number, at least 1"),
        ({"batch_size": 8, "augment": "heavy"}, "augmentation 'heavy': expected one of fat, light, none"),
        ({"batch_size": 8, "split": "test"}, "no split 'test' (it has: train, val)"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(digits: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        train_loader(digits, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_a_gpu_on_a_machine_without_one_is_refused(digits: Path, device: torch.device | str) -> None:
    with pytest.raises(UserError, match=f"device {device}: this process has no GPU that torch can use; use cpu"):
        eval_loader(digits, batch_size=8, device=device)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK is first: expected a whole number"),
    ],
)
def test_an_incomplete_launcher_environment_is_refused(
    digits: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        eval_loader(digits, batch_size=8)


def test_a_program_that_does_not_close_its_loader_ends(digits: Path) -> None:
    program = f"""
from pipeline import LoaderOptions, train_loader
loader = train_loader({str(digits)!r}, batch_size=16, size=32)
for batch in loader:
    break
print(batch.images.shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_options_of_the_loader_are_kept(digits: Path) -> None:
    with train_loader(digits, batch_size=16, options=LoaderOptions(decode_threads=3, read_threads=4)) as loader:
        assert loader.resolved["threads"] == "3 decode, 4 read"
