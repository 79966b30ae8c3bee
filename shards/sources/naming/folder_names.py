"""Detect folders whose names suggest that they are not classes: images/ next to masks/, or tests/."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from shards.errors import UserError
from shards.format.manifest_fields import ClassEntry
from shards.sources.naming.classes import join_first, quoted
from shards.sources.naming.splits import similar_split
from shards.sources.scan import TRAIN
from shards.sources.walk import list_folder

FEW_CONTAINERS = 10
"""Number of classes up to which a name such as `images` or `masks` causes a warning; among 1,000 it may be a class."""
FEW_SIMILAR_TO_SPLITS = 100
"""Number of classes up to which a name such as `tests` or `evaluation` causes a warning."""
_IMAGES = frozenset(("images", "imgs", "jpegs", "jpgs", "photos", "pictures", "pngs", "tifs", "tiffs"))
_ANNOTATIONS = frozenset(
    (
        *("annos", "annotations", "anns", "bboxes", "depthmaps", "groundtruth", "heatmaps", "keypoints", "labels"),
        *("masks", "segmentations", "trimaps", "xmls"),
    )
)
_PAIRS = frozenset(("ground", "truth")), frozenset(("image", "sets"))
"""Pairs of words that together denote annotations."""
_IMAGE_WORDS = _IMAGES | {"bmp", "image", "img", "jpeg", "jpg", "photo", "picture", "png", "rgb", "tif", "tiff"}
"""Words for images. Singulars denote containers only next to unambiguous containers: mask and no_mask are classes."""
_ANNOTATION_WORDS = _ANNOTATIONS | {
    *("ann", "anno", "annotation", "bbox", "boxes", "csv", "depth", "depths", "edges", "flow", "gt", "json", "label"),
    *("mask", "normals", "seg", "segmentation", "trimap", "txt", "xml"),
}
_FILLERS = frozenset(
    (
        *("all", "batch", "chunk", "class", "data", "dataset", "dir", "files", "folder", "full", "maps", "object"),
        *("original", "originals", "part", "raw", "resized", "set"),
    )
)
"""Words without meaning of their own in the name of a container."""
_IN_CLASSES = _ANNOTATIONS | {"annotation", "gt", "label", "mask"}
_ANNOTATION_OF = re.compile(
    rb"(.+)[-_. ](?:mask|seg|segmentation|label|gt|depth|annotation)s?(?:[-_ ]?\d+)?\.[^./]+", re.I | re.S
)
_INSPECTED = 16
"""Number of subfolders that are inspected to find images in one of them."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+")


def is_image_container(name: str) -> bool:
    """Return whether a folder's name means only that it contains images: `Images`, `img_dir`."""
    words = _words(name)
    return _only(words, _IMAGE_WORDS) and not words & _ANNOTATION_WORDS


def is_annotation_container(name: str) -> bool:
    """Return whether a folder's name means that it contains annotations: `masks`, `ground_truth`."""
    words = _words(name)
    return _has_pair(words) or (_only(words, _IMAGE_WORDS | _ANNOTATION_WORDS) and not is_image_container(name))


def is_annotation_subfolder(name: str) -> bool:
    """Return whether the name of a folder in a class folder means annotations, not images of the class."""
    words = _words(name)
    return is_annotation_container(name) and (_has_pair(words) or bool(words & _IN_CLASSES))


def find_annotation_images(images: Sequence[bytes]) -> list[bytes]:
    """Return the images of a folder that are named like annotations of other images: 1_mask.png next to 1.png."""
    stems = {os.path.splitext(image)[0] for image in images} if any(map(_ANNOTATION_OF.fullmatch, images)) else set()
    return [image for image in images if (match := _ANNOTATION_OF.fullmatch(image)) and match[1] in stems]


def reject_containers(roots: Mapping[str, Path]) -> None:
    """Reject splits in which no folder can be a class: only images/, or images/ next to masks/.

    Args:
        roots: split -> the folder that contains its class folders.

    Raises:
        UserError: all folders of a split are named like containers, at least one of them like a container of images
            and at least one unambiguously.
    """
    for root in roots.values():
        names = [os.fsdecode(name) for name in list_folder(root).folders]
        if not names or len(_containers(names)) < len(names):
            continue
        of_images, unambiguous = any(map(is_image_container, names)), any(map(_is_unambiguous, names))
        if not (of_images and unambiguous) and not (len(names) == 1 and (of_images or unambiguous)):
            continue
        raise UserError(
            f"{root}: no class folders in it, only {_quoted(names)}, which are named like folders of images or "
            f"annotations; {_advice(root, names)}; if one of them is a class, rename it"
        )


def find_nested_class_root(root: Path, names: Sequence[str]) -> Path | None:
    """Return the image container among `names` that contains folders of images, which may be the classes."""
    nested = [root / name for name in names if is_image_container(name) and _holds_folders_of_images(root / name)]
    return nested[0] if len(nested) == 1 else None


def _holds_folders_of_images(folder: Path) -> bool:
    contents = list_folder(folder)
    inside = (list_folder(folder / os.fsdecode(name)) for name in contents.folders[:_INSPECTED])
    return not contents.images and any(one.images for one in inside)


def _advice(root: Path, names: Sequence[str]) -> str:
    nested = find_nested_class_root(root, names)
    if nested is not None:
        return f"if the folders in {nested} are the classes, convert that folder"
    return f"expected images as {root}/CLASS/IMAGE: create a folder for each class and move its images there"


def class_name_warnings(classes: Sequence[ClassEntry]) -> list[str]:
    """Return warnings about class folders whose names suggest that they are not classes."""
    names = [entry.folder for entry in classes]
    lines = []
    containers = _containers(names)
    if len(names) <= FEW_CONTAINERS and (any(map(_is_unambiguous, containers)) or len(containers) > 1):
        lines.append(
            f"{_quoted(containers)}: read as {'classes' if len(containers) > 1 else 'a class'}, although named like "
            "folders of images or annotations; move folders that are not classes out of the source"
        )
    elif _differ_by_number(names):
        lines.append(
            f"{_quoted(names)}: read as classes, although named like parts of one set of images; expected one folder "
            "per class"
        )
    near = {name: split for name in names if (split := similar_split(name))}
    if len(names) <= FEW_SIMILAR_TO_SPLITS:
        lines += [
            f"{quoted(name)}: read as a class, although its name resembles split '{split}'; if it is that split, "
            f"rename it: expected {split}/CLASS/IMAGE{'' if split == TRAIN else f' next to {TRAIN}/CLASS/IMAGE'}"
            for name, split in near.items()
        ]
    return lines


def _containers(names: Sequence[str]) -> list[str]:
    """Return the folders that are named like containers. Folders `label_0` and `label_1` may be classes."""
    found = [name for name in names if is_image_container(name) or is_annotation_container(name)]
    numbered = len(names) > 1 and len(set(map(_words, names))) == 1 and not any(map(_is_unambiguous, names))
    return [] if numbered else found


def _is_unambiguous(name: str) -> bool:
    """Return whether a container's name is unambiguous: a plural, or a word that cannot be the subject of an image."""
    words = _words(name)
    return _has_pair(words) or bool(words & (_IMAGES | _ANNOTATIONS))


def _has_pair(words: frozenset[str]) -> bool:
    return any(pair <= words for pair in _PAIRS)


def _differ_by_number(names: Sequence[str]) -> bool:
    """Return whether the names denote parts of one set: `pets_images_part_1` and `pets_images_part_2`."""
    words = {frozenset(_words(name)) for name in names}
    return len(names) > 1 and len(words) == 1 and bool(next(iter(words)) & _IMAGES)


def _only(words: frozenset[str], allowed: frozenset[str]) -> bool:
    """Return whether all words are `allowed` words or filler words, and at least one is an `allowed` word."""
    return bool(words & allowed) and words <= allowed | _FILLERS


def _words(name: str) -> frozenset[str]:
    """Return the words of a name in lower case; `JPEGImages` has two."""
    return frozenset(word.lower() for word in _WORD.findall(name))


def _quoted(names: Iterable[str]) -> str:
    return join_first(map(quoted, names))
