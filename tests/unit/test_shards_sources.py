"""The same images give the same shards in every source layout."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from shards.commands.verify import verify
from shards.convert.convert import convert
from shards.convert.options import Options
from shards.errors import UserError
from shards.format.dataset import ShardSet
from shards.sources.layouts.detect import detect_layout, scan
from shards.sources.scan import Scan, ScanOptions

ONE = ScanOptions(workers=1)

# Sorted by synset, which is the order of labels. The numbers in the development kit have another order.
SYNSETS = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish", "n02119789": "kit fox, Vulpes macrotis"}
DEVKIT_NUMBERS = {"n01440764": 2, "n01443537": 3, "n02119789": 1}
INNER_NODE = ("n00001740", 1001)  # the kit also lists synsets that are not classes
TRAIN_EACH, VAL = 4, ["n02119789", "n01440764", "n01443537", "n02119789", "n01443537"]  # class of each validation image


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


TRAIN_IMAGES = {
    f"{synset}/{synset}_{i}.JPEG": jpeg(100 * c + i) for c, synset in enumerate(SYNSETS) for i in range(TRAIN_EACH)
}
VAL_IMAGES = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(1000 + i) for i in range(len(VAL))}


def write_tar(target: Path | io.BytesIO, files: dict[str, bytes]) -> None:
    name, fileobj = (target, None) if isinstance(target, Path) else (None, target)
    with tarfile.open(name, "w", fileobj, format=tarfile.USTAR_FORMAT) as tar:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def as_folder(root: Path) -> Path:
    for name, data in TRAIN_IMAGES.items():
        write(root / "train" / name, data)
    for (name, data), synset in zip(VAL_IMAGES.items(), VAL, strict=True):
        write(root / "val" / synset / name, data)
    write(root / "synset_words.txt", "".join(f"{synset} {names}\n" for synset, names in SYNSETS.items()).encode())
    return root


def as_ilsvrc(root: Path) -> Path:
    classes = {}
    for synset in SYNSETS:
        inner = io.BytesIO()
        write_tar(inner, {Path(n).name: data for n, data in TRAIN_IMAGES.items() if n.startswith(synset)})
        classes[f"{synset}.tar"] = inner.getvalue()
    root.mkdir()
    write_tar(root / "ILSVRC2012_img_train.tar", classes)
    write_tar(root / "ILSVRC2012_img_val.tar", dict(reversed(VAL_IMAGES.items())))
    numbers = {**DEVKIT_NUMBERS, INNER_NODE[0]: INNER_NODE[1]}
    table = np.array(
        [
            (number, synset, SYNSETS.get(synset, "entity"), 0 if synset in SYNSETS else 3)
            for synset, number in sorted(numbers.items(), key=lambda item: item[1])
        ],
        dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)],
    )
    meta = io.BytesIO()
    savemat(meta, {"synsets": table.reshape(-1, 1)}, do_compression=True)
    truth = "".join(f"{DEVKIT_NUMBERS[synset]}\n" for synset in VAL).encode()
    kit = io.BytesIO()
    base = "ILSVRC2012_devkit_t12/data"
    write_tar(kit, {f"{base}/meta.mat": meta.getvalue(), f"{base}/ILSVRC2012_validation_ground_truth.txt": truth})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as out:
        kit.seek(0)
        with tarfile.open(fileobj=kit) as inside:
            for member in inside:
                out.addfile(member, inside.extractfile(member))
    return root


def as_kaggle(root: Path) -> Path:
    for name, data in TRAIN_IMAGES.items():
        write(root / "ILSVRC/Data/CLS-LOC/train" / name, data)
    for name, data in VAL_IMAGES.items():
        write(root / "ILSVRC/Data/CLS-LOC/val" / name, data)
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for name, synset in reversed(list(zip(VAL_IMAGES, VAL, strict=True))):
            writer.writerow([Path(name).stem, f"{synset} 1 2 3 4 {synset} 5 6 7 8 "])
    write(root / "LOC_synset_mapping.txt", "".join(f"{s} {names}\n" for s, names in SYNSETS.items()).encode())
    return root


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


IMAGENET_LAYOUTS = {"folder": as_folder, "ilsvrc": as_ilsvrc, "kaggle": as_kaggle}


@pytest.mark.parametrize("layout", IMAGENET_LAYOUTS)
def test_imagenet_gives_the_same_shards_from_every_layout(layout: str, tmp_path: Path) -> None:
    convert(as_folder(tmp_path / "reference"), tmp_path / "expected", Options(scan=ONE))
    source = IMAGENET_LAYOUTS[layout](tmp_path / "in")
    assert detect_layout(source) == layout
    convert(source, tmp_path / "set", Options(scan=ONE))
    for name in ("train-000000.tar", "val-000000.tar", "train.index.npy", "val.index.npy", "train-000000.idx"):
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    shard_set = ShardSet(tmp_path / "set")
    assert shard_set.manifest.made["source"] == layout
    assert [(c.folder, c.name) for c in shard_set.manifest.classes] == [
        (synset, names.split(",")[0]) for synset, names in SYNSETS.items()
    ]
    assert verify(tmp_path / "set", workers=1) == []


@pytest.mark.parametrize("layout", IMAGENET_LAYOUTS)
def test_validation_labels_follow_the_order_of_synsets(layout: str, tmp_path: Path) -> None:
    source = IMAGENET_LAYOUTS[layout](tmp_path / "in")
    val = scan(source, ONE, tmp_path / "spool").splits["val"]
    found = {Path(val.name(i).decode()).name: int(val.rows["label"][i]) for i in range(len(val))}
    order = list(SYNSETS)
    assert found == {name: order.index(synset) for name, synset in zip(VAL_IMAGES, VAL, strict=True)}


@pytest.mark.parametrize("layout", ["ilsvrc", "kaggle"])
def test_differences_from_imagenet_are_noted(layout: str, tmp_path: Path) -> None:
    notes = scan(IMAGENET_LAYOUTS[layout](tmp_path / "in"), ONE, tmp_path / "spool").notes
    assert notes == (
        "ImageNet-1K has 1,000 classes, but this source has 3",
        f"ImageNet-1K has 1,281,167 train images, but this source has {len(TRAIN_IMAGES)}",
        f"ImageNet-1K has 50,000 val images, but this source has {len(VAL)}",
    )


def test_a_folder_of_1000_synsets_is_compared_with_imagenet(tmp_path: Path) -> None:
    for c in range(1000):
        write(tmp_path / "in" / f"n{c:08d}" / "1.jpg", b"")
    notes = scan(tmp_path / "in", ONE, tmp_path / "spool").notes
    assert notes == ("ImageNet-1K has 1,281,167 train images, but this source has 1,000",)


def test_the_ilsvrc_validation_tar_requires_the_development_kit(tmp_path: Path) -> None:
    source = as_ilsvrc(tmp_path / "in")
    kit = source / "ILSVRC2012_devkit_t12.tar.gz"
    subprocess.run(["tar", "-xzf", kit, "-C", source], check=True)  # extractall has no filter before Python 3.11.4
    kit.unlink()
    assert len(scan(source, ONE, tmp_path / "spool").splits["val"]) == len(VAL)
    (source / "ILSVRC2012_devkit_t12").rename(source / "elsewhere")
    with pytest.raises(UserError, match=r"ILSVRC2012_img_val\.tar: its labels are missing; add ILSVRC2012_devkit_t12"):
        scan(source, ONE, tmp_path / "spool")
    (source / "ILSVRC2012_img_val.tar").unlink()
    found = scan(source, ONE, tmp_path / "spool")
    assert set(found.splits) == {"train"}
    assert "no validation split" in found.notes[0]
    assert len(scan(source / "ILSVRC2012_img_train.tar", ONE, tmp_path / "spool").splits["train"]) == len(TRAIN_IMAGES)


def test_the_kaggle_layout_requires_the_list_of_validation_labels(tmp_path: Path) -> None:
    source = as_kaggle(tmp_path / "in")
    assert detect_layout(source / "ILSVRC") == "kaggle"
    (source / "LOC_val_solution.csv").unlink()
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv: no such file"):
        scan(source, ONE, tmp_path / "spool")


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_a_truncated_tar_is_rejected_by_name(keep: float, tmp_path: Path) -> None:
    tar = as_ilsvrc(tmp_path / "in") / "ILSVRC2012_img_train.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: int(keep * len(data.rstrip(b"\0")))])
    with pytest.raises(UserError, match=r"img_train\.tar: (truncated|damaged|not a tar)"):
        scan(tmp_path / "in", ONE, tmp_path / "spool")


def test_a_damaged_header_is_not_treated_as_the_end_of_the_tar(tmp_path: Path) -> None:
    tar = as_ilsvrc(tmp_path / "in") / "ILSVRC2012_img_val.tar"
    data = bytearray(tar.read_bytes())
    third = data.index(b"ILSVRC2012_val_00000003")
    data[third + 150] ^= 0xFF
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"img_val\.tar: damaged at byte"):
        scan(tmp_path / "in", ONE, tmp_path / "spool")


def write_parquet(path: Path, rows: list[tuple[bytes, str | None, int]], names: list[str] | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.array([{"bytes": data, "path": name} for data, name, _ in rows])
    table = pa.table({"image": image, "label": pa.array([label for *_, label in rows], pa.int64())})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)


def test_parquet_files_of_a_data_set_hub_are_converted(tmp_path: Path) -> None:
    names = ["tench, Tinca tinca", "goldfish", "kit fox, Vulpes macrotis"]
    order = list(SYNSETS)
    train = [(data, Path(name).name, order.index(name[:9])) for name, data in TRAIN_IMAGES.items()]
    write_parquet(tmp_path / "in/data/train-00000-of-00002.parquet", train[:7], names)
    write_parquet(tmp_path / "in/data/train-00001-of-00002.parquet", train[7:], names)
    val = [(data, None, order.index(synset)) for data, synset in zip(VAL_IMAGES.values(), VAL, strict=True)]
    write_parquet(tmp_path / "in/data/validation-00000-of-00001.parquet", val, names)
    assert detect_layout(tmp_path / "in") == "parquet"
    convert(tmp_path / "in", tmp_path / "set", Options(scan=ONE))
    shard_set = ShardSet(tmp_path / "set")
    assert [c.title for c in shard_set.manifest.classes] == ["tench", "goldfish", "kit fox"]
    assert samples(shard_set, "train") == {(data, label) for data, _, label in train}
    assert samples(shard_set, "val") == {(data, label) for data, _, label in val}
    assert verify(tmp_path / "set", workers=1) == []
    assert not (tmp_path / "set" / ".making").exists(), "the spool files must be removed"


def test_a_source_with_only_a_validation_folder_has_only_a_validation_split(tmp_path: Path) -> None:
    for synset in SYNSETS:
        write(tmp_path / "in" / "val" / synset / "1.jpg", jpeg(0))
    found = scan(tmp_path / "in", ONE, tmp_path / "spool")
    assert {split: len(listing) for split, listing in found.splits.items()} == {"val": 3}
    assert len(found.classes) == 3


def samples(shard_set: ShardSet, split: str) -> set[tuple[bytes, int]]:
    return {
        (shard_set.shard_path(split, row["shard"]).read_bytes()[row["offset"] :][: row["size"]], int(row["label"]))
        for row in shard_set.index(split)
    }


def test_parquet_files_without_image_columns_are_rejected(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: has the columns text; expected an image column"):
        scan(tmp_path, ONE, tmp_path / "spool")
    write_parquet(tmp_path / "a.parquet", [(None, "http://elsewhere/1.jpg", 0)], None)  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"column image has type struct<.*>, which cannot hold image bytes"):
        scan(tmp_path, ONE, tmp_path / "spool")


def as_webdataset(root: Path, form: int = tarfile.PAX_FORMAT) -> Path:
    """Write tars like other tools: with directories, additional members, and other header formats."""
    root.mkdir()
    for split, count in (("train", 3), ("val", 1)):
        for shard in range(count):
            with tarfile.open(root / f"{split}-{shard:04d}.tar", "w", format=form) as tar:
                for i in range(5):
                    key = f"{'very/' * 30 if i == 3 else ''}{i:06d}"
                    members = {".json": b"{}", ".jpg": jpeg(10 * shard + i + 100 * (split == "val")), ".cls": b"%d" % i}
                    for suffix, data in members.items():
                        info = tarfile.TarInfo(key + suffix)
                        info.size, info.mtime = len(data), 1.5
                        tar.addfile(info, io.BytesIO(data))
                tar.addfile(tarfile.TarInfo("README"))
    return root


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_webdataset_tars_are_converted(tmp_path: Path, form: int) -> None:
    source = as_webdataset(tmp_path / "in", form)
    assert detect_layout(source) == "webdataset"
    convert(source, tmp_path / "set", Options(scan=ONE))
    shard_set = ShardSet(tmp_path / "set")
    assert samples(shard_set, "train") == {(jpeg(10 * shard + i), i) for shard in range(3) for i in range(5)}
    assert samples(shard_set, "val") == {(jpeg(100 + i), i) for i in range(5)}
    assert sum(entry["count"] for entry in shard_set.manifest.made["unused"]) == 4 * (5 + 1)
    assert verify(tmp_path / "set", workers=1) == [], "keys that occur in every tar must stay unique"


def test_a_shard_set_can_be_converted_again(tmp_path: Path) -> None:
    convert(as_folder(tmp_path / "in"), tmp_path / "once", Options(scan=ONE))
    convert(tmp_path / "once", tmp_path / "twice", Options(scan=ScanOptions(seed=1, workers=1)))
    once, twice = ShardSet(tmp_path / "once"), ShardSet(tmp_path / "twice")
    assert once.manifest.classes == twice.manifest.classes
    for split in ("train", "val"):
        assert samples(once, split) == samples(twice, split)


def test_a_tar_of_only_images_is_rejected(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(0)})
    with pytest.raises(UserError, match=r"no samples: found 1 \.jpg, but no labels; expected KEY\.jpg and KEY\.cls"):
        scan(tmp_path / "a.tar", ONE, tmp_path / "spool")


def one_folder(root: Path) -> Path:
    for name, data in TRAIN_IMAGES.items():
        write(root / name, data)
    return root


def names(found: Scan, split: str) -> set[bytes]:
    listing = found.splits[split]
    return {listing.name(i) for i in range(len(listing))}


def test_val_fraction_splits_off_images_of_every_class(tmp_path: Path) -> None:
    source = one_folder(tmp_path / "in")
    found = scan(source, ScanOptions(val_fraction=0.25), tmp_path / "spool")
    assert list(np.bincount(found.splits["val"].rows["label"])) == [1, 1, 1]
    assert names(found, "train") | names(found, "val") == {name.encode() for name in TRAIN_IMAGES}
    assert not names(found, "train") & names(found, "val")
    other = scan(source, ScanOptions(val_fraction=0.25, seed=1), tmp_path / "spool")
    assert names(found, "val") != names(other, "val")


def test_an_invalid_val_fraction_is_rejected(tmp_path: Path) -> None:
    for fraction, message in ((1.0, "expected a number from 0 to less than 1"), (-1, "expected a number from 0")):
        with pytest.raises(UserError, match=message):
            scan(one_folder(tmp_path / f"in{fraction}"), ScanOptions(val_fraction=fraction), tmp_path / "spool")
    with pytest.raises(UserError, match="already has a validation split"):
        scan(as_folder(tmp_path / "both"), ScanOptions(val_fraction=0.1), tmp_path / "spool")


def test_a_classes_file_orders_and_names_the_classes(tmp_path: Path) -> None:
    source = one_folder(tmp_path / "in")
    order = tmp_path / "classes.txt"
    order.write_text("n02119789\tkit fox, Vulpes\nn01440764 tench\nn99999999\n\nn01443537\n")
    found = scan(source, ScanOptions(classes=order), tmp_path / "spool")
    assert [(c.folder, c.name) for c in found.classes] == [
        ("n02119789", "kit fox"),
        ("n01440764", "tench"),
        ("n99999999", None),
        ("n01443537", None),
    ]
    listing = found.splits["train"]
    for i in range(len(listing)):
        assert found.classes[listing.rows["label"][i]].folder == listing.name(i)[:9].decode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n01440764\nn01443537\n", "does not list class 'n02119789'"),
        ("a\na\n", "contains class 'a' twice"),
        ("\n", "contains no classes"),
        (None, "missing; expected a text file with one class per line"),
    ],
)
def test_an_invalid_classes_file_is_rejected(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=rf"classes\.txt.*{message}"):
        scan(one_folder(tmp_path / "in"), ScanOptions(classes=path), tmp_path / "spool")


def test_an_explicit_layout_overrides_detection(tmp_path: Path) -> None:
    source = as_folder(tmp_path / "in")
    with pytest.raises(UserError, match="does not have the Kaggle layout"):
        scan(source, ScanOptions(layout="kaggle"), tmp_path / "spool")
    with pytest.raises(UserError, match="no tars found"):
        scan(source, ScanOptions(layout="webdataset"), tmp_path / "spool")
