"""ImageNet-1K as its makers give it out: a tar of 1000 tars, a flat tar for validation, and the development kit.

Nothing is unpacked: entries are byte ranges of the tars.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError
from shards.listing import Listing, ListingBuilder
from shards.manifest import ClassEntry
from shards.sources.members import Member, members
from shards.sources.scan import TRAIN, VAL, Scan

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12")
_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"


@dataclass(frozen=True)
class Devkit:
    """What the development kit says of the classes and of the validation images."""

    synsets: dict[int, str]
    """The kit's own class number (ILSVRC2012_ID) -> synset id. Its order is not that of sorted synset ids."""
    names: dict[str, str]
    """Synset id -> first human name."""
    truth: list[int]
    """Class number of each validation image, in the order of their names."""


def scan_ilsvrc(source: Path) -> Scan:
    """List the images of `source`, the folder of the tars or the training tar itself.

    Raises:
        UserError: a tar is truncated, or the validation tar has no development kit beside it.
    """
    folder = source.parent if source.is_file() else source
    train_tar = source if source.is_file() else folder / TRAIN_TAR
    inner = [member for member in members(train_tar) if member.name.endswith(".tar")]
    classes = sorted(Path(member.name).stem for member in inner)
    if not classes:
        raise UserError(f"{train_tar}: no class tars in it; it should be a tar of tars, one for each class")
    labels = {synset: label for label, synset in enumerate(classes)}
    train, ignored = _scan_train(train_tar, inner, labels)
    splits, notes = {TRAIN: train}, []
    devkit = _find_devkit(folder)
    if (folder / VAL_TAR).is_file():
        if devkit is None:
            raise UserError(f"{folder / VAL_TAR}: has no labels; put {DEVKITS[0]} beside it, or move it away")
        splits[VAL] = _scan_val(folder / VAL_TAR, devkit, labels)
    else:
        notes.append(f"{folder / VAL_TAR}: not there, so the set gets no validation split")
    names = devkit.names if devkit else {}
    entries = tuple(ClassEntry(folder=synset, name=names.get(synset)) for synset in classes)
    return Scan("ilsvrc", entries, splits, ignored, tuple(notes))


def _scan_train(tar: Path, inner: list[Member], labels: dict[str, int]) -> tuple[Listing, int]:
    builder = ListingBuilder()
    ignored = 0
    for outer in inner:
        synset = Path(outer.name).stem
        images = members(tar, outer.offset, outer.offset + outer.size)
        if not images:
            raise UserError(f"{tar}: {outer.name}: a class without images")
        found = [image for image in images if image.is_image]
        ignored += len(images) - len(found)
        builder.add(
            tar,
            [(f"{synset}/{image.base}".encode(), image.offset, image.size, labels[synset]) for image in found],
        )
    return builder.build(), ignored


def _scan_val(tar: Path, devkit: Devkit, labels: dict[str, int]) -> Listing:
    images = sorted((member for member in members(tar) if member.is_image), key=lambda member: member.base)
    if len(images) != len(devkit.truth):
        raise UserError(
            f"{tar}: {len(images):,} images, but the development kit labels {len(devkit.truth):,}; "
            "take both from the same release"
        )
    builder = ListingBuilder()
    found = []
    for image, number in zip(images, devkit.truth, strict=True):
        synset = devkit.synsets.get(number)
        if synset not in labels:
            raise UserError(f"{tar}: {image.name} is of class {number} ({synset}), which the training tar lacks")
        found.append((f"{synset}/{image.base}".encode(), image.offset, image.size, labels[synset]))
    builder.add(tar, found)
    return builder.build()


def _find_devkit(folder: Path) -> Devkit | None:
    for name in DEVKITS:
        path = folder / name
        if path.is_dir():
            return _parse_devkit(path, (path / _META).read_bytes(), (path / _TRUTH).read_text())
        if path.is_file():
            with tarfile.open(path) as tar:
                files = {member.name.partition("/")[2]: member for member in tar if member.isfile()}
                meta, truth = (tar.extractfile(files[name]) for name in (_META, _TRUTH))
                assert meta is not None
                assert truth is not None
                return _parse_devkit(path, meta.read(), truth.read().decode())
    return None


def _parse_devkit(path: Path, meta: bytes, truth: str) -> Devkit:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{path}: reading its meta.mat needs scipy; install it with: pip install scipy") from None
    table = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    leaves = [row for row in table if row["num_children"] == 0]
    return Devkit(
        synsets={int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves},
        names={str(row["WNID"]): str(row["words"]).split(",")[0].strip() for row in leaves},
        truth=[int(line) for line in truth.split()],
    )
