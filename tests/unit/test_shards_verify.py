"""`pipeline verify` finds every changed byte, and every truncated, missing or exchanged file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.commands.command_line import SampleDigits
from shards.commands.inspect import Info, Verify
from shards.commands.verify import verify
from shards.convert.convert import convert
from shards.convert.options import Options
from shards.errors import ShardSetError, UserError
from shards.format.dataset import ShardSet
from shards.format.index import Index
from shards.sources.scan import ScanOptions
from tests.support.damage import edit_index


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with two splits, several shards and a list of rejects."""
    root = tmp_path_factory.mktemp("verify")
    SampleDigits(root / "digits").run()
    for folder in (root / "digits" / "train").iterdir():
        for path in sorted(folder.iterdir())[10:]:
            path.unlink()
    for folder in (root / "digits" / "val").iterdir():
        for path in sorted(folder.iterdir())[3:]:
            path.unlink()
    (root / "digits" / "train" / "3_three" / "broken.JPEG").write_bytes(b"")
    options = Options(shard_bytes=100_000, max_rejects=1.0, scan=ScanOptions(workers=1))
    convert(root / "digits", root / "set", options)
    assert verify(root / "set", workers=1) == []
    return root / "set"


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "set")
    return tmp_path / "set"


def faults(path: Path) -> list[str]:
    """Return the faults that verify finds, or the error for an unreadable manifest."""
    try:
        return verify(path, workers=1)
    except ShardSetError as error:
        return [str(error)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_reported_with_its_file(pristine: Path, tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in pristine.iterdir())))
    content = (pristine / name).read_bytes()
    at = data.draw(st.integers(0, len(content) - 1), label="at")
    flip = data.draw(st.integers(1, 255), label="flip")
    victim = tmp_path / "flipped"
    shutil.rmtree(victim, ignore_errors=True)
    victim.mkdir()
    for path in pristine.iterdir():
        (victim / path.name).hardlink_to(path)
    (victim / name).unlink()
    (victim / name).write_bytes(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
    assert any(name in fault for fault in faults(victim))


@pytest.mark.parametrize("part", ["header", "image", "image padding", "label header", "label", "label padding"])
def test_damage_in_a_shard_is_located(copy: Path, part: str) -> None:
    shard_set = ShardSet(copy)
    row = shard_set.index("train")[5]
    path = shard_set.shard_path("train", row["shard"])
    image_at = int(row["offset"])
    label_at = image_at + -(-int(row["size"]) // 512) * 512
    at = {
        "header": image_at - 512 + 130,  # in the size field
        "image": image_at + 100,
        "image padding": label_at - 1,
        "label header": label_at + 3,
        "label": label_at + 512,
        "label padding": label_at + 1023,
    }[part]
    data = bytearray(path.read_bytes())
    key = data[image_at - 512 : image_at - 412].rstrip(b"\0").decode().removesuffix(".jpg")
    data[at] ^= 1
    path.write_bytes(data)
    (fault,) = verify(copy, workers=1)
    assert fault.startswith(f"{path}: offset {image_at - 512}, key '{key}': ")


def test_a_truncated_shard(copy: Path) -> None:
    path = copy / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-1000])
    (fault,) = verify(copy, workers=1)
    assert str(path) in fault
    assert fault.endswith("truncated")


@pytest.mark.parametrize(
    "name", ["train-000001.tar", "train-000001.idx", "train.index.npy", "rejects.jsonl", "val-000000.tar"]
)
def test_a_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    (fault,) = verify(copy, workers=1)
    assert f"{copy / name}: " in fault
    assert "missing" in fault


def test_two_exchanged_shards(copy: Path) -> None:
    first, second = copy / "train-000000.tar", copy / "train-000001.tar"
    first.rename(copy / "x")
    second.rename(first)
    (copy / "x").rename(second)
    found = verify(copy, workers=1)
    for path in (first, second):
        assert any(str(path) in fault for fault in found)


def test_two_exchanged_indexes(copy: Path) -> None:
    train, val = copy / "train.index.npy", copy / "val.index.npy"
    content = train.read_bytes(), val.read_bytes()
    train.write_bytes(content[1])
    val.write_bytes(content[0])
    found = verify(copy, workers=1)
    assert [str(train) in found[0], str(val) in found[1]] == [True, True]


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("label", 10, "row 0 has label 10, expected less than the number of classes, 10"),
        ("label", 3, "the label member is damaged"),
        ("offset", 1024, "according to the index, this image is at offset 1024"),
        ("height", 63, "height, width or orientation differs from the index"),
        ("orientation", 2, "height, width or orientation differs from the index"),
        ("hash", 1, "the image differs from the one that was written"),
        ("shard", 1, "row 0 has shard 1, expected the shard to which the manifest assigns this row"),
    ],
)
def test_a_wrong_index_with_a_valid_hash(copy: Path, field: str, value: int, complaint: str) -> None:
    """A row is changed and the hash in the manifest updated: the row still contradicts the tar."""

    def edit(index: Index) -> None:
        assert index[field][0] != value
        index[field][0] = value

    edit_index(copy, edit)
    found = verify(copy, workers=1)
    assert complaint in found[0]


def test_an_edited_manifest_is_detected(copy: Path) -> None:
    path = copy / "dataset.json"
    path.write_text(path.read_text().replace("3_three", "3_trees"))
    with pytest.raises(
        ShardSetError, match=r"dataset\.json: modified since it was written: expected hash \w+, found \w+"
    ):
        verify(copy, workers=1)


def test_a_reformatted_manifest_is_detected(copy: Path) -> None:
    path = copy / "dataset.json"
    path.write_text(path.read_text().replace("\n", "\n  "))
    (fault,) = verify(copy, workers=1)
    assert fault == f"{path}: modified since it was written: same content, other formatting"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"format": "fat-pipeline shard set", "version": 99}', "manifest version 99, but this tool reads version 2"),
        ('{"some": "other json"}', "not a 'fat-pipeline shard set' manifest"),
        ("{", "unreadable manifest"),
        ('{"format": "fat-pipeline shard set", "version": 2}', "damaged manifest"),
    ],
)
def test_unusable_manifests_are_rejected(copy: Path, content: str, complaint: str) -> None:
    (copy / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=complaint) as caught:
        verify(copy)
    assert caught.value.exit_code == 2


def test_the_command_prints_faults_and_fails(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Verify(copy).run() == 0
    assert "no faults, every byte was checked" in capsys.readouterr().out
    (copy / "val-000000.idx").write_bytes(b"")
    assert Verify(copy).run() == 1
    assert f"fault: {copy / 'val-000000.idx'}: does not match its tar" in capsys.readouterr().out


@pytest.mark.parametrize("command", [Verify, Info])
@pytest.mark.parametrize("location", ["https://host/set", "s3://bucket/set"])
def test_a_url_is_rejected_because_only_local_sets_are_read(command: type[Verify] | type[Info], location: str) -> None:
    with pytest.raises(UserError, match=r"(https|s3):/.*: .* read local sets only; run them where the set is stored"):
        command(Path(location)).run()
