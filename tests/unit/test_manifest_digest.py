"""With a specified manifest digest, a command never uses a different set."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from launch.cli import main
from launch.config.data import DataConfig
from pipeline.storage.remote.shard_set import open_set
from shards.errors import UserError
from shards.format.dataset import ShardSet
from shards.format.manifest import Manifest
from shards.format.manifest_digest import ManifestDigest, split_digest
from tests.support.serving import serve


def digests_of(path: Path) -> tuple[str, str]:
    content = (path / "dataset.json").read_bytes()
    return f"xxh3={xxhash.xxh3_64_hexdigest(content)}", f"sha256={hashlib.sha256(content).hexdigest()}"


@pytest.mark.parametrize("kind", [0, 1], ids=["xxh3", "sha256"])
def test_only_the_set_with_the_specified_digest_is_opened(digits: Path, tmp_path: Path, kind: int) -> None:
    pin = digests_of(digits)[kind]
    name, _, hex_digits = pin.partition("=")
    with serve(digits) as site:
        for number, location in enumerate((str(digits), site.url)):
            cache = tmp_path / str(number)
            samples = ShardSet(digits).split("train").samples
            for opened in (
                open_set(f"{location}#{pin}", cache=cache),
                open_set(location, cache=cache, digest=pin),
                open_set(location, cache=cache, digest=hex_digits.upper()),
                open_set(f"{location}#{pin}", cache=cache, digest=pin),
            ):
                assert opened.split("train").samples == samples
                assert digests_of(digits) == tuple(map(str, opened.digests))
            wrong = f"{name}={hex_digits[:-1]}{'0' if hex_digits[-1] != '0' else '1'}"
            other = cache.with_name(f"other{number}")
            site.log.clear()
            with pytest.raises(UserError, match=rf"expected digest {wrong}, found {pin}: not the expected set"):
                open_set(f"{location}#{wrong}", cache=other)
            assert {entry[0] for entry in site.log} <= {"dataset.json"}
            assert not list(other.rglob("dataset.json*"))


def test_a_different_set_is_rejected_before_its_manifest_is_parsed(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="not the expected set"):
        ShardSet(tmp_path, digest=ManifestDigest.parse(digests_of(digits)[0], "--set-digest"))
    with pytest.raises(UserError, match="unreadable manifest"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "xxh3=", "xxh3=12", "xxh3=" + "g" * 16, "sha256=" + "0" * 16, "md5=" + "0" * 16, "0" * 17, "0x" + "0" * 14],
)
def test_a_malformed_digest_is_rejected(text: str) -> None:
    with pytest.raises(UserError, match="not a digest of a manifest: expected xxh3= and 16, or sha256=") as raised:
        split_digest("set", text)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("--set-digest ")


def test_two_different_digests_are_rejected() -> None:
    with pytest.raises(UserError, match="specify one of them"):
        split_digest("set#xxh3=" + "0" * 16, "xxh3=" + "1" * 16)


def test_a_folder_may_have_a_number_sign_in_its_name(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "set#2").symlink_to(digits)
    assert open_set(tmp_path / "set#2").path.name == "set#2"


COMMANDS: dict[str, Callable[[str, str, Path], object]] = {
    "verify": lambda location, pin, out: main(["verify", location, "--set-digest", pin]),
    "info": lambda location, pin, out: main(["info", location, "--set-digest", pin]),
    "look": lambda location, pin, out: main(["look", location, "--set-digest", pin, "--out", str(out / "b.png")]),
    "bench": lambda location, pin, out: main(["bench", location, "--", "--set-digest", pin]),
    "tune": lambda location, pin, out: main(
        ["tune", location, "--out", str(out / "tuned.toml"), "--", "--set-digest", pin]
    ),
    "verify#": lambda location, pin, out: main(["verify", f"{location}#{pin}"]),
    "info#": lambda location, pin, out: main(["info", f"{location}#{pin}"]),
    "look#": lambda location, pin, out: main(["look", f"{location}#{pin}"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_rejects_a_different_set(
    digits: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert COMMANDS[command](str(digits), "xxh3=" + "0" * 16, tmp_path) == 2
    output = capsys.readouterr().err
    found = digests_of(digits)[0]
    *progress, last = output.splitlines()
    assert last.startswith(f"error: {digits}/dataset.json: expected digest xxh3={'0' * 16}, found {found}")
    assert not [line for line in progress if "error" in line]


def test_a_recipe_can_specify_the_digest(digits: Path) -> None:
    pin = digests_of(digits)[0]
    assert DataConfig(data=str(digits), set_digest=pin).open().split("train").samples
    assert DataConfig(data=f"{digits}#{pin}").location() == digits
    with pytest.raises(UserError, match="not the expected set"):
        DataConfig(data=str(digits), set_digest="xxh3=" + "0" * 16).open()


def test_info_prints_the_digests(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(digits)]) == 0
    output = capsys.readouterr().out
    assert tuple(re.findall(r"(?:xxh3|sha256)=[0-9a-f]{16,}", output)) == digests_of(digits)
