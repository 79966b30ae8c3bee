"""Images and labels of tars are paired by key in any order; files that belong to no sample are counted."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset import tariterators

from shards.commands.index_tars import index_tars
from shards.convert.convert import convert
from shards.convert.options import Options
from shards.errors import UserError
from shards.format.dataset import ShardSet
from shards.images.rules import ImageRules
from shards.sources.layouts import members as members_module
from shards.sources.layouts.detect import detect_layout, scan
from shards.sources.layouts.tar_samples import read_tar
from shards.sources.naming.labels import LabelReader
from shards.sources.scan import TRAIN, ScanOptions

ONE = ScanOptions(workers=1)
Files = list[tuple[str, bytes]]


def jpeg(number: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


def write_tar(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples_of(tar: Path) -> dict[str, tuple[bytes, int]]:
    """Return key -> (bytes of the image, label)."""
    data = tar.read_bytes()
    found, _ = read_tar(tar, LabelReader(), TRAIN)
    assert [sample.image.offset for sample in found] == sorted(sample.image.offset for sample in found)
    samples = {one.key: (data[one.image.offset : one.image.offset + one.image.size], one.label) for one in found}
    assert len(samples) == len(found)
    return samples


def unused_of(tar: Path) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for entry in read_tar(tar, LabelReader(), TRAIN)[1]:
        counts[entry.reason] += entry.count
    return dict(counts)


ORDER = ("jpg", "jpeg", "png", "webp", "bmp")
KEYS = st.lists(
    st.tuples(
        st.sampled_from(["", "./", "d/", "a.b/c/", "n01440764/"]), st.text("abcXYZ019_- é", min_size=1, max_size=5)
    ),
    min_size=1,
    max_size=8,
    unique=True,
).map(lambda parts: [folder + name for folder, name in parts])
SUFFIXES = st.sets(st.sampled_from([*ORDER, "cls", "json", "txt", "depth.png", "cls.txt"]))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=KEYS, data=st.data())
def test_any_order_of_the_members_gives_the_same_samples(keys: list[str], data: st.DataObject, tmp_path: Path) -> None:
    files: Files = [("complete.jpg", b"complete"), ("complete.cls", b"0")]
    samples = {"complete": (b"complete", 0)}
    unused: Counter[str] = Counter()
    for i, key in enumerate(keys):
        content = {suffix: b"%d" % i if suffix == "cls" else f"{i}{suffix}".encode() for suffix in data.draw(SUFFIXES)}
        upper = data.draw(st.booleans())
        files += [(f"{key}.{suffix.upper() if upper else suffix}", text) for suffix, text in content.items()]
        image = next((suffix for suffix in ORDER if suffix in content), None)
        if image and "cls" in content:
            samples[key] = content[image], i
            unused["additional file of a sample"] += len(content) - 2
        elif "cls" in content:
            unused["label without an image"] += 1
            unused["additional file of a label without an image"] += len(content) - 1
        else:
            images = sum(suffix in (*ORDER, "depth.png") for suffix in content)
            unused["image without a label"] += images
            unused["not part of a sample"] += len(content) - images
        if data.draw(st.booleans()):
            folder, _, name = key.rpartition("/")
            fork = f"{folder}/._{name}" if folder else f"._{name}"
            files += [(f"{fork}.jpg", b"\0\5\26\7"), (f"{fork}.cls", b"\0\5\26\7")]
            unused["macOS resource fork"] += 2
    tar = write_tar(tmp_path / "t.tar", data.draw(st.permutations(files)))
    assert samples_of(tar) == samples
    assert unused_of(tar) == +unused


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=KEYS)
def test_adjacent_members_form_the_same_samples_as_in_webdataset(keys: list[str], tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "t.tar",
        [one for i, key in enumerate(keys) for one in ((f"{key}.jpg", b"%d" % i), (f"{key}.CLS", b"7"))],
    )
    found = tariterators.tarfile_samples([{"url": str(tar)}])
    assert samples_of(tar) == {sample["__key__"]: (sample["jpg"], int(sample["cls"])) for sample in found}


SAMPLE: Files = [("z.jpg", jpeg(0)), ("z.cls", b"0")]
HIDDEN: dict[str, tuple[str, str]] = {
    "fork": ("._z.jpg", "macOS resource fork"),
    "fork in a folder": ("d/._z.cls", "macOS resource fork"),
    "folder of a macOS zip": ("__MACOSX/d/z.jpg", "macOS resource fork"),
    "hidden file": ("d/.z.jpg", "hidden file"),
    "hidden folder": (".thumbnails/y.jpg", "hidden file"),
    "metadata": ("__info__", "WebDataset metadata"),
    "webdataset's metadata": ("__meta__/y.jpg", "WebDataset metadata"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_members_are_skipped_and_counted(name: str, tmp_path: Path) -> None:
    member, reason = HIDDEN[name]
    tar = write_tar(tmp_path / "t.tar", [(member, b"no label"), *SAMPLE])
    assert samples_of(tar) == {"z": (SAMPLE[0][1], 0)}
    assert unused_of(tar) == {reason: 1}


IMAGES: dict[str, tuple[list[str], str]] = {
    "jpg before png": (["png", "jpg"], "jpg"),
    "jpeg before webp": (["webp", "jpeg"], "jpeg"),
    "png before tif": (["tif", "png"], "png"),
    "bmp before tif": (["tif", "bmp"], "bmp"),
    "a suffix without a dot before one with a dot": (["depth.png", "tif"], "tif"),
    "one suffix with a dot": (["image.jpg"], "image.jpg"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_the_image_of_a_sample_is_selected_by_preference(name: str, tmp_path: Path) -> None:
    suffixes, expected = IMAGES[name]
    tar = write_tar(tmp_path / "t.tar", [*((f"a.{suffix}", suffix.encode()) for suffix in suffixes), ("a.cls", b"1")])
    assert samples_of(tar) == {"a": (expected.encode(), 1)}
    others = {"additional file of a sample": len(suffixes) - 1} if len(suffixes) > 1 else {}
    assert unused_of(tar) == others


def test_a_mask_is_not_used_as_the_image_of_an_incomplete_sample(tmp_path: Path) -> None:
    files: Files = [("a.jpg", b"a"), ("a.mask.png", b"m"), ("a.cls", b"0"), ("b.mask.png", b"m"), ("b.cls", b"1")]
    tar = write_tar(tmp_path / "t.tar", files)
    assert samples_of(tar) == {"a": (b"a", 0)}
    assert unused_of(tar)["label without an image"] == 1


INVALID: dict[str, tuple[Files, str]] = {
    "concatenated tars": (
        [*SAMPLE, ("y.jpg", b""), ("y.cls", b"0"), *SAMPLE],
        r"z\.jpg: key 'z' has two files with suffix 'jpg', at bytes 512 and [\d,]+; create the tar again",
    ),
    "a label twice": ([*SAMPLE, ("z.CLS", b"1")], r"z\.CLS: key 'z' has two files with suffix 'cls'"),
    "keys with dots": (
        [one for i in range(2) for one in ((f"cat.v1.{i}.jpg", b""), (f"cat.v1.{i}.cls", b"0"))],
        r"the key of a sample ends at the first dot of the file name, so this is key 'cat' with suffix 'v1\.0\.jpg'",
    ),
    "labels as .txt": (
        [("0.jpg", b""), ("0.txt", b"0"), ("1.jpg", b""), ("1.txt", b"1")],
        r"found 2 \.jpg, 2 \.txt, but no labels; expected KEY\.jpg and KEY\.cls .*; if the labels are in other files",
    ),
    "labels as .cls.txt": ([("0.jpg", b""), ("0.cls.txt", b"0")], r"found 1 \.jpg, 1 \.cls\.txt, but no labels"),
    "labels as .json": ([("0.jpg", b""), ("0.json", b'{"label": 0}')], r"found 1 \.jpg, 1 \.json, but no labels"),
    "class folders": (
        [("cat/0.jpg", b""), ("dog/0.jpg", b"")],
        r"found 2 \.jpg, but no labels; .* unpack a tar of class folders",
    ),
    "no pair": ([("0.jpg", b""), ("1.cls", b"0")], "but no key has both an image and a label"),
    "no images": ([("0.npy", b""), ("0.cls", b"0")], r"found 1 \.npy, 1 \.cls; expected KEY\.jpg"),
    "nothing": ([], "found no files; expected"),
    "only hidden files": ([("._0.jpg", b""), ("._0.cls", b"0")], "found no files; expected"),
}


@pytest.mark.parametrize("name", INVALID)
def test_tars_that_cannot_be_paired_are_rejected_by_shard_and_index(name: str, tmp_path: Path) -> None:
    files, message = INVALID[name]
    tar = write_tar(tmp_path / "in/t.tar", files)
    with pytest.raises(UserError, match=rf"t\.tar: .*{message}") as shard:
        scan(tar, ONE, tmp_path / "spool")
    with pytest.raises(UserError) as index:
        index_tars([tar], ImageRules(), workers=1)
    assert str(index.value) == str(shard.value)


def test_the_number_of_members_of_a_tar_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = write_tar(tmp_path / "t.tar", SAMPLE)
    monkeypatch.setattr(members_module, "MAX_MEMBERS", 2)
    assert len(samples_of(tar)) == 1
    monkeypatch.setattr(members_module, "MAX_MEMBERS", 1)
    with pytest.raises(UserError, match=r"t\.tar: contains more than 1 files; split it"):
        samples_of(tar)


def test_shard_and_index_warn_about_incomplete_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All images precede all labels; one image has no label, and one label has no image."""
    files = [*((f"{i}.jpg", jpeg(i)) for i in range(4)), *((f"{i}.cls", b"%d" % (i % 2)) for i in (4, 2, 1, 0))]
    tar = write_tar(tmp_path / "in/t.tar", [*files, ("__MACOSX/0.jpg", b"")])
    convert(tar.parent, tmp_path / "set", Options(scan=ONE))
    shard_output = capsys.readouterr().err
    index_tars([tar], ImageRules(), workers=1)
    index_output = capsys.readouterr().err
    warnings = [
        "1 .jpg: image without a label (such as t.tar/3.jpg), not used",
        "1 .cls: label without an image (such as t.tar/4.cls), not used",
    ]
    for folder, output in ((tmp_path / "set", shard_output), (tar.parent, index_output)):
        shard_set = ShardSet(folder)
        assert sorted(shard_set.index("train")["label"].tolist()) == [0, 0, 1]
        assert shard_set.manifest.made["warnings"] == warnings
        assert [entry["reason"] for entry in shard_set.manifest.made["unused"]] == [
            "image without a label",
            "label without an image",
            "macOS resource fork",
        ]
        assert all(f"warning: {warning}" in output for warning in warnings)
    strict = Options(scan=ONE, strict=True)
    (tmp_path / "in/dataset.json").unlink()
    with pytest.raises(UserError, match=r"--strict: 1 \.jpg: image without a label"):
        convert(tmp_path / "in", tmp_path / "strict", strict)


COMPRESSED = {
    "gzip": (gzip.compress, "gunzip"),
    "bzip2": (bz2.compress, "bunzip2"),
    "xz": (lzma.compress, "unxz"),
    "zstd": (lambda data: b"\x28\xb5\x2f\xfd" + data, "unzstd --rm"),
}


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("name", ["t.tar", "t.tar.gz", "t.tgz", "t.tar.bz2", "t.tar.xz", "t.txz", "t.tar.zst"])
def test_compressed_tars_are_rejected_with_the_command_to_decompress(kind: str, name: str, tmp_path: Path) -> None:
    compress, command = COMPRESSED[kind]
    tar = write_tar(tmp_path / "in" / name, SAMPLE)
    tar.write_bytes(compress(tar.read_bytes()))
    assert detect_layout(tar) == detect_layout(tar.parent) == "webdataset"
    message = rf"{name}: compressed with {kind}, .*{command} \S+\)"
    for source in (tar, tar.parent):
        with pytest.raises(UserError, match=message):
            scan(source, ONE, tmp_path / "spool")
    with pytest.raises(UserError, match=message):
        index_tars([tar], ImageRules(), workers=1)


@pytest.mark.parametrize("name", ["t.tar", "t.tar.gz", "t.tgz", "of a folder/t.tar"])
def test_the_advice_for_a_compressed_tar_works(name: str, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "in" / name, SAMPLE)
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(UserError) as caught:
        scan(tar, ONE, tmp_path / "spool")
    advice = str(caught.value).partition("decompress it (")[2].partition("), or")[0]
    subprocess.run(["bash", "-c", advice], check=True, timeout=60)
    assert [path.name for path in tar.parent.iterdir()] == ["t.tar"]
    assert len(scan(tar.parent, ONE, tmp_path / "spool").splits["train"]) == 1


def test_compressed_copies_of_tars_are_not_used(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "in/a.tar", SAMPLE)
    (tmp_path / "in/a.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    (tmp_path / "in/a.tgz").write_bytes(gzip.compress(tar.read_bytes()))
    found = scan(tmp_path / "in", ONE, tmp_path / "spool")
    assert [(entry.reason, entry.count) for entry in found.unused] == [
        ("compressed copy of a tar", 1),
        ("compressed copy of a tar", 1),
    ]
    (tmp_path / "in/b.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(UserError, match=r"b\.tar\.gz: compressed with gzip"):
        scan(tmp_path / "in", ONE, tmp_path / "spool")
    tar.rename(tmp_path / "in/b.tar.gz")
    (tmp_path / "in/a.tar.gz").unlink()
    (tmp_path / "in/a.tgz").unlink()
    with pytest.raises(UserError, match=r"b\.tar\.gz: not compressed despite its name; rename it"):
        scan(tmp_path / "in", ONE, tmp_path / "spool")


def test_an_archive_next_to_its_unpacked_class_folders_is_not_used(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "0.jpg").write_bytes(jpeg(0))
    (tmp_path / "in/all.tgz").write_bytes(gzip.compress(b"tar"))
    assert detect_layout(tmp_path / "in") == "folder"
