"""A set's manifest pinned by its digest: no other set is used in its place."""

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


def pins(path: Path) -> tuple[str, str]:
    content = (path / "dataset.json").read_bytes()
    return f"xxh3={xxhash.xxh3_64_hexdigest(content)}", f"sha256={hashlib.sha256(content).hexdigest()}"


@pytest.mark.parametrize("kind", [0, 1], ids=["xxh3", "sha256"])
def test_the_pinned_set_is_opened_and_no_other(digits: Path, tmp_path: Path, kind: int) -> None:
    pin = pins(digits)[kind]
    name, _, digits_of = pin.partition("=")
    with serve(digits) as site:
        for number, location in enumerate((str(digits), site.url)):
            cache = tmp_path / str(number)
            samples = ShardSet(digits).split("train").samples
            for pinned in (
                open_set(f"{location}#{pin}", cache=cache),
                open_set(location, cache=cache, digest=pin),
                open_set(location, cache=cache, digest=digits_of.upper()),
                open_set(f"{location}#{pin}", cache=cache, digest=pin),
            ):
                assert pinned.split("train").samples == samples
                assert pins(digits) == tuple(map(str, pinned.digests))
            wrong = f"{name}={digits_of[:-1]}{'0' if digits_of[-1] != '0' else '1'}"
            other = cache.with_name(f"other{number}")
            site.log.clear()
            with pytest.raises(UserError, match=rf"expected digest {wrong}, found {pin}: not the expected set"):
                open_set(f"{location}#{wrong}", cache=other)
            assert {entry[0] for entry in site.log} <= {"dataset.json"}
            assert not list(other.rglob("dataset.json*"))


def test_another_set_is_refused_before_its_manifest_is_parsed(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="not the expected set"):
        ShardSet(tmp_path, digest=ManifestDigest.parse(pins(digits)[0], "--set-digest"))
    with pytest.raises(UserError, match="unreadable manifest"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "xxh3=", "xxh3=12", "xxh3=" + "g" * 16, "sha256=" + "0" * 16, "md5=" + "0" * 16, "0" * 17, "0x" + "0" * 14],
)
def test_a_malformed_digest_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a digest of a manifest: expected xxh3= and 16, or sha256=") as raised:
        split_digest("set", text)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("--set-digest ")


def test_two_digests_that_differ_are_refused() -> None:
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
def test_every_command_refuses_another_set(
    digits: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert COMMANDS[command](str(digits), "xxh3=" + "0" * 16, tmp_path) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {digits}/dataset.json: expected digest xxh3={'0' * 16}, found {pins(digits)[0]}")
    assert said.count("\n") == 1


def test_a_recipe_pins_its_data(digits: Path) -> None:
    pin = pins(digits)[0]
    assert DataConfig(data=str(digits), set_digest=pin).open().split("train").samples
    assert DataConfig(data=f"{digits}#{pin}").location() == digits
    with pytest.raises(UserError, match="not the expected set"):
        DataConfig(data=str(digits), set_digest="xxh3=" + "0" * 16).open()


def test_info_prints_what_to_pin(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(digits)]) == 0
    said = capsys.readouterr().out
    assert tuple(re.findall(r"(?:xxh3|sha256)=[0-9a-f]{16,}", said)) == pins(digits)
