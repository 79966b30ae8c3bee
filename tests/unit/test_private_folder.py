"""Folders in shared locations: a folder or file of another user is rejected with a message that names its owner."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.engine.execution import Execution
from shards.files.durable import durable_write
from shards.files.private_folder import NotPrivate, create_private_folder, open_file, open_folder, write_file
from tests.support.users import NOBODY, as_user, needs_root, public_folder

REMEDY = "give another folder"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_folder_is_created_private_with_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        create_private_folder(tmp_path / "a" / "b", remedy=REMEDY)
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "a" / "b") == 0o700
    create_private_folder(tmp_path / "a" / "b", remedy=REMEDY)


def create_link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere")


def create_writable(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


PREPARED: list[tuple[Callable[[Path], object], str]] = [
    (create_link, "a symbolic link or a file, not a folder"),
    (Path.touch, "a symbolic link or a file, not a folder"),
    (create_writable, r"others can write to it \(mode 0777\)"),
]


@pytest.mark.parametrize(("prepare", "message"), PREPARED)
def test_a_link_file_or_writable_folder_at_its_location_is_rejected(
    tmp_path: Path, prepare: Callable[[Path], object], message: str
) -> None:
    prepare(tmp_path / "cache")
    with pytest.raises(NotPrivate, match=rf"cache: {message}.*give another folder$"):
        create_private_folder(tmp_path / "cache", remedy=REMEDY)


@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_the_message_names_the_owner_of_another_users_folder(mode: int) -> None:
    needs_root()
    with public_folder() as place:
        (place / "cache").mkdir()
        (place / "cache").chmod(mode)
        error = as_user(NOBODY, lambda: create_private_folder(place / "cache", remedy=REMEDY))
        assert isinstance(error, NotPrivate)
        assert "a folder of user root, group root, mode " in str(error)
        assert str(error).endswith("give another folder")
        os.chown(place / "cache", NOBODY, NOBODY)
        with pytest.raises(NotPrivate, match=r"of user nobody, .*expected user root"):
            create_private_folder(place / "cache", remedy=REMEDY)


def test_links_and_fifos_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "folder").mkdir(mode=0o700)
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "folder" / "fifo")
    (tmp_path / "folder" / "inner").mkdir()
    folder = open_folder(tmp_path / "folder", remedy=REMEDY)
    try:
        for name in ("link", "fifo", "inner"):
            for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_CREAT):
                with pytest.raises(NotPrivate, match=f"{name}: not a regular file; give another folder"):
                    open_file(name, flags, folder=folder, path=tmp_path / "folder" / name, remedy=REMEDY)
        write_file("link", b"new", folder=folder, path=tmp_path / "folder" / "link", remedy=REMEDY)
    finally:
        os.close(folder)
    assert (tmp_path / "target").read_text() == "mine"
    assert (tmp_path / "folder" / "link").read_bytes() == b"new"
    assert mode_of(tmp_path / "folder" / "link") == 0o600


def test_a_shared_folder_is_accessible_only_to_its_group() -> None:
    needs_root()
    group = 12345

    def write(folder: Path, name: str) -> None:
        handle = open_folder(folder, remedy=REMEDY, shared=True)
        write_file(name, b"", folder=handle, path=folder / name, remedy=REMEDY, shared=True)

    with public_folder(0o777) as place:
        os.chown(place, 0, group)
        for user in (NOBODY, NOBODY - 1):
            found = as_user(user, lambda: write(place / "cache", f"of-{user}"), groups=[group], umask=0o077)  # noqa: B023
            assert found is None
            assert mode_of(place / "cache" / f"of-{user}") == 0o660
            assert (place / "cache" / f"of-{user}").stat().st_gid == group
        assert mode_of(place / "cache") == 0o2770
        error = as_user(NOBODY - 2, lambda: write(place / "cache", "mine"))
        assert isinstance(error, NotPrivate)
        assert f"a folder of user nobody, group {group}, mode 2770" in str(error)
        (place / "cache").chmod(0o2777)
        with pytest.raises(NotPrivate, match="others can write to it"):
            write(place / "cache", "mine")


def test_a_file_is_written_atomically_under_a_random_temporary_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    rename = Path.rename

    def remember(self: Path, target: Path) -> Path:
        names.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", remember)
    for _ in range(2):
        durable_write(tmp_path / "file", b"content")
    assert len(set(names)) == len(names) == 2
    assert not [name for name in names if str(os.getpid()) == name.split(".")[-1]]
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    (tmp_path / ".file.known.tmp").symlink_to(tmp_path / "of-others")
    with pytest.raises(FileExistsError):
        durable_write(tmp_path / "file", b"altered")
    assert (tmp_path / ".file.known.tmp").is_symlink()
    assert not (tmp_path / "of-others").exists()


def test_a_compiler_cache_that_others_can_write_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile executes code from a folder with a predictable name in the temporary folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    execution = Execution(memory_format="contiguous", kernels="off", compile="default", optimizer_impl="foreach")
    for is_writable in (False, True):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        if is_writable:
            (folder,) = tmp_path.iterdir()
            folder.chmod(0o777)
            with pytest.raises(NotPrivate, match=r"torchinductor_\w+: others can .*set TORCHINDUCTOR_CACHE_DIR to a"):
                execution.compile_model(torch.nn.Identity(), shapes=1)
        else:
            execution.compile_model(torch.nn.Identity(), shapes=1)
            (folder,) = tmp_path.iterdir()
            assert mode_of(folder) == 0o700
            folder.chmod(0o775)  # like torch creates it with umask 002
            execution.compile_model(torch.nn.Identity(), shapes=1)
