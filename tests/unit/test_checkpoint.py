"""Saving, verifying and removing checkpoints (launch/run/checkpoint.py, checkpoint_folder.py, checkpoint_writer.py)."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fat
from launch.run import checkpoint
from launch.run.checkpoint import Checkpoint, CheckpointError, DamagedCheckpoint, Fingerprint
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.checkpoint_writer import BackgroundWriter
from launch.run.files import FolderFailed
from launch.run.progress import Progress
from launch.run.weights_files import WeightsFiles
from shards.errors import StorageFailed
from tests.support.launching import environment

FINGERPRINT = Fingerprint(fixed={"global_batch": 64}, free={"lr": 0.1})


def save(folder: CheckpointFolder, step: int, *, is_best: bool = False) -> Path:
    state = {"model/w": torch.full((8, 8), float(step)), "exp_avg/w": torch.zeros(8, 8)}
    return folder.save(
        state, Progress(step=step, epoch=step // 10, epoch_step=step % 10, is_best=is_best, best=0.5), FINGERPRINT
    )


def test_saved_checkpoint_is_read_back(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    save(folder, 20)
    found, skipped = folder.newest()
    assert found is not None
    assert (found.progress.step, found.progress.epoch, found.fingerprint, skipped) == (20, 2, FINGERPRINT, [])
    assert folder.newest_step() == 20
    assert found.load()["model/w"].eq(20).all()


def test_empty_folder_has_no_newest_checkpoint(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "nothing").newest() == (None, [])
    assert CheckpointFolder(tmp_path / "nothing").newest_step() is None


def test_newest_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (10, 20, 30, 40, 50):
        save(folder, step, is_best=step in (10, 20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000040", "step-00000050"]


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "state.safetensors").write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path / "state.safetensors", 50)


def lose_meta(path: Path) -> None:
    (path / "meta.json").unlink()


def tear_meta(path: Path) -> None:
    (path / "meta.json").write_text('{"version": 1, "prog')


def replace_meta(path: Path) -> None:
    (path / "meta.json").unlink()
    (path / "meta.json").mkdir()


def fifo_as_state(path: Path) -> None:
    (path / "state.safetensors").unlink()
    os.mkfifo(path / "state.safetensors")


def become_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


def nest_meta(path: Path) -> None:
    (path / "meta.json").write_text("[" * 100_000)


def rename(path: Path) -> None:
    path.rename(path.with_name("step-00000094"))


DAMAGES = [
    flip_a_byte,
    truncate,
    lose_meta,
    tear_meta,
    replace_meta,
    fifo_as_state,
    become_a_file,
    nest_meta,
    rename,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_reported_and_the_previous_one_used(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 10)
    damage(save(folder, 20))
    found, skipped = folder.newest()
    assert found is not None
    assert found.progress.step == 10
    assert len(skipped) == 1
    assert "step-000000" in skipped[0]
    assert "damaged" in skipped[0]


def test_every_flipped_bit_of_the_metadata_is_detected(tmp_path: Path) -> None:
    """Two bits of every byte are flipped, one at a time."""
    path = save(CheckpointFolder(tmp_path), 20)
    good, expected = (path / "meta.json").read_bytes(), checkpoint.read_meta(path, 20)
    damaged = 0
    for at in range(len(good)):
        for bit in (at % 8, (at + 4) % 8):
            content = bytearray(good)
            content[at] ^= 1 << bit
            (path / "meta.json").write_bytes(content)
            try:
                assert checkpoint.read_meta(path, 20) == expected, (at, bit)  # only white space differs
            except DamagedCheckpoint:
                damaged += 1
    assert damaged > 0.9 * 2 * len(good)


def rewritten(path: Path, **progress: Any) -> None:
    """Change the metadata and update its hash."""
    meta = json.loads((path / "meta.json").read_text())
    meta.pop("hash")
    meta["progress"] |= progress
    (path / "meta.json").write_text(checkpoint.render_meta(meta))


@pytest.mark.parametrize(
    "progress",
    [
        {"step": "20"},
        {"step": 20.0},
        {"step": -20},
        {"step": None},
        {"step": [20]},
        {"step": 21},
        {"step": True},
        {"epoch": 3},
        {"epoch": 0, "epoch_step": 19},
        {"epoch_step": 21},
        {"best": 1.5},
        {"best": float("nan")},
        {"seconds": -1.0},
        {"seconds": float("inf")},
        {"is_best": 1},
        {"is_best": True, "pending_evaluation": True},
        {"unknown": 1},
    ],
)
def test_invalid_metadata_with_valid_hash_is_damage(tmp_path: Path, progress: dict[str, Any]) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 10)
    rewritten(save(folder, 20), **progress)
    found, skipped = folder.newest()
    assert found is not None
    assert (found.progress.step, len(skipped)) == (10, 1)


def test_other_format_version_is_rejected_and_not_skipped(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 10)
    path = save(folder, 20)
    meta = json.loads((path / "meta.json").read_text()) | {"version": 9, "more": 1}
    meta.pop("hash")
    (path / "meta.json").write_text(checkpoint.render_meta(meta))
    with pytest.raises(CheckpointError, match="checkpoint version 9, but this program reads version 1"):
        folder.newest()


UNREADABLE = (".", "step-00000020", "step-00000020/meta.json", "step-00000020/state.safetensors")


def test_checkpoint_without_read_permission_is_not_damage(tmp_path: Path) -> None:
    """Root runs the test in a process without the capabilities that bypass file permissions."""
    for name in UNREADABLE:
        folder = CheckpointFolder(tmp_path / str(UNREADABLE.index(name)))
        for step in (10, 20):
            save(folder, step)
        (folder.folder / name).chmod(0)
    (tmp_path / "unwritable").mkdir(mode=0o555)
    code = """
        from pathlib import Path
        from launch.run.checkpoint_folder import CheckpointFolder
        from shards.errors import UserError
        calls = [CheckpointFolder(Path(str(number))).newest for number in range(4)]
        for call in (*calls, CheckpointFolder(Path("unwritable")).prepare):
            try:
                print(call())
            except UserError as error:
                print(error.exit_code, error)
    """
    bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    done = subprocess.run(
        [*bound, sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    for path in tmp_path.rglob("*"):
        path.chmod(0o755)
    *unreadable, unwritable = done.stdout.splitlines()
    paths = ["0", *(f"{number}/step-00000020/{name}" for number, name in [(1, "meta.json"), (2, "meta.json")])]
    for line, path in zip(unreadable, (*paths, "3/step-00000020/state.safetensors"), strict=True):
        assert line.startswith(f"1 {path}: cannot be read (Permission denied for user "), done.stderr
        assert ", mode 0000); ask its owner for access (chmod, chgrp), then start again" in line
    assert unwritable.startswith("1 unwritable: the run folder cannot be written (Permission denied); free disk space")


def test_state_replaced_after_verification_is_not_loaded(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    older, newer = save(folder, 10), save(folder, 20)
    found, _ = folder.newest()
    assert found is not None
    (older / "state.safetensors").rename(newer / "state.safetensors")
    with pytest.raises(StorageFailed, match="has changed since it was checked; start the run again"):
        found.load()


def test_state_removed_after_verification_is_reported(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    path = save(folder, 10)
    found, _ = folder.newest()
    assert found is not None
    (path / "state.safetensors").unlink()
    with pytest.raises(Exception, match=r"state\.safetensors: missing; the run folder .* share"):
        found.load()


def test_umask_determines_the_mode_of_both_files(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        path = save(CheckpointFolder(tmp_path), 10)
    finally:
        os.umask(old)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {
        "meta.json": "0o640",
        "state.safetensors": "0o640",
    }


def test_partial_checkpoint_is_ignored_and_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 10)
    half = tmp_path / ".step-00000020.0123abcd.tmp"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    found, _ = folder.newest()
    assert found is not None
    assert found.progress.step == 10
    folder.prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_replaced_checkpoint_is_found_after_a_kill(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    saved = save(folder, 20)
    replaced = saved.rename(tmp_path / f".{saved.name}.0123abcd.replaced")
    found, skipped = folder.newest()
    assert found is not None
    assert (found.path, skipped) == (replaced, [])  # `newest` moves nothing, because other processes may call it
    folder.prepare()
    found, skipped = folder.newest()
    assert found is not None
    assert (found.path, skipped) == (saved, [])
    assert [path.name for path in save(folder, 20).parent.iterdir()] == [saved.name]


def test_saving_a_step_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 20)
    save(folder, 20, is_best=True)
    found, _ = folder.newest()
    assert found is not None
    assert found.progress.is_best
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]


@pytest.mark.parametrize("link", [True, False])
def test_symlinks_and_files_with_a_checkpoint_s_name_are_kept(tmp_path: Path, link: bool) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=1)
    save(folder, 10)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "checkpoints" / "step-00000010", elsewhere)
    blocked = tmp_path / "checkpoints" / "step-00000020"
    blocked.symlink_to(elsewhere) if link else blocked.write_text("notes")
    with pytest.raises(CheckpointError, match=r"checkpoint not written \(another file has"):
        save(folder, 20)
    for step in (30, 40):
        save(folder, step)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step-00000020", "step-00000040"}
    assert sorted(path.name for path in elsewhere.iterdir()) == ["meta.json", "state.safetensors"]


def test_checkpoint_folder_with_files_of_the_user_is_kept(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    folder = CheckpointFolder(checkpoints, keep=1)
    (save(folder, 10) / "notes.txt").write_text("the good one")
    (checkpoints / "results").mkdir()
    for step in (20, 30):
        save(folder, step)
    assert (checkpoints / "step-00000010" / "notes.txt").exists()
    assert (checkpoints / "step-00000010" / "meta.json").exists()
    aside = folder.archive()
    assert aside == tmp_path / "checkpoints-before-1"
    assert sorted(path.name for path in aside.iterdir()) == ["step-00000010", "step-00000030"]
    assert [path.name for path in checkpoints.iterdir()] == ["results"]
    assert folder.archive() is None


def test_damaged_checkpoints_do_not_count_for_keep(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (10, 20, 30):
        path = save(folder, step)
    flip_a_byte(path)  # state of 30
    lose_meta(tmp_path / "step-00000020")
    save(folder, 5)  # another undamaged checkpoint
    resumed = CheckpointFolder(tmp_path, keep=2)
    found, skipped = resumed.newest()
    assert found is not None
    assert (found.progress.step, len(skipped)) == (5, 2)
    save(resumed, 40)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert {"step-00000005", "step-00000040"} <= set(names)
    save(resumed, 50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000040", "step-00000050"]


def test_checkpoints_are_sorted_by_number_not_by_name(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (99_999_999, 100_000_000):
        folder.save({"w": torch.zeros(1)}, Progress(step=step, epoch_step=step), FINGERPRINT)
    found, _ = folder.newest()
    assert found is not None
    assert found.progress.step == 100_000_000


def test_file_in_place_of_the_checkpoint_folder_is_invalid_input(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("x")
    with pytest.raises(Exception, match="Not a directory; move it away") as refused:
        CheckpointFolder(tmp_path / "checkpoints").newest()
    assert refused.value.exit_code == 2  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="cannot be written") as refused:
        CheckpointFolder(tmp_path / "checkpoints").prepare()
    assert not isinstance(refused.value, FolderFailed)


def test_failed_save_keeps_earlier_checkpoints_and_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 10)
    save(folder, 20)
    writer = BackgroundWriter(folder, WeightsFiles(tmp_path, fat.WeightsInfo()))
    state = {"w": torch.zeros(1)}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("launch.run.checkpoint_folder.sync_folder", full)
        for failures in (1, 2):
            writer.save(state, Progress(step=20, epoch=2), FINGERPRINT)
            assert not writer.wait()
            assert writer.failures == failures
    assert writer.errors()[0].endswith("step-00000020: checkpoint not written (No space left on device)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]
    assert isinstance(folder.newest()[0], Checkpoint)
    writer.save(state, Progress(step=30, epoch=3), FINGERPRINT)
    assert writer.wait()
    assert (writer.failures, writer.saved) == (0, Progress(step=30, epoch=3))
    writer.close()


def test_written_metadata_equals_read_metadata(tmp_path: Path) -> None:
    """All fields are written and read."""
    folder = CheckpointFolder(tmp_path)
    evaluated = Progress(step=25, epoch=2, epoch_step=5, seconds=1.5).evaluated({"weights": 0.25, "average": 0.125})
    progress = dataclasses.replace(evaluated, seconds=1.5)
    path = folder.save({"w": torch.zeros(1)}, progress, FINGERPRINT)
    found, _ = folder.newest()
    assert found is not None
    assert (found.progress, found.fingerprint) == (progress, FINGERPRINT)
    written = json.loads((path / "meta.json").read_text())["progress"]
    assert written == json.loads(json.dumps(dataclasses.asdict(progress)))


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut_off(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def lose(path: Path, chance: random.Random) -> None:
    path.unlink()


def replace_by_folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def exchange(path: Path, chance: random.Random) -> None:
    """Exchange a file with the file of the same name in another checkpoint."""
    other = chance.choice(sorted(p for p in path.parent.parent.iterdir() if p != path.parent)) / path.name
    if other.is_file():
        path.rename(path.with_name("aside"))
        other.rename(path)
        path.with_name("aside").rename(other)


def test_newest_undamaged_checkpoint_is_found_after_random_damage(tmp_path: Path) -> None:
    undamaged = CheckpointFolder(tmp_path / "undamaged", keep=5)
    original = {step: {p.name: p.read_bytes() for p in save(undamaged, step).iterdir()} for step in (10, 20, 30, 40)}
    for seed in range(100):
        folder, chance = tmp_path / str(seed), random.Random(seed)
        shutil.copytree(undamaged.folder, folder)
        for _ in range(chance.randrange(1, 5)):
            path = (
                folder / f"step-{chance.choice(list(original)):08d}" / chance.choice(["meta.json", "state.safetensors"])
            )
            if path.is_file():
                chance.choice([flip, cut_off, lose, replace_by_folder, exchange])(path, chance)
        undamaged_steps = [
            step
            for step, files in original.items()
            if all(_has(folder / f"step-{step:08d}" / name, content) for name, content in files.items())
        ]
        found, skipped = CheckpointFolder(folder).newest()
        if found is None:
            assert (undamaged_steps, len(skipped)) == ([], 4), seed
            continue
        step = found.progress.step
        assert step >= max(undamaged_steps, default=0), seed  # a flipped bit of white space is no damage
        assert len(skipped) == sum(other > step for other in original), seed
        assert found.load()["model/w"].eq(step).all(), seed
        assert found.progress == Progress(step=step, epoch=step // 10, best=0.5), seed


def _has(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content
