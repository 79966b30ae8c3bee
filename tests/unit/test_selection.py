"""Training on some classes, and on a fraction of the images of each class (pipeline/sampling/selection.py)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline import train_loader
from pipeline.augment.recipe import augment_recipe
from pipeline.batch_shape import BatchShape
from pipeline.loader import Batch, EvalLoader, LoaderOptions, TrainLoader
from pipeline.plan import NO_SAMPLE, EvalPlan, ShardRequest, TrainPlan
from pipeline.sampling.selection import parse_classes, select, stratified
from pipeline.storage.placement import open_storage
from pipeline.storage.reader import SampleReader
from pipeline.storage.remote.shard_set import open_set
from shards.convert.convert import convert
from shards.convert.options import Format, Options
from shards.errors import UserError
from shards.format.dataset import ShardSet
from shards.format.manifest import Manifest
from shards.format.manifest_fields import ClassEntry
from tests.support.serving import serve
from tests.support.sources import class_folders
from tests.support.waiting import wait_until

CPU = torch.device("cpu")
FIXED = augment_recipe("none", size=32)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=200),
    st.floats(0, 1, exclude_min=True),
    st.floats(0, 1, exclude_min=True),
    st.integers(0, 2**63 - 1),
)
@settings(max_examples=60)
def test_a_fraction_is_stratified_and_contains_the_smaller_ones(
    labels: list[int], fraction: float, other: float, seed: int
) -> None:
    array, ids = np.array(labels), np.arange(len(labels))
    chosen = stratified(array, fraction, ids=ids, seed=seed)
    for label, size in zip(*np.unique(array, return_counts=True), strict=True):
        kept = int(chosen[array == label].sum())
        assert kept >= 1
        assert abs(kept - fraction * size) <= max(0.5, 1 - fraction * size)
    smaller, larger = (stratified(array, each, ids=ids, seed=seed) for each in sorted((fraction, other)))
    assert (smaller <= larger).all()
    assert stratified(array, 1.0, ids=ids, seed=seed).all()


def test_the_seed_chooses_the_samples_of_a_fraction() -> None:
    labels, ids = np.arange(1000) % 10, np.arange(1000)
    chosen = [stratified(labels, 0.3, ids=ids, seed=seed) for seed in (0, 1, 0)]
    assert chosen[0].tolist() == chosen[2].tolist() != chosen[1].tolist()
    assert np.flatnonzero(chosen[0])[:8].tolist() == [2, 4, 6, 13, 16, 19, 20, 22], (
        "values of the first release, which must never change"
    )


def test_loaders_deliver_the_selected_samples_with_new_labels(digits: Path) -> None:
    complete = ShardSet(digits)
    selected = select(ShardSet(digits), classes=["7_seven", "2_two", "4_four"], fraction=0.25, seed=3)
    assert [entry.folder for entry in selected.manifest.classes] == ["2_two", "4_four", "7_seven"]
    ids, labels = selected_ids(complete, [2, 4, 7], fraction=0.25, seed=3)
    assert selected.split("train").samples == len(ids) == selected.shard_samples("train").sum()
    batch, expected = one_batch(selected, feed_process="on"), one_batch(complete)
    assert sorted(batch.ids.tolist()) == list(range(len(ids)))
    assert batch.labels.tolist() == labels[batch.ids].tolist()
    # Without random augmentation, the image of a sample is the same in all batches.
    row_of = np.argsort(expected.ids)
    assert torch.equal(batch.images, expected.images[row_of[ids[batch.ids]]])


def one_batch(dataset: ShardSet, **options: Any) -> Batch:
    """Return a batch of all training images."""
    samples = dataset.split("train").samples
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=samples, seed=0)
    shape, chosen = BatchShape(global_batch=samples), LoaderOptions(**options)
    with TrainLoader(dataset, plan, shape, FIXED, epochs=1, device=CPU, options=chosen) as loader:
        return next(loader)


@pytest.mark.parametrize("form", ["tar", "ffcv"])
@pytest.mark.parametrize("remote", [False, True])
def test_the_selected_images_are_read_from_every_kind_of_storage(form: Format, remote: bool, tmp_path: Path) -> None:
    class_folders(tmp_path / "in" / "train", {"a": 20, "b": 12, "c": 9})
    convert(tmp_path / "in", tmp_path / "set", Options(format=form, shard_bytes=10_000))
    beton, cache = form == "ffcv", tmp_path / "cache"
    cache.mkdir()
    complete = ShardSet(tmp_path / "set")
    ids, labels = selected_ids(complete, [0, 2], fraction=0.4, seed=0)
    with SampleReader(open_storage(complete, "train", beton=beton)) as reader:
        expected = [image.tobytes() for image in reader.read(ids).checked().images]
    with contextlib.ExitStack() as stack:
        location = stack.enter_context(serve(tmp_path / "set")).url if remote else tmp_path / "set"
        selected = select(open_set(location, cache=cache), classes=["a", "c"], fraction=0.4)
        assert len(selected.split("train").shards) > 2
        reader = stack.enter_context(SampleReader(open_storage(selected, "train", beton=beton)))
        if remote:  # read from complete shards, which are verified by their hashes, not by requests for single samples
            shards = len(selected.split("train").shards)
            reader.prefetch(iter([ShardRequest(0, 0, list(range(shards)))]))
            kind = "train.beton.??????" if beton else "train-*.tar"
            wait_until(lambda: len(list(cache.rglob(kind))) == shards, seconds=20)
        found = reader.read(np.arange(len(ids))).checked()
    assert [image.tobytes() for image in found.images] == expected
    assert found.rows["label"].tolist() == labels.tolist()


def selected_ids(
    complete: ShardSet, labels: list[int], *, fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ids in the complete training split of the selected samples, and their new labels."""
    of_split = complete.index("train")["label"]
    ids = np.flatnonzero(np.isin(of_split, labels))
    ids = ids[stratified(of_split[ids], fraction, ids=ids, seed=seed)]
    return ids, np.searchsorted(labels, of_split[ids])


def test_an_evaluation_contains_each_image_of_the_selected_classes_once(digits: Path) -> None:
    complete, selected = ShardSet(digits), select(ShardSet(digits), classes=["3_three", "8_eight"], fraction=0.1)
    expected = np.flatnonzero(np.isin(complete.index("val")["label"], [3, 8]))
    seen = []
    for rank in range(2):
        plan = EvalPlan(selected.split("val").samples, batch=16, world=2, rank=rank)
        options = LoaderOptions(feed_process="on" if rank else "off")
        loader = EvalLoader(selected, plan, size=32, mean=FIXED.mean, std=FIXED.std, device=CPU, options=options)
        with loader:
            for batch in loader:
                ids = batch.ids[batch.ids != NO_SAMPLE]
                seen += zip(ids.tolist(), batch.labels[: len(ids)].tolist(), strict=True)
    assert sorted(seen) == [
        (i, int(label == 8)) for i, label in enumerate(complete.index("val")["label"][expected].tolist())
    ]


def test_a_selection_requests_no_shards_without_its_samples(digits: Path) -> None:
    dataset = ShardSet(digits)
    ids = np.flatnonzero(dataset.index("train")["shard"] == 0)[:20].astype(np.uint32)
    dataset.restrict(range(10), {"train": ids})
    assert len(dataset.split("train").shards) > 1
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=4, seed=0)
    requests = plan.shard_requests(plan.at(0), range(4), epochs=2)
    assert {shard for request in requests for shard in request.shards} == {0}


def test_all_classes_and_the_complete_fraction_change_nothing(digits: Path) -> None:
    dataset = select(ShardSet(digits), classes=10, fraction=1.0)
    assert not dataset.restricted
    assert dataset.manifest == Manifest.load(digits)


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of the classes cat, crane and ox, of which ox has no validation images. Two have the name crane."""
    folder = tmp_path_factory.mktemp("animals")
    class_folders(folder / "in" / "train", {"cat": 4, "crane": 4, "ox": 4})
    class_folders(folder / "in" / "val", {"cat": 2, "crane": 2}, first=5000)
    convert(folder / "in", folder / "set", Options())
    manifest = Manifest.load(folder / "set")
    classes = tuple(ClassEntry(folder=f"n{i}", name=name) for i, name in enumerate(("crane", "crane", "tench, Tinca")))
    Manifest(classes=classes, splits=manifest.splits, made=manifest.made).save(folder / "set")
    return folder / "set"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crane", "2 classes named 'crane'; use their folder names: n0, n1"),
        ("n0,folder-n1", r"no class 'folder-n1' \(its 3 classes begin with n0, n1, n2\)"),
        ("n0,tench Tinca", r"no class 'tench Tinca'; did you mean tench, Tinca\? "),
        ("4", "--classes-subset 4: .*3 classes; expected a number from 1 to 3"),
        ("0", "--classes-subset 0: "),
        (" , ", "contains no class; expected a number, NAME,NAME,... or @FILE"),
        ("@/nowhere", "--classes-subset @/nowhere: cannot be read"),
    ],
)
def test_an_unknown_or_ambiguous_class_is_rejected(animals: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(ShardSet(animals), classes=parse_classes(text))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": "n0,n2"}, "classes 'n0,n2': expected a list of class names, or a number of classes"),
        ({"classes": []}, r"classes \[\]: expected a list"),
        ({"classes": True}, "classes True: expected a list"),
        ({"fraction": 0.0}, r"fraction 0\.0: expected a number above 0, at most 1"),
        ({"fraction": 10}, "fraction 10: "),
        ({"fraction": float("nan")}, "fraction nan: "),
    ],
)
def test_invalid_arguments_are_rejected(animals: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(ShardSet(animals), **arguments)


def test_a_selection_of_a_selection_is_rejected(animals: Path) -> None:
    dataset = select(ShardSet(animals), classes=["n1", "n2"])
    with pytest.raises(UserError, match="were already selected; open the set again"):
        select(dataset, classes=["n2"])  # its labels are those of the selection, not those of the set
    assert [entry.folder for entry in dataset.manifest.classes] == ["n1", "n2"]


def test_classes_are_named_by_folder_or_name_or_number_and_keep_their_order(animals: Path, tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("tench, Tinca\n\nn0\n")
    for text in (f"@{file}", "n2, n0", "n0,n2,n0"):
        dataset = select(ShardSet(animals), classes=parse_classes(text))
        assert [entry.folder for entry in dataset.manifest.classes] == ["n0", "n2"]
    assert [c.folder for c in select(ShardSet(animals), classes=parse_classes("2")).manifest.classes] == ["n0", "n1"]


def test_a_split_without_images_of_the_classes_is_removed(animals: Path) -> None:
    dataset = select(ShardSet(animals), classes=["n2"])
    assert set(dataset.manifest.splits) == {"train"}
    assert set(dataset.complete_manifest.splits) == {"train", "val"}


def test_a_selection_without_training_images_is_rejected(animals: Path, tmp_path: Path) -> None:
    class_folders(tmp_path / "in" / "train", {"a": 4})
    class_folders(tmp_path / "in" / "val", {"a": 2, "b": 2}, first=5000)
    convert(tmp_path / "in", tmp_path / "set", Options())
    with pytest.raises(UserError, match="the training split has no images of these classes"):
        select(ShardSet(tmp_path / "set"), classes=["b"])


def test_the_state_of_a_loader_is_refused_by_one_of_other_samples(digits: Path) -> None:
    def loader(seed: int, class_balance: float = 0.0) -> TrainLoader:
        dataset = select(ShardSet(digits), fraction=0.5, seed=seed)
        return train_loader(dataset, batch_size=8, size=32, augment="light", device="cpu", class_balance=class_balance)

    state = loader(0).state_dict()
    loader(0).load_state_dict(state)
    for other, changed in ((loader(1), "selection was"), (loader(0, 1.0), r"class_balance was 0\.0, and is 1\.0")):
        with pytest.raises(UserError, match=changed):
            other.load_state_dict(state)
