"""Names of class folders that say something else than a class: images/ beside masks/, or tests/."""

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
"""Classes among which `images` or `masks` is hardly one of them. Among a thousand it may be."""
FEW_SIMILAR_TO_SPLITS = 100
"""Classes among which `tests` or `evaluation` is hardly one of them."""
_IMAGES = frozenset(("images", "imgs", "jpegs", "jpgs", "photos", "pictures", "pngs", "tifs", "tiffs"))
_ANNOTATIONS = frozenset(
    (
        *("annos", "annotations", "anns", "bboxes", "depthmaps", "groundtruth", "heatmaps", "keypoints", "labels"),
        *("masks", "segmentations", "trimaps", "xmls"),
    )
)
_PAIRS = frozenset(("ground", "truth")), frozenset(("image", "sets"))
"""Two words that name annotations together."""
_IMAGE_WORDS = _IMAGES | {"bmp", "image", "img", "jpeg", "jpg", "photo", "picture", "png", "rgb", "tif", "tiff"}
"""With what names one image, which is a container only beside others: {mask, no_mask} are classes."""
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
"""Words beside which a container's word says no more than that."""
_IN_CLASSES = _ANNOTATIONS | {"annotation", "gt", "label", "mask"}
_ANNOTATION_OF = re.compile(
    rb"(.+)[-_. ](?:mask|seg|segmentation|label|gt|depth|annotation)s?(?:[-_ ]?\d+)?\.[^./]+", re.I | re.S
)
_LOOKED_AT = 16
"""Folders that are opened to see images in one of them."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+")


def is_image_container(name: str) -> bool:
    """Return whether a folder's name says that it holds images, and nothing of them: `Images`, `img_dir`."""
    words = _words(name)
    return _only(words, _IMAGE_WORDS) and not words & _ANNOTATION_WORDS


def is_annotation_container(name: str) -> bool:
    """Return whether a folder's name says that it holds annotations: `masks`, `ground_truth`, `SegmentationClass`."""
    words = _words(name)
    return _has_pair(words) or (_only(words, _IMAGE_WORDS | _ANNOTATION_WORDS) and not is_image_container(name))


def is_annotation_subfolder(name: str) -> bool:
    """Return whether a folder in a class folder holds annotations by its name, rather than images of the class."""
    words = _words(name)
    return is_annotation_container(name) and (_has_pair(words) or bool(words & _IN_CLASSES))


def find_annotation_images(images: Sequence[bytes]) -> list[bytes]:
    """Return those images of a folder that are named as annotations of others in it: 1_mask.png beside 1.png."""
    stems = {os.path.splitext(image)[0] for image in images} if any(map(_ANNOTATION_OF.fullmatch, images)) else set()
    return [image for image in images if (match := _ANNOTATION_OF.fullmatch(image)) and match[1] in stems]


def reject_containers(roots: Mapping[str, Path]) -> None:
    """Refuse folders of which none can be a class: images/ alone, or beside masks/.

    Args:
        roots: split -> the folder of its class folders.

    Raises:
        UserError: all folders of a split are containers, one of them of images, and one surely.
    """
    for root in roots.values():
        names = [os.fsdecode(name) for name in list_folder(root).folders]
        if not names or len(_containers(names)) < len(names):
            continue
        of_images, sure = any(map(is_image_container, names)), any(map(_is_sure, names))
        if not (of_images and sure) and not (len(names) == 1 and (of_images or sure)):
            continue
        raise UserError(
            f"{root}: no class folders in it but {_quoted(names)}, whose names say images or annotations; "
            f"{_advice(root, names)}; a class of such a name must be renamed"
        )


def find_nested_class_root(root: Path, names: Sequence[str]) -> Path | None:
    """Return the folder of images among these that holds folders of images, which may be the classes."""
    around = [root / name for name in names if is_image_container(name) and _holds_folders_of_images(root / name)]
    return around[0] if len(around) == 1 else None


def _holds_folders_of_images(folder: Path) -> bool:
    contents = list_folder(folder)
    inside = (list_folder(folder / os.fsdecode(name)) for name in contents.folders[:_LOOKED_AT])
    return not contents.images and any(one.images for one in inside)


def _advice(root: Path, names: Sequence[str]) -> str:
    around = find_nested_class_root(root, names)
    if around is not None:
        return f"if the folders in {around} are the classes, give it as the source"
    return f"images are expected as {root}/CLASS/IMAGE: make a folder for each class and move its images there"


def class_name_warnings(classes: Sequence[ClassEntry]) -> list[str]:
    """Return the warnings about classes that are named by folders, of which a name says something else."""
    names = [entry.folder for entry in classes]
    lines = []
    containers = _containers(names)
    if len(names) <= FEW_CONTAINERS and (any(map(_is_sure, containers)) or len(containers) > 1):
        lines.append(
            f"{_quoted(containers)}: taken for {'classes' if len(containers) > 1 else 'a class'}, though named as "
            "images or annotations; move what is no class out of the source"
        )
    elif _differ_by_number(names):
        lines.append(
            f"{_quoted(names)}: taken for classes, though named as parts of one set of images; expected a folder for "
            "each class"
        )
    near = {name: split for name in names if (split := similar_split(name))}
    if len(names) <= FEW_SIMILAR_TO_SPLITS:
        lines += [
            f"{quoted(name)}: taken for a class, though its name is near that of split '{split}'; if it is that split, "
            f"it is expected as {split}/CLASS/IMAGE{'' if split == TRAIN else f', beside {TRAIN}/CLASS/IMAGE'}"
            for name, split in near.items()
        ]
    return lines


def _containers(names: Sequence[str]) -> list[str]:
    """Those of some folders that are containers by their names. Folders `label_0` and `label_1` may be classes."""
    found = [name for name in names if is_image_container(name) or is_annotation_container(name)]
    numbered = len(names) > 1 and len(set(map(_words, names))) == 1 and not any(map(_is_sure, names))
    return [] if numbered else found


def _is_sure(name: str) -> bool:
    """Whether a container's name is in the plural, or names nothing that could be shown in an image."""
    words = _words(name)
    return _has_pair(words) or bool(words & (_IMAGES | _ANNOTATIONS))


def _has_pair(words: frozenset[str]) -> bool:
    return any(pair <= words for pair in _PAIRS)


def _differ_by_number(names: Sequence[str]) -> bool:
    """Whether names are those of the parts of one set: `pets_images_part_1` and `pets_images_part_2`."""
    words = {frozenset(_words(name)) for name in names}
    return len(names) > 1 and len(words) == 1 and bool(next(iter(words)) & _IMAGES)


def _only(words: frozenset[str], allowed: frozenset[str]) -> bool:
    """Whether words are of those allowed, and of those that add nothing."""
    return bool(words & allowed) and words <= allowed | _FILLERS


def _words(name: str) -> frozenset[str]:
    """Words of a name in lower case; `JPEGImages` is two."""
    return frozenset(word.lower() for word in _WORD.findall(name))


def _quoted(names: Iterable[str]) -> str:
    return join_first(map(quoted, names))
