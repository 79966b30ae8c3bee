"""A training loader is iterated by epoch, like torch's DataLoader, and resumes from its state with the next batch."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import Batch, LoaderOptions, Position, TrainLoader, UserError, eval_loader, train_loader

GLOBAL = 144
STEPS = 1437 // GLOBAL  # per epoch of the digits
WORLDS = (1, 2, 3)
# The samples and positions of the real loaders, without their pixels.
NO_PIXELS = LoaderOptions(loader="synthetic")


def open_loader(digits: Path, **arguments: Any) -> TrainLoader:
    given = {"global_batch": GLOBAL, "size": 32, "augment": "light", "options": NO_PIXELS, "rank": 0, "world": 1}
    return train_loader(digits, **given | arguments)


def row(batch: Batch) -> tuple[Position, int, list[int]]:
    return batch.position, batch.micro, batch.ids.tolist()


def test_each_loop_delivers_the_next_epoch(digits: Path) -> None:
    with open_loader(digits, epochs=2, options=None) as loader:
        assert len(loader) == STEPS
        for epoch in range(2):
            assert loader.epoch == epoch
            batches = list(loader)
            assert [batch.position for batch in batches] == [(epoch, step) for step in range(STEPS)]
            assert len({i for batch in batches for i in batch.ids.tolist()}) == STEPS * GLOBAL
        with pytest.raises(UserError, match="all 2 epochs of this loader have been delivered"):
            iter(loader)
        assert list(loader.stream()) == []


def test_the_next_epoch_is_prefetched_while_an_epoch_ends(digits: Path) -> None:
    with open_loader(digits) as loader:
        list(loader)
        prefetcher = loader._prefetcher
        assert next(iter(loader)).position == (1, 0)
        assert loader._prefetcher is prefetcher, "the background thread of the first epoch continues"


@settings(max_examples=12)
@given(world=st.sampled_from(WORLDS), data=st.data())
def test_epochs_one_after_another_are_the_stream_that_a_training_uses(
    digits: Path, world: int, data: st.DataObject
) -> None:
    shape = {"world": world, "rank": data.draw(st.integers(0, world - 1)), "seed": data.draw(st.integers(0, 9))}
    shape["batch_size"] = data.draw(st.sampled_from([n for n in (8, 12, 24) if GLOBAL // world % n == 0]))
    with open_loader(digits, epochs=3, **shape) as stream, open_loader(digits, epochs=3, **shape) as loader:
        expected = [row(batch) for batch in stream.stream()]
        assert len(expected) == 3 * len(loader)
        assert [row(batch) for _ in range(3) for batch in loader] == expected


def two_epochs(loader: TrainLoader) -> Iterator[Batch]:
    yield from loader
    yield from loader


def steps_of(digits: Path, world: int, states: list[Any], count: int) -> Iterator[tuple[Position, list[int]]]:
    """Yield the next `count` global batches of `world` ranks. `states` gets the state of every rank after each."""
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(open_loader(digits, world=world, rank=rank)) for rank in range(world)]
        for loader in ranks if states else ():
            loader.load_state_dict(states[-1])
        for batches in islice(zip(*map(two_epochs, ranks), strict=True), count):
            (position,) = {batch.position for batch in batches}
            states += [loader.state_dict() for loader in ranks]
            yield position, [i for batch in batches for i in batch.ids.tolist()]


@settings(max_examples=10)
@given(segments=st.lists(st.tuples(st.sampled_from(WORLDS), st.sampled_from([1, 2, 5, STEPS])), min_size=2, max_size=4))
def test_a_state_resumes_with_the_next_batch_at_any_world_size(digits: Path, segments: list[tuple[int, int]]) -> None:
    """Also after the last batch of an epoch, whose state is the beginning of the next epoch."""
    total = sum(count for _, count in segments)
    expected = list(islice(((batch.position, batch.ids.tolist()) for batch in open_loader(digits).stream()), total))
    states: list[Any] = []
    found = [each for world, count in segments for each in steps_of(digits, world, states, count)]
    assert found == expected
    assert all(state["plan"] == states[0]["plan"] for state in states)


def test_the_pixels_of_a_resumed_epoch_are_the_same(digits: Path) -> None:
    with open_loader(digits, augment="fat", options=None) as loader:
        batches = iter(loader)
        for _ in range(STEPS - 2):
            next(batches)
        state, expected = loader.state_dict(), [*batches, next(iter(loader))]
    with open_loader(digits, augment="fat", options=None) as loader:
        loader.load_state_dict(state)
        found = [*loader, next(iter(loader))]
    assert [batch.position for batch in found] == [(0, STEPS - 2), (0, STEPS - 1), (1, 0)]
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(found, expected, strict=True))


def test_a_loop_that_was_left_is_followed_by_the_next_epoch(digits: Path) -> None:
    with open_loader(digits) as loader:
        next(iter(loader))
        assert [batch.position for batch in loader] == [(1, step) for step in range(STEPS)]
        next(iter(loader))
        loader.load_state_dict(loader.state_dict())  # continue instead
        assert [batch.position for batch in loader] == [(2, step) for step in range(1, STEPS)]


def test_an_iterator_of_an_earlier_loop_does_not_take_batches_of_a_later_one(digits: Path) -> None:
    with open_loader(digits) as loader:
        first = iter(loader)
        next(first)
        iter(loader)  # begins no loop, because no batch is taken
        assert next(first).position == (0, 1)
        second = iter(loader)
        assert next(second).position == (1, 0)
        with pytest.raises(RuntimeError, match="another loop over the same loader was begun"):
            next(first)
        assert next(second).position == (1, 1)


@pytest.mark.parametrize(
    ("batches", "epoch", "first"),
    [
        (0, 0, (0, 0)),
        (0, 4, (4, 0)),  # as with DistributedSampler
        (2, 0, (0, 0)),  # a loop that was left is repeated
        (STEPS, 1, (1, 0)),
        (STEPS, 0, (0, 0)),
    ],
)
def test_set_epoch_determines_the_next_loop(digits: Path, batches: int, epoch: int, first: tuple[int, int]) -> None:
    with open_loader(digits) as loader:
        for _ in islice(loader, batches):
            pass
        loader.set_epoch(epoch)
        assert [batch.position for batch in loader] == [(first[0], step) for step in range(STEPS)]


def test_set_epoch_continues_the_epoch_of_a_loaded_state(digits: Path) -> None:
    with open_loader(digits) as loader:
        loader.load_state_dict(loader.state_dict() | {"epoch": 3, "step": 7})
        for epoch in (3, 4):
            loader.set_epoch(epoch)
            positions = [batch.position for batch in loader]
            assert positions == [(epoch, step) for step in range(7 if epoch == 3 else 0, STEPS)]
        with pytest.raises(UserError, match="epoch -1, step 0: expected whole numbers"):
            loader.set_epoch(-1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"global_batch": 96}, "global_batch was 144, and is 96"),
        ({"seed": 1}, "seed was 0, and is 1"),
        ({"lanes": 12}, "lanes was 36, and is 12"),
        ({"shuffle_block_size": 64}, "shuffle_block_size was 4096, and is 64"),
        ({"split": "val", "global_batch": 96}, "samples was 1437, and is 360"),
    ],
)
def test_states_of_other_plans_are_refused(digits: Path, changed: dict[str, Any], message: str) -> None:
    with open_loader(digits) as one, open_loader(digits, **changed) as other:
        with pytest.raises(UserError, match=f"the loader's state is of another plan .*{message}"):
            other.load_state_dict(one.state_dict())
        assert next(iter(other)).position == (0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": STEPS}, "a step from 0 to 8"),
        ({"epoch": "3"}, "expected whole numbers"),
        ({"plan": None}, "not a state of a training loader"),
    ],
)
def test_damaged_states_are_refused(digits: Path, changes: dict[str, Any], message: str) -> None:
    with open_loader(digits) as loader, pytest.raises(UserError, match=message):
        loader.load_state_dict(loader.state_dict() | changes)


def test_states_of_evaluations_of_other_splits_are_refused(digits: Path) -> None:
    def loader(split: str) -> Any:
        return eval_loader(digits, batch_size=100, size=32, split=split, options=NO_PIXELS, rank=0, world=1)

    with loader("val") as val, loader("train") as train:
        train.load_state_dict(train.state_dict() | {"samples": 1400})
        assert len(train) == 1
        with pytest.raises(UserError, match="not one of an evaluation of this split, which has 1437 samples"):
            train.load_state_dict(val.state_dict())
        with pytest.raises(UserError, match="not one of an evaluation"):
            val.load_state_dict({"epoch": 0})


def test_a_closed_evaluation_is_restarted_by_the_next_loop(digits: Path) -> None:
    with eval_loader(digits, batch_size=100, size=32, options=NO_PIXELS, rank=0, world=1) as loader:
        next(iter(loader))
        loader.close()
        assert next(iter(loader)).position == (0, 0)
        assert loader.state_dict()["samples"] == 100
        loader.close()
        loader.load_state_dict(loader.state_dict())
        assert next(iter(loader)).planned.tolist() == list(range(100, 200))


UNCLOSED = """
import atexit, threading

atexit.register(lambda: print([thread.name for thread in threading.enumerate() if "loader" in thread.name]))
from pipeline import LoaderOptions, train_loader

options = LoaderOptions(feed_process={feed!r}, decode_threads=1)
for batch in train_loader({data!r}, batch_size=8, size=32, options=options, device="cpu"):
    print([thread.name for thread in threading.enumerate() if "loader" in thread.name], flush=True)
    {end}
"""


@pytest.mark.parametrize(("feed", "end", "status"), [("on", "break", 0), ("off", "raise ValueError", 1)])
def test_a_program_that_does_not_close_its_loader_ends_normally(digits: Path, feed: str, end: str, status: int) -> None:
    """Otherwise its status is sometimes 134, because PyTorch aborts the process."""
    script = UNCLOSED.format(data=str(digits), feed=feed, end=end)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines() == ["['train-loader']", "[]"]
