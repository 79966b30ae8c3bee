"""Layout ilsvrc: the official archives of ImageNet-1K.

These are a training tar of 1000 class tars, a flat validation tar, and the development kit. Nothing is unpacked: the
images are byte ranges of the tars.
"""

from __future__ import annotations

import io
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shards.errors import UserError, reading
from shards.files.regular import read_bounded
from shards.format.manifest_fields import ClassEntry
from shards.redact import one_line
from shards.sources.layouts.members import Member, members, read_members
from shards.sources.layouts.meta_mat import read_synsets
from shards.sources.listing import Container, Listing, ListingBuilder
from shards.sources.naming.classes import first_duplicate
from shards.sources.naming.splits import splits_in
from shards.sources.scan import TEST, TRAIN, VAL, Scan
from shards.sources.unused import UnusedEntry, UnusedFiles, merge
from shards.sources.walk import skip_reason

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12")
MAX_DEVKIT = 2**26
"""Maximum size in bytes of the development kit, compressed and uncompressed; the real one has 3 MB."""
# https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf
_MAT_HEADER, _MAT_COMPRESSED = 128, 15
_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"


@dataclass(frozen=True)
class Devkit:
    """Classes and validation labels from the development kit."""

    synsets: dict[int, str]
    """Class number of the kit (ILSVRC2012_ID) -> synset id. The numbers do not follow the order of synset ids."""
    names: dict[str, str]
    """Synset id -> first of its readable names."""
    truth: list[int]
    """Class number of each validation image, in the order of file names."""


def scan_ilsvrc(source: Path) -> Scan:
    """List the images of `source`, which is the folder of the archives or the training tar.

    Raises:
        UserError: an archive is damaged, or there is a validation tar but no development kit.
    """
    folder = source.parent if source.is_file() else source
    train_tar = source if source.is_file() else folder / TRAIN_TAR
    if not train_tar.exists():
        raise UserError(
            f"{folder}: no {TRAIN_TAR} (a tar of class tars) in it; for a folder with one tar per class, use "
            "--from class-tars"
        )
    inner = [member for member in members(train_tar) if member.base.endswith(".tar") and member.base[:2] != "._"]
    classes = sorted(_synset(member) for member in inner)
    if not classes:
        raise UserError(f"{train_tar}: no class tars in it; expected a tar that contains one tar per class")
    twice = first_duplicate(classes)
    if twice is not None:
        raise UserError(f"{train_tar}: contains {twice}.tar twice; copy or download it again")
    labels = {synset: label for label, synset in enumerate(classes)}
    train, unused = _scan_train(train_tar, inner, labels)
    splits, notes = {TRAIN: train}, []
    devkit = _find_devkit(folder)
    if (folder / VAL_TAR).exists():
        if devkit is None:
            raise UserError(
                f"{folder / VAL_TAR}: its labels are missing; add {DEVKITS[0]} to the folder, or move the tar away"
            )
        splits[VAL] = _scan_val(folder / VAL_TAR, devkit, labels)
    else:
        notes.append(f"{folder / VAL_TAR}: not found, so the shard set has no validation split")
    others = UnusedFiles()
    if source.is_dir():
        for tar in sorted(folder.glob("*.tar")):
            if tar.name not in (TRAIN_TAR, VAL_TAR) and skip_reason(os.fsencode(tar.name)) is None:
                others.add("tar not used by this layout", tar.name)
                why = ", because the test images have no labels" if TEST in splits_in(tar.name) else ""
                notes.append(f"{tar}: not used{why}")
    unused = merge([unused, others.entries()])
    names = devkit.names if devkit else {}
    entries = tuple(ClassEntry(folder=one_line(synset), name=names.get(synset)) for synset in classes)
    return Scan("ilsvrc", entries, splits, unused, tuple(notes))


def _synset(outer: Member) -> str:
    return outer.base.removesuffix(".tar")


def _scan_train(tar: Path, inner: list[Member], labels: dict[str, int]) -> tuple[Listing, tuple[UnusedEntry, ...]]:
    builder = ListingBuilder()
    container = Container.of(tar)
    unused = UnusedFiles()
    for outer in inner:
        synset = _synset(outer)
        images = members(tar, outer.offset, outer.offset + outer.size, outer.name)
        found = [image for image in images if image.is_image]
        if not found:
            raise UserError(f"{tar}: {outer.name}: the class tar has no images; copy or download it again")
        for other in images:
            if not other.is_image:
                unused.add("not an image", f"{TRAIN}/{_synset(outer)}/{other.base}")
        builder.add_ranges(
            container,
            [(_name(synset, image), image.offset, image.size, labels[synset]) for image in found],
        )
    return builder.build(), unused.entries()


def _scan_val(tar: Path, devkit: Devkit, labels: dict[str, int]) -> Listing:
    container = Container.of(tar)
    images = sorted((member for member in members(tar) if member.is_image), key=lambda member: member.base)
    twice = first_duplicate(image.base for image in images)
    if twice is not None:
        raise UserError(f"{tar}: contains {twice} twice, so the labels cannot be assigned; copy or download it again")
    if len(images) != len(devkit.truth):
        raise UserError(
            f"{tar}: has {len(images):,} images, but the development kit has labels of {len(devkit.truth):,}; download "
            "both from the same release"
        )
    builder = ListingBuilder()
    found = []
    for image, number in zip(images, devkit.truth, strict=True):
        synset = devkit.synsets.get(number)
        if synset not in labels:
            raise UserError(
                f"{tar}: {image.name} has class {number} ({synset}), which is not in the training tar; download both "
                "tars and the development kit from the same release"
            )
        found.append((_name(synset, image), image.offset, image.size, labels[synset]))
    builder.add_ranges(container, found)
    return builder.build()


def _name(synset: str, image: Member) -> bytes:
    return f"{synset}/{image.base}".encode("utf-8", "surrogateescape")


def _find_devkit(folder: Path) -> Devkit | None:
    for name in DEVKITS:
        path = folder / name
        if path.is_dir():
            with reading(path):
                meta, truth = (read_bounded(path / name, MAX_DEVKIT) for name in (_META, _TRUTH))
            return _parse_devkit(path, meta, truth)
        if path.exists():
            return _parse_devkit(path, *_unpack_devkit(path))
    return None


def _unpack_devkit(path: Path) -> tuple[bytes, bytes]:
    """Read meta.mat and the ground truth from the kit, which is a tar, compressed or not."""
    with reading(path):
        raw = read_bounded(path, MAX_DEVKIT)
    if raw.startswith(b"\x1f\x8b"):
        raw = inflate(raw, MAX_DEVKIT, 16 + zlib.MAX_WBITS, f"{path}")
    found = {member.name.partition("/")[2]: member for member in read_members(io.BytesIO(raw), len(raw), f"{path}")}
    missing = [name for name in (_META, _TRUTH) if name not in found]
    if missing:
        raise UserError(f"{path}: no {missing[0]} in it; expected ImageNet's development kit: download it again")
    meta, truth = (raw[found[name].offset :][: found[name].size] for name in (_META, _TRUTH))
    return meta, truth


def inflate(data: bytes, limit: int, wbits: int, shown: str) -> bytes:
    """Decompress a zlib stream (gzip, depending on `wbits`) to at most `limit` bytes; trailing data is ignored.

    Raises:
        UserError: the stream is damaged, truncated, or larger than `limit`.
    """
    stream = zlib.decompressobj(wbits)
    try:
        content = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise UserError(f"{shown}: damaged ({error}); download it again") from None
    if len(content) > limit:
        raise UserError(f"{shown}: decompresses to more than {limit:,} bytes, so it is not ImageNet's development kit")
    if not stream.eof:
        raise UserError(f"{shown}: truncated; download it again")
    return content


def _parse_devkit(path: Path, meta: bytes, truth: bytes) -> Devkit:
    _check_mat(path, meta)
    try:
        rows = read_synsets(meta)
    except ImportError:
        raise UserError(f"{path}: reading its meta.mat needs scipy; install it with: pip install scipy") from None
    except ValueError as error:
        raise UserError(f"{path}: {_META}: damaged ({error}); download it again") from None
    leaves = [(number, synset, one_line(words)) for number, synset, words, children in rows if children == 0]
    for what in ([str(number) for number, *_ in leaves], [synset for _, synset, _ in leaves]):
        twice = first_duplicate(what)
        if twice is not None:
            raise UserError(f"{path}: {_META}: contains class {twice} twice; download it again")
    lines = truth.split()
    wrong = next((line for line in lines if not re.fullmatch(rb"[0-9]{1,9}", line)), None)
    if wrong is not None:
        raise UserError(f"{path}: {_TRUTH}: {wrong[:20]!r} is not a class number; download it again")
    return Devkit(
        synsets={number: synset for number, synset, _ in leaves},
        names={synset: words.split(",")[0].strip() for _, synset, words in leaves},
        truth=[int(line) for line in lines],
    )


def _check_mat(path: Path, meta: bytes) -> None:
    """Limit the decompressed size of a .mat file (MATLAB level 5), which scipy does not do."""
    at, left = _MAT_HEADER, MAX_DEVKIT
    order: Literal["big", "little"] = "big" if meta[126:128] == b"MI" else "little"
    while at + 8 <= len(meta):
        kind, size = (int.from_bytes(meta[at + i : at + i + 4], order) for i in (0, 4))
        if kind == _MAT_COMPRESSED:
            left -= len(inflate(meta[at + 8 : at + 8 + size], left, zlib.MAX_WBITS, f"{path}: {_META}"))
        at += 8 + size
