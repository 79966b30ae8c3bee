"""Layout kaggle: Kaggle's ImageNet-1K, ILSVRC/Data/CLS-LOC/train/SYNSET/*, a flat val/, and lists next to ILSVRC/."""

from __future__ import annotations

import csv
import io
import os
import stat
from pathlib import Path

from shards.errors import UserError
from shards.files.regular import read_list
from shards.format.manifest_fields import ClassEntry
from shards.images.formats import named_as_image
from shards.sources.layouts.folder import file_status, scan_classes
from shards.sources.listing import Container, Listing, ListingBuilder
from shards.sources.naming.classes import MAPPING_FILES, human_names
from shards.sources.scan import TRAIN, VAL, Scan
from shards.sources.unused import UnusedEntry, UnusedFiles, merge
from shards.sources.walk import count_files

DATA = Path("ILSVRC/Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"


def kaggle_root(source: Path) -> Path | None:
    """Return the folder that contains ILSVRC/, if `source` is that folder or ILSVRC/; else None."""
    root = source.absolute().parent if source.absolute().name == "ILSVRC" else source
    return root if (root / DATA).is_dir() else None


def scan_kaggle(source: Path) -> Scan:
    """List the images of the classification task.

    Raises:
        UserError: a part of the layout is missing, or a validation image has no label.
    """
    root = kaggle_root(source)
    if root is None:
        raise UserError(f"{source}: no folder {DATA}, so it does not have the Kaggle layout")
    data = root / DATA
    found = scan_classes({TRAIN: data / "train"}, root)
    labels = {entry.folder: label for label, entry in enumerate(found.classes)}
    splits, unused = dict(found.splits), found.unused
    notes: list[str] = []
    if (data / "val").is_dir():
        splits[VAL], unused_val = _scan_val(data / "val", _read_solution(root / SOLUTION), labels)
        unused = merge([unused, unused_val])
    else:
        notes.append(f"{data / 'val'}: not found, so the shard set has no validation split")
    if (data / "test").is_dir():
        test = UnusedFiles()
        test.add(
            "test images without labels", os.fsencode(DATA / "test"), kind="test", count=count_files(data / "test")
        )
        unused = merge([unused, test.entries()])
        notes.append(f"{data / 'test'}: not used, because its images have no labels")
    others = UnusedFiles()
    for folder in (root, root / "ILSVRC"):
        for path in sorted(folder.iterdir()):
            if path.name not in (SOLUTION, *MAPPING_FILES, "ILSVRC", "Data"):
                kind = path.name if path.is_dir() else None
                below = os.fsencode(path.relative_to(root))
                others.add("not part of the classification task", below, kind=kind, count=count_files(path))
    unused = merge([unused, others.entries()])
    names = human_names(root)
    classes = tuple(ClassEntry(folder=folder, name=names.get(folder)) for folder in labels)
    return Scan("kaggle", classes, splits, unused, tuple(notes))


def _read_solution(path: Path) -> dict[str, str]:
    """Read the list of validation labels: image id -> synset id, which is the first word of each prediction string.

    Raises:
        UserError: the file is missing or not such a list, or an image has two classes.
        StorageFailed: the file cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; download it: it contains the labels of the validation images")
    what = "a list ImageId,PredictionString; download it again"
    truth: dict[str, str] = {}
    try:
        for row in csv.DictReader(io.StringIO(read_list(path, what), newline="")):
            image, synset = row["ImageId"], row["PredictionString"].split()[0]
            if truth.setdefault(image, synset) != synset:
                raise UserError(
                    f"{path}: image {image} has two classes, {truth[image]} and {synset}; download it again"
                )
    except (KeyError, IndexError, AttributeError, csv.Error) as error:
        fault = error if isinstance(error, csv.Error) else "a row lacks one of the two fields"
        raise UserError(f"{path}: damaged ({fault}); expected {what}") from None
    return truth


def _scan_val(folder: Path, truth: dict[str, str], labels: dict[str, int]) -> tuple[Listing, tuple[UnusedEntry, ...]]:
    """List the images of the flat validation folder; also return its unused files."""
    builder = ListingBuilder()
    container = Container.of(folder)
    found: list[tuple[bytes, int, int, int]] = []
    unused = UnusedFiles()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            status = file_status(entry)
            is_file = stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)
            if not is_file or not named_as_image(os.fsencode(entry.name)):
                unused.add("not an image", f"{VAL}/{entry.name}")
                continue
            synset = truth.get(os.path.splitext(entry.name)[0])
            if synset is None:
                raise UserError(f"{entry.path}: has no label in {SOLUTION}; download the list again")
            if synset not in labels:
                raise UserError(
                    f"{entry.path}: has class {synset} in {SOLUTION}, which is not a folder of train/; download both "
                    "again"
                )
            name = os.fsencode(f"{synset}/{entry.name}")
            found.append((name, status.st_size, int(status.st_mtime), labels[synset]))
    builder.add_files(container, found)
    return builder.build(), unused.entries()
