"""The split of a folder, tar, or Parquet file follows from its path by the same rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.errors import UserError
from shards.sources.naming.splits import assign_splits, named_split, names_only_a_split

SPLITS = {
    "train": """
        train
        Train
        TRAIN
        training
        Training/0.tar
        trainval-0.tar
        train2017/000000.tar
        train_set
        TrainSet
        trainset/0.parquet
        traindata
        TRAINING_DATA
        pets-train-0.tar
        pets.train.0.tar
        pets_train_00001.tar
        pets train 1.tar
        imagenet1k-train-0000.tar
        imagenet21k_train
        ILSVRC2012_img_train.tar
        train-000000.tar
        data/train-00000-of-00002.parquet
        default/train/0000.parquet
        default/partial-train/0000.parquet
        refs/convert/parquet/default/train/0000.parquet
        digits_train.parquet
        test/train-0.tar
        eval/pets/train/0.tar
        MyTrainImages/0.tar
        train数据集/0.tar
        ｔｒａｉｎ/0.tar
        training (1)/0.tar
    """,
    "val": """
        val
        Val
        VAL-0.tar
        valid
        my_valid_3.tar
        validation
        imagenet1k-validation-00.tar
        validation_matched-00000-of-00001.parquet
        val/0001.tar
        val2017
        valSet
        ValidationSet
        val_set
        ILSVRC2012_img_val.tar
        ILSVRCVal
        imagenet21k_val/0.tar
        dev
        dev-00000-of-00001.parquet
        devset.parquet
        eval
        Eval/0.parquet
        holdout
        hold-out/0.tar
        pets_holdout_0.tar
        train/val/0.tar
        val1
    """,
    "test": """
        test
        Test
        TEST/0.tar
        testing
        Testing_images
        test2
        testset
        TestSet
        testA
        digits-test.parquet
        default/test/0000.parquet
        data/test-00000-of-00001.parquet
        train/test-0.tar
        pets_test.tar
        (test)/0.tar
    """,
    None: """
        valley.tar
        testimonials.parquet
        value
        values-0.tar
        evaluation_of_pets
        evaluated.parquet
        devil
        developer/0.tar
        device-1.tar
        trained
        trainer/0.parquet
        trainee
        retrain-0.tar
        constraint.tar
        strain
        interval/0.tar
        retrieval-0.tar
        oval
        cavalier
        valide
        validé/0.tar
        contest-0.tar
        latest/0.tar
        greatest
        attestation
        testament
        tested
        holdouts
        vál
        0000.parquet
        data/shard-000001.tar
        .
    """,
}
NO_SPLIT = "no split in the name, so used for training"
TABLE = [(line.strip(), split) for split, lines in SPLITS.items() for line in lines.strip().splitlines()]


@pytest.mark.parametrize(("path", "split"), TABLE, ids=[path for path, _ in TABLE])
def test_the_split_of_a_path_follows_from_whole_words(path: str, split: str | None) -> None:
    assert named_split(path) == split


def test_the_table_is_long_enough() -> None:
    assert len(set(TABLE)) >= 100


@pytest.mark.parametrize("path", ["train_val-0.tar", "train/test-dev/0.tar", "train-test-split/0.parquet"])
def test_names_with_two_splits_are_rejected(path: str) -> None:
    with pytest.raises(UserError, match=r"contains several splits .*; rename it"):
        named_split(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train", True),
        ("Val_Set", True),
        ("test2", True),
        ("train_images", True),
        ("TrainData", True),
        ("train_station", False),
        ("test tube", False),
        ("imagenet_val", False),
        ("images", False),
        ("", False),
    ],
)
def test_names_only_a_split_is_true_for_split_names_without_other_words(name: str, expected: bool) -> None:
    assert names_only_a_split(name) == expected


@pytest.mark.parametrize(
    ("names", "notes", "warnings"),
    [
        (["train-0.tar", "train-1.tar", "val-0.tar"], [], []),
        (["train/a/0.tar", "train/b/0.tar", "val-0.tar"], [], []),
        (["a.tar", "b.tar"], [f"a.tar, b.tar: {NO_SPLIT}"], []),
        (["a.tar", "val.tar"], [f"a.tar: {NO_SPLIT}"], []),
        (["a.tar", "train.tar"], [], [f"a.tar: {NO_SPLIT}, although train* is named like split 'train'"]),
        (["dev.tar", "train.tar", "val.tar"], [], ["dev*, val*: merged into split 'val'"]),
        (["en/train/0.tar", "fr/train/0.tar"], [], ["en/train, fr/train: merged into split 'train'"]),
        (["a/train-0.tar", "b/train-0.tar"], [], ["a/train*, b/train*: merged into split 'train'"]),
    ],
)
def test_files_without_a_split_and_merged_folders_are_reported(
    names: list[str], notes: list[str], warnings: list[str]
) -> None:
    found = assign_splits([Path("in") / name for name in names], Path("in"))
    assert (list(found.notes), list(found.warnings)) == (notes, warnings)


def test_a_missing_validation_split_is_noted_if_the_test_split_has_samples() -> None:
    found = assign_splits([Path("in/train.tar"), Path("in/test.tar")], Path("in"))
    assert "in/test.tar: kept as split 'test'" in found.all_notes({"train", "test"})[0]
    assert found.all_notes({"train"}) == ()
    assert found.all_notes({"train", "test", "val"}) == ()
