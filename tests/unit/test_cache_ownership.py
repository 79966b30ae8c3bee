"""The cache changes only files that it has created, even if processes are killed or its files are damaged."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage.cache.cache import Cache
from pipeline.storage.cache.errors import CacheFull, ForeignFile
from pipeline.storage.cache.folder import LOCK, MARKER
from pipeline.storage.cache.partial_file import Busy, PartialFile
from pipeline.storage.cache.record import NAME as RECORD
from pipeline.storage.remote.shard_set import open_set, set_folder
from shards.errors import UserError
from shards.schema import plain_file_name
from tests.support.cached import own_folder
from tests.support.users import NOBODY, as_user, needs_root, public_folder

CONTENT = bytes(100)
DIGEST = xxhash.xxh3_64_hexdigest(CONTENT)
OWN = (LOCK, MARKER, RECORD)
SETS, NAMES = ("set-a", "set-b"), ("a.tar", "b.tar", "c.tar", "d.tar")


def fetch(cache: Cache, name: str, folder: str = "set-a", content: bytes = CONTENT) -> bool:
    """Lease a file, or download it; return whether it was downloaded."""
    path = cache.folder / folder / name
    if (lease := cache.lease(path, len(content), xxhash.xxh3_64_hexdigest(content))) is not None:
        os.close(lease)
        return False
    part = cache.begin(path, len(content))
    assert isinstance(part, PartialFile)
    with part:
        part.append(content[part.done :])
        os.close(part.finish())
    return True


def names_in(cache: Cache, folder: str = "set-a") -> list[str]:
    return sorted(path.name for path in (cache.folder / folder).iterdir())


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return type, mode, inode, content and modification time of everything in a folder."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = (path.read_bytes(), status.st_mtime_ns)
        found[str(path.relative_to(folder))] = (stat.S_IFMT(status.st_mode), status.st_mode, status.st_ino, content)
    return found


KINDS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_bytes(b"mine"),
    "same size": lambda path: path.write_bytes(b"x" * len(CONTENT)),
    "same content": lambda path: path.write_bytes(CONTENT),
    "folder": lambda path: path.mkdir(),
    "no permission": lambda path: path.mkdir(mode=0),
    "link to a file": lambda path: path.symlink_to(path.parent / "nothing"),
    "link to a folder": lambda path: path.symlink_to(path.parent, target_is_directory=True),
    "fifo": os.mkfifo,
}
PLACES = st.sampled_from(
    [
        *(("{place}", *rest) for rest in ((), ("set-a",), ("thesis", "figures"))),
        *(("{own}", *rest) for rest in ((), ("set-a",), ("set-b",), ("set-a", "deeper"), ("own", "project"))),
    ]
)
FOREIGN = st.tuples(PLACES, st.sampled_from([*NAMES, "movie.part", "a.tar.0123456789abcdef.part", ".hidden"]))


def put_foreign(place: Path, own: Path, parts: tuple[str, ...], name: str, kind: str) -> Path | None:
    """Create a file or folder that is not the cache's, and return its path; None if the name exists already."""
    folder = Path(*parts[:1]).joinpath(*parts[1:])
    path = Path(str(folder).format(place=place, own=own)) / name
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(path):
            KINDS[kind](path)
            return path
    return None


@settings(max_examples=60, deadline=None)
@given(
    before=st.lists(st.tuples(FOREIGN, st.sampled_from(sorted(KINDS))), max_size=6),
    work=st.lists(
        st.one_of(
            st.tuples(st.just("fetch"), st.sampled_from(SETS), st.sampled_from(NAMES)),
            st.tuples(st.just("put"), FOREIGN, st.sampled_from(sorted(KINDS))),
            st.tuples(st.just("reopen"), st.none(), st.none()),
        ),
        max_size=12,
    ),
)
def test_no_foreign_file_is_ever_changed(before: list[Any], work: list[Any]) -> None:
    place = Path(tempfile.mkdtemp())
    own = own_folder(place)
    foreign: dict[Path, tuple[object, ...]] = {}

    def add(where: tuple[tuple[str, ...], str], kind: str) -> None:
        path = put_foreign(place, own, *where, kind)
        if path is not None:
            foreign[path] = seen(path)

    try:
        Cache(place, 250)
        for where, kind in before:
            add(where, kind)
        cache = Cache(place, 250)
        for what, first, second in work:
            if what == "put":
                add(first, second)
            elif what == "reopen":
                cache = Cache(place, 250)
            else:
                with contextlib.suppress(ForeignFile):
                    fetch(cache, second, first)
        assert {path: seen(path) for path in foreign} == foreign
        recorded = sum(
            path.stat().st_size for path in own.glob("set-*/*.tar") if path not in foreign and path.is_file()
        )
        assert recorded <= 250
    finally:
        for path in foreign:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(place)


def seen(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
    times = status.st_mtime_ns if content is not None else None  # entries may be added to folders
    return status.st_ino, status.st_mode, status.st_uid, times, content


def test_the_users_files_next_to_the_cache_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    for folder in ("thesis", "photos"):
        (tmp_path / folder).mkdir()
        for number in range(5):
            (tmp_path / folder / f"{number}.tex").write_bytes(bytes(1000))
            os.utime(tmp_path / folder / f"{number}.tex", (0, 0))
    before = snapshot(tmp_path)
    cache = Cache(tmp_path, 250)
    for name in NAMES:
        fetch(cache, name)
    assert names_in(cache) == ["c.tar", "d.tar"]
    after = {name: facts for name, facts in snapshot(tmp_path).items() if not name.startswith(cache.folder.name)}
    assert after == before


@pytest.mark.parametrize("content", ["results.npz", "set-a/a.tar", LOCK + ".bak", RECORD])
def test_a_folder_that_is_neither_empty_nor_marked_is_rejected(tmp_path: Path, content: str) -> None:
    path = own_folder(tmp_path) / content
    path.parent.mkdir(parents=True)
    own_folder(tmp_path).chmod(0o700)
    path.write_bytes(b"mine")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"not created by a cache: it has 1 entries, such as .*with --cache$"):
        Cache(tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("left", [[], [LOCK], [f".{MARKER}.{'0a' * 8}.tmp"], [LOCK, f".{MARKER}.{'0a' * 8}.tmp"]])
def test_a_folder_whose_creation_was_interrupted_is_used(tmp_path: Path, left: list[str]) -> None:
    own_folder(tmp_path).mkdir(mode=0o700)
    for name in left:
        (own_folder(tmp_path) / name).touch()
    assert fetch(Cache(tmp_path, 1000), "a.tar")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"identity": "x"}', b"\xff" * 5000, b'{"version": 2}'])
def test_a_damaged_marker_is_reported_in_one_line(tmp_path: Path, content: bytes) -> None:
    cache = Cache(tmp_path, 1000)
    fetch(cache, "a.tar")
    (cache.folder / MARKER).write_bytes(content)
    with pytest.raises(UserError, match=rf"{MARKER}: damaged \(.*with --cache$") as error:
        Cache(tmp_path, 1000)
    assert "\n" not in str(error.value)
    assert names_in(cache) == ["a.tar"]


@pytest.mark.parametrize("damage", ["torn", "altered", "emptied", "removed", "of another cache", "zeros"])
def test_files_whose_record_is_lost_are_used_but_never_removed(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path / "one", 250)
    for name in ("a.tar", "b.tar"):
        fetch(cache, name)
    record = cache.folder / RECORD
    lines = record.read_bytes().splitlines(keepends=True)
    if damage == "torn":
        record.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    elif damage == "altered":
        record.write_bytes(b"".join(lines).replace(b"b.tar", b"c.tar"))
    elif damage == "emptied":
        record.write_bytes(b"")
    elif damage == "removed":
        record.unlink()
    elif damage == "zeros":
        record.write_bytes(bytes(len(b"".join(lines))))
    else:
        other = Cache(tmp_path / "two", 250)
        for name in ("a.tar", "b.tar"):
            fetch(other, name)
        shutil.copy(other.folder / RECORD, record)
    again = Cache(tmp_path / "one", 250)
    assert ("damaged lines" in caplog.text) == (damage in ("torn", "altered", "of another cache"))
    lost = {"torn": ["b.tar"], "altered": ["b.tar"]}.get(damage, ["a.tar", "b.tar"])
    assert not fetch(again, "b.tar"), "a file with the right hash is used"
    for name in ("c.tar", "d.tar"):
        fetch(again, name)
    assert names_in(again) == sorted({*lost, "c.tar", "d.tar"})
    # Lines that are added after a truncated line are valid.
    assert not fetch(Cache(tmp_path / "one", 250), "d.tar")
    assert "d.tar" in {json.loads(line.partition(b" ")[2])[2] for line in lines_of(record) if line.count(b",") == 4}


def lines_of(record: Path) -> list[bytes]:
    return record.read_bytes().split(b"\n")


def test_entries_of_the_record_that_name_files_outside_the_cache_are_ignored(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 250)
    fetch(cache, "a.tar")
    (tmp_path / "mine").write_bytes(CONTENT)
    identity = json.loads((cache.folder / MARKER).read_bytes())["identity"]
    with (cache.folder / RECORD).open("ab") as file:
        for folder, name in (("..", "mine"), (".", "../mine"), ("/", str(tmp_path / "mine")), ("set-a", "a\0")):
            content = json.dumps(["whole", folder, name, 100, "0" * 16]).encode()
            file.write(xxhash.xxh3_64_hexdigest(identity.encode() + content).encode() + b" " + content + b"\n")
    again = Cache(tmp_path, 250)
    for name in NAMES:
        fetch(again, name)
    assert (tmp_path / "mine").read_bytes() == CONTENT
    assert names_in(again) == ["c.tar", "d.tar"]


def test_files_behind_a_symbolic_link_are_not_touched(tmp_path: Path) -> None:
    """For example, if a user replaces the set's folder in the cache by a link to the set, to save the download."""
    cache = Cache(tmp_path, 250)
    fetch(cache, "a.tar")
    (cache.folder / "set-a").rename(tmp_path / "the-set")
    (cache.folder / "set-a").symlink_to(tmp_path / "the-set")
    for name in NAMES:
        fetch(cache, name, "set-b")
    assert (tmp_path / "the-set" / "a.tar").read_bytes() == CONTENT
    with pytest.raises(ForeignFile, match="set-a: a symbolic link"):
        fetch(cache, "b.tar")


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"same content"}))
def test_a_foreign_file_with_the_name_of_a_cached_file_is_an_error(tmp_path: Path, kind: str) -> None:
    cache = Cache(tmp_path, 1000)
    fetch(cache, "a.tar")
    path = cache.folder / "set-a" / "b.tar"
    KINDS[kind](path)
    before = seen(path)
    with pytest.raises(ForeignFile, match=r"b\.tar: .*(move it away|remove it), or specify .* --cache$"):
        fetch(cache, "b.tar")
    assert seen(path) == before


def test_a_foreign_file_that_appears_during_the_download_is_not_replaced(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    path = cache.folder / "set-a" / "a.tar"
    part = cache.begin(path, len(CONTENT))
    assert isinstance(part, PartialFile)
    with part:
        part.append(CONTENT)
        path.write_bytes(b"mine")
        with pytest.raises(ForeignFile, match=r"a\.tar: was not created by this cache"):
            part.finish()
    assert path.read_bytes() == b"mine"


# System calls that change the folder; `open` counts only if it may create a file.
DEADLY = ("open", "mkdir", "fsync", "pwrite", "rename", "unlink")


def test_every_file_is_recorded_even_if_the_process_is_killed_at_any_system_call(tmp_path: Path) -> None:
    """A process dies at its nth change, or in the middle of it, for every n: every file has a line in the record, and
    the next process works."""
    finished = False
    for number in range(400):
        place = tmp_path / str(number)
        place.mkdir()
        (place / "mine").write_bytes(b"mine")
        finished = dies(lambda place=place: evict_and_fetch(place), at=number)  # type: ignore[misc]
        cache = Cache(place, 250)
        with cache._folder.locked(lambda: None) as (_, record):
            recorded = {(entry.folder, name) for entry in record.entries.values() for name in (entry.name, entry.part)}
        made = {(path.parent.name, path.name) for path in cache.folder.glob("*/*")}
        assert made <= recorded, number
        for name in ("c.tar", "d.tar"):
            fetch(cache, name)
        assert names_in(cache) == ["c.tar", "d.tar"], number
        assert (place / "mine").read_bytes() == b"mine"
        shutil.rmtree(place)
        if finished:
            break
    assert finished
    assert number > 30


def evict_and_fetch(place: Path) -> None:
    cache = Cache(place, 250)
    for name in ("a.tar", "b.tar", "c.tar"):
        fetch(cache, name)


def dies(do: Callable[[], None], *, at: int) -> bool:
    """Run in a forked process that dies at change number `at`; return whether it finished before."""
    child = os.fork()
    if not child:
        count = iter(range(10**6))

        def deadly(name: str) -> Callable[..., Any]:
            call = getattr(os, name)

            def made(*arguments: Any, **more: Any) -> Any:
                if (name != "open" or arguments[1] & os.O_CREAT) and next(count) == at:
                    if name == "pwrite":
                        call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], arguments[2])
                    os._exit(9)
                return call(*arguments, **more)

            return made

        try:
            for name in DEADLY:
                setattr(os, name, deadly(name))
            do()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 0


@pytest.mark.parametrize("when", ["between files", "while one is fetched"])
def test_a_folder_that_was_removed_is_created_again(tmp_path: Path, when: str) -> None:
    cache = Cache(tmp_path, 250)
    fetch(cache, "a.tar")
    if when == "between files":
        shutil.rmtree(cache.folder)
    else:
        part = cache.begin(cache.folder / "set-a" / "b.tar", len(CONTENT))
        assert isinstance(part, PartialFile)
        with part:
            part.append(CONTENT)
            shutil.rmtree(cache.folder)
            with pytest.raises(UserError, match=r"b\.tar: its partial file was removed by another program"):
                part.finish()
    for name in NAMES:
        assert fetch(cache, name)
    assert names_in(cache) == ["c.tar", "d.tar"]


def test_the_record_is_unchanged_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, 250)
    fetch(cache, "a.tar")
    content = (cache.folder / RECORD).read_bytes()
    write = os.pwrite

    def full(handle: int, added: bytes, at: int) -> int:
        if at == len(content):
            return write(handle, added[:10], at)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CacheFull, match="No space left on device; free disk space") as error:
        fetch(cache, "b.tar")
    assert error.value.exit_code == 1
    monkeypatch.undo()
    assert (cache.folder / RECORD).read_bytes() == content
    assert names_in(cache) == ["a.tar"]
    assert fetch(cache, "b.tar")


def test_the_record_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.cache.record._MAX_STALE", 20)
    cache, other = Cache(tmp_path, 250), Cache(tmp_path, 250)
    for number in range(40):
        for one in (cache, other):
            fetch(one, NAMES[number % 4])
    assert len(lines_of(cache.folder / RECORD)) < 40
    assert names_in(cache) == ["c.tar", "d.tar"]
    with cache._folder.locked(lambda: None) as (_, record):
        assert {name for _, name in record.entries} == {"c.tar", "d.tar"}
    assert sorted(path.name for path in cache.folder.iterdir()) == [MARKER, LOCK, RECORD, "set-a"]


def test_a_record_rewritten_by_another_process_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.cache.record._MAX_STALE", 20)
    cache, other = Cache(tmp_path, 250), Cache(tmp_path, 250)
    for number in range(60):
        fetch(other, NAMES[number % 4])
        if number % 7 == 0:
            assert entries_of(cache) == entries_of(Cache(tmp_path, 250))


def entries_of(cache: Cache) -> dict[Any, Any]:
    with cache._folder.locked(lambda: None) as (_, record):
        return dict(record.entries)


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), -float("inf")])
def test_an_invalid_limit_is_rejected(tmp_path: Path, limit: Any) -> None:
    with pytest.raises(UserError, match=rf"--cache-size: expected a finite size above 0, got {limit} bytes"):
        Cache(tmp_path, limit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gib", [0.0, -1.0, float("nan"), float("inf"), 1e-12])
def test_an_invalid_size_is_rejected_before_a_request(tmp_path: Path, gib: float) -> None:
    with pytest.raises(UserError, match="--cache-size"):
        open_set("memory://nothing/here", cache=tmp_path, cache_gib=gib)
    assert not list(tmp_path.iterdir())


def test_folders_without_permission_are_not_touched() -> None:
    needs_root()

    def use(place: Path) -> list[str]:
        cache = Cache(place, 250)
        fetch(cache, "a.tar")
        (cache.folder / "foreign").mkdir(mode=0)
        (place / "foreign").mkdir(mode=0)
        (cache.folder / "set-a").chmod(0)
        for name in NAMES:
            fetch(Cache(place, 250), name, "set-b")
        try:
            fetch(cache, "a.tar")
        except ForeignFile as error:
            return [*names_in(cache, "set-b"), str(error)]
        return []

    with public_folder() as place:
        *names, message = as_user(NOBODY, lambda: use(place))
        assert names == ["c.tar", "d.tar"]
        assert "set-a: no permission to open it: a folder of user nobody, " in message
        assert "mode 0000; remove it, or specify another folder with --cache" in message


@pytest.mark.parametrize(
    "url",
    ["https://host/set", "https://host/.hidden", "s3://b/a b\n", "https://host/", "https://h/s?token=secret", "x://.."],
)
def test_the_name_of_a_set_folder_is_valid_and_contains_no_credentials(url: str) -> None:
    name = set_folder(url.rstrip("/"), DIGEST)
    assert plain_file_name(name) == name
    assert name.endswith(f"-{DIGEST}")
    assert "secret" not in name
    assert len(set_folder("https://host/" + "x" * 999, DIGEST)) < 100


@pytest.mark.parametrize("path", ["set/../mine", "set/.lock", "set", ".lock/a.tar", "a/b/c.tar", "set/a\nb", "../b/a"])
def test_a_file_name_that_is_a_path_is_rejected(tmp_path: Path, path: str) -> None:
    cache = Cache(tmp_path, 1000)
    before = snapshot(tmp_path)
    for call in (lambda: cache.begin(cache.folder / path, 10), lambda: cache.lease(cache.folder / path, 10, DIGEST)):
        with pytest.raises(UserError, match="cannot be stored in the cache: "):
            call()
    assert snapshot(tmp_path) == before


def test_a_process_that_unpickles_a_cache_uses_the_same_folder(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 250)
    fetch(cache, "a.tar")
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.folder, copy.limit) == (cache.folder, 250)
    assert not fetch(copy, "a.tar")


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    elif how == "truncated":
        content = content[:-1]
    else:
        content += b"x"
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "truncated", "lengthened"])
@pytest.mark.parametrize("same_process", [False, True])
def test_a_damaged_file_is_downloaded_again(
    tmp_path: Path, how: str, same_process: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path, 250)
    fetch(cache, "a.tar")
    fetch(cache, "b.tar")
    damaged(cache.folder / "set-a" / "a.tar", how)
    again = cache if same_process else Cache(tmp_path, 250)
    assert fetch(again, "a.tar")
    assert "a.tar: damaged in the cache (" in caplog.text
    assert not fetch(again, "a.tar")
    assert not fetch(again, "b.tar")


def test_a_process_hashes_a_cached_file_once_unless_it_has_downloaded_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path, 250)
    reads = []
    read = os.pread

    def count(handle: int, size: int, at: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(".tar"):
            reads.append(at)
        return read(handle, size, at)

    monkeypatch.setattr(os, "pread", count)
    fetch(cache, "a.tar")
    for _ in range(3):
        assert not fetch(cache, "a.tar")
    assert not reads, "the content was hashed during the download"
    again = Cache(tmp_path, 250)
    for _ in range(3):
        assert not fetch(again, "a.tar")
    assert reads == [0]


@pytest.fixture
def group() -> Iterator[tuple[Path, int]]:
    """A folder that all members of a group may write, and the id of the group."""
    needs_root()
    with public_folder(0o2770) as place:
        os.chown(place, 0, 12345)
        place.chmod(0o2770)
        yield place, 12345


def test_a_cache_folder_of_another_user_is_rejected() -> None:
    needs_root()
    with public_folder() as place:
        (place / f"fat-pipeline-cache-{NOBODY}").mkdir(mode=0o755)
        error = as_user(NOBODY, lambda: Cache(place, 250))
        assert isinstance(error, UserError)
        assert "a folder of user root, group root, mode 0755, expected user nobody; remove it, or" in str(error)
        assert "--cache-shared" in str(error)
        # A third user has a separate cache next to it.
        assert as_user(NOBODY - 1, lambda: fetch(Cache(place, 250), "a.tar")) is True


def test_users_of_a_group_can_share_a_cache(group: tuple[Path, int]) -> None:
    place, gid = group

    def use(name: str) -> bool:
        return fetch(Cache(place, 250, True), name)

    one, two = NOBODY, NOBODY - 1
    assert as_user(one, lambda: use("a.tar"), groups=[gid], umask=0o077) is True
    assert as_user(two, lambda: use("a.tar"), groups=[gid], umask=0o077) is False
    for name in ("b.tar", "c.tar"):
        assert as_user(two, lambda: use(name), groups=[gid], umask=0o077) is True  # noqa: B023
    folder = place / "fat-pipeline-cache-shared" / "set-a"
    assert sorted(path.name for path in folder.iterdir()) == ["b.tar", "c.tar"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o660}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)} == {0o2770}
    damaged(folder / "b.tar", "flipped")
    assert as_user(one, lambda: use("b.tar"), groups=[gid]) is True, "a file of another user is verified"
    error = as_user(NOBODY - 2, lambda: use("a.tar"))
    assert isinstance(error, UserError)
    assert "Permission denied" in str(error) or "cannot be opened" in str(error)


def test_the_download_of_another_user_is_resumed_in_a_shared_cache(group: tuple[Path, int]) -> None:
    place, gid = group

    def begin(done: int) -> int:
        cache = Cache(place, 250, True)
        part = cache.begin(cache.folder / "set-a" / "a.tar", len(CONTENT))
        assert isinstance(part, PartialFile)
        with part:
            found = part.done
            part.append(CONTENT[part.done : done])
            return found

    assert as_user(NOBODY, lambda: begin(30), groups=[gid]) == 0
    assert as_user(NOBODY - 1, lambda: begin(60), groups=[gid]) == 30


def test_a_file_that_another_process_has_completed_is_not_downloaded(tmp_path: Path) -> None:
    cache, other = Cache(tmp_path, 250), Cache(tmp_path, 250)
    fetch(other, "a.tar")
    found = cache.begin(cache.folder / "set-a" / "a.tar", len(CONTENT))
    assert found == Busy(cache.folder / "set-a" / "a.tar", len(CONTENT))
