"""Class folders named like images, annotations, or splits are rejected or reported as warnings."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.errors import UserError
from shards.format.manifest_fields import ClassEntry
from shards.sources.layouts.detect import scan
from shards.sources.naming.folder_names import class_name_warnings
from shards.sources.naming.splits import similar_split, splits_in
from shards.sources.scan import Scan, ScanOptions
from tests.support.source_folders.source import put_files, put_images

ANNOTATIONS = (
    "masks",
    "Masks",
    "labels",
    "annotations",
    "trimaps",
    "depth",
    "gt",
    "ground_truth",
    "SegmentationClass",
    "mask",
)
IMAGES = ("images", "Images", "imgs", "JPEGImages", "image", "img_dir", "photos", "rgb")


def scan_it(source: Path) -> Scan:
    return scan(source, ScanOptions(workers=1), source.parent / "spool")


def error_of(source: Path) -> str:
    with pytest.raises(UserError) as caught:
        scan_it(source)
    return str(caught.value)


def warnings(*names: str) -> str:
    return "\n".join(class_name_warnings([ClassEntry(folder=name) for name in names]))


@pytest.mark.parametrize("annotations", ANNOTATIONS)
@pytest.mark.parametrize("folder", ["", "train/", "unpacked/"])
def test_images_and_their_annotations_are_not_two_classes(annotations: str, folder: str, tmp_path: Path) -> None:
    put_images(tmp_path / "in", f"{folder}{{images,{annotations}}}/{{1,2}}.jpg")
    message = error_of(tmp_path / "in")
    assert f"{tmp_path / 'in' / folder}: no class folders in it, only " in message
    assert f"'{annotations}'" in message
    assert "/CLASS/IMAGE: create a folder for each class" in message


@pytest.mark.parametrize("images", IMAGES)
def test_image_folders_of_any_name_next_to_masks_are_not_classes(images: str, tmp_path: Path) -> None:
    put_images(tmp_path / "in", f"{{{images},masks}}/{{1,2}}.jpg")
    assert "no class folders in it, only " in error_of(tmp_path / "in")


@pytest.mark.parametrize(
    "names",
    [
        "images",
        "JPEGImages",
        "jpg",
        "photos",
        "images_001,images_002",
        "images,masks,depth",
        "JPEGImages,SegmentationClass,SegmentationObject",
    ],
)
def test_folders_of_images_without_classes_are_rejected_with_a_remedy(names: str, tmp_path: Path) -> None:
    put_images(tmp_path / "in", f"{{{names}}}/{{1,2}}.jpg")
    assert f"expected images as {tmp_path}/in/CLASS/IMAGE: create a folder for each class" in error_of(tmp_path / "in")


@pytest.mark.parametrize("exported", ["{train,valid}/", "", "VOCdevkit/VOC2012/"])
def test_following_the_advice_for_detection_data_sets_works(exported: str, tmp_path: Path) -> None:
    """The advice must not be to fill or remove the annotations: the remaining folder would be a class of all images."""
    source = tmp_path / "in"
    put_images(source, f"{exported}{{JPEGImages,SegmentationClass}}/{{1,2}}.jpg")
    put_files(source, f"{exported}{{Annotations/1.xml,ImageSets/Main/train.txt,labels/1.txt}}", "x")
    message = error_of(source)
    assert "add images" not in message
    assert "create a folder for each class" in message
    for folder in [path for path in source.rglob("*") if path.name in ("JPEGImages", "SegmentationClass")]:
        for name in ("cat", "dog"):
            (folder.parent / name).mkdir(exist_ok=True)
        for image in folder.iterdir():
            image.rename(folder.parent / ("cat" if image.stem == "1" else "dog") / image.name)
        folder.rmdir()
    message = error_of(source)
    assert "move the folder out of the source if it is not a class" in message
    for folder in [path for path in source.rglob("*") if path.name in ("Annotations", "ImageSets", "labels")]:
        folder.rename(tmp_path / str(folder).replace("/", "-"))
    assert [entry.folder for entry in scan_it(source).classes] == ["cat", "dog"]


@pytest.mark.parametrize("other", ["meta/classes.txt", "Annotation/a/1", "labels/1.txt", "segmentations/a/1.png"])
def test_the_error_names_the_images_folder_that_contains_class_folders(other: str, tmp_path: Path) -> None:
    put_images(tmp_path / "in", "images/{a,b}/{1,2}.jpg")
    put_files(tmp_path / "in", other, "x") if not other.endswith("png") else put_images(tmp_path / "in", other)
    assert f"if the folders in {tmp_path}/in/images are the classes, convert that folder" in error_of(tmp_path / "in")
    assert [entry.folder for entry in scan_it(tmp_path / "in" / "images").classes] == ["a", "b"]


@pytest.mark.parametrize(
    "names",
    [
        "cat dog images",
        "cat dog masks",
        "JPEGImages cat",
        "labels masks cat",
        "image mask cat",
        "depth mask",
        "annotations good",
        "pets_images_part_1 pets_images_part_2",
    ],
)
def test_containers_among_few_classes_cause_a_warning(names: str) -> None:
    message = warnings(*names.split())
    assert "read as" in message
    assert "named like" in message


@pytest.mark.parametrize(
    "names",
    [
        "mask no_mask",
        "with_mask without_mask",
        "label_0 label_1",
        "photo sketch painting",
        "fake_images real_images",
        "person_1 person_2",
        "depths_of_hell cat",
        "imagesque masked",
        "boxes bottles",
        "masks猫 dogs",
        " ".join(["masks", *(f"n{i:08d}" for i in range(1000))]),
        " ".join(["images", "labels", *(f"class{i}" for i in range(20))]),
        "train_station trains trainer testimonials valley validated tested contest evaluation_of_pets",
    ],
)
def test_real_classes_cause_no_warning(names: str) -> None:
    assert warnings(*names.split()) == ""


SIMILAR = {
    "train": "trainings trn trainimages trainimgs",
    "val": "evaluation Evaluation evaluations evaluate evals validate validations valids vals held_out HeldOut valimgs",
    "test": "tests Tests tests2 testings tst testimages testfolder",
}


@pytest.mark.parametrize(
    ("name", "split"),
    [(name, split) for split, names in SIMILAR.items() for name in names.split()],
)
@pytest.mark.parametrize("below", ["{1,2}.jpg", "{a,b}/{1,2}.jpg"])
def test_class_folders_with_names_similar_to_splits_cause_a_warning(
    name: str, split: str, below: str, tmp_path: Path
) -> None:
    put_images(tmp_path / "in", f"{{cat,dog,{name}}}/{below}")
    found = scan_it(tmp_path / "in")
    assert len(found.classes) == 3
    (warning,) = found.warnings
    assert warning.startswith(f"'{name}': read as a class, although its name resembles split '{split}'")
    assert f"expected {split}/CLASS/IMAGE" in warning


@pytest.mark.parametrize(
    "name", ["train_data", "training_set", "trainset", "testset", "val2017", "train2017", "test", "eval", "hold-out"]
)
def test_names_of_splits_are_splits_not_similar_names(name: str, tmp_path: Path) -> None:
    assert splits_in(name)
    assert similar_split(name) is None
    put_images(tmp_path / "in", f"{{cat,dog,{name}}}/{{1,2}}.jpg")
    assert f"{name}: named like split " in error_of(tmp_path / "in")


def test_a_warning_is_given_for_each_similar_name(tmp_path: Path) -> None:
    put_images(tmp_path / "in", "{trainings,tests}/{cat,dog}/{1,2}.jpg")
    assert [warning.split(":")[0] for warning in scan_it(tmp_path / "in").warnings] == ["'tests'", "'trainings'"]


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("masks/1.png", "{0}/COVID/masks: named like annotations, but in a class folder; 1 image used"),
        ("ground_truth/1.png", "{0}/COVID/ground_truth: named like annotations"),
        ("labels/1.txt", "{0}/COVID/labels: named like annotations, but in a class folder; not used"),
        ("images/1_mask.png", "{0}/COVID/images: 1 image named like annotations of other images (1_mask.png)"),
        ("images/1_mask_1.png", "{0}/COVID/images: 1 image named like annotations of other images (1_mask_1.png)"),
        ("tests/1.png", "{0}/COVID/tests: train images (1) in a folder named like another split"),
        ("images/3_mask.png", None),  # there is no image 3.png
        ("images/mask.png", None),
        ("depth of field/1.png", None),
    ],
)
def test_annotations_in_class_folders_cause_a_warning(inside: str, message: str | None, tmp_path: Path) -> None:
    source = tmp_path / "in"
    put_images(source, "{COVID,Normal}/images/{1,2}.png")
    put_images(source, f"COVID/{inside}") if inside.endswith("png") else put_files(source, f"COVID/{inside}", "x")
    found = scan_it(source).warnings
    assert len(found) == (message is not None)
    assert message is None or found[0].startswith(message.format(source))
