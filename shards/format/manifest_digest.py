"""The digest of a set's manifest, which identifies the set on a command line.

A pinned xxh3-64 detects mix-ups and damage, but is not a cryptographic hash. A pinned SHA-256 also detects deliberate
changes of the manifest. The manifest's own hashes of indexes and shards are xxh3-64 in either case.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import xxhash

from shards.errors import ShardSetError, UserError

_DIGITS = {"xxh3": 16, "sha256": 64}
_SUFFIX = re.compile(r"#(?:xxh3|sha256)=[^/#]*$")
_EXPECTED = "xxh3= and 16, or sha256= and 64 hexadecimal digits expected; 'pipeline info SET' prints them"


@dataclass(frozen=True)
class ManifestDigest:
    """A digest that a set's dataset.json must have."""

    algorithm: str
    """xxh3 or sha256."""
    digits: str
    """Lower-case hexadecimal."""

    @classmethod
    def parse(cls, text: str, option: str) -> ManifestDigest:
        """Parse `xxh3=HEX`, `sha256=HEX` or `HEX` alone, whose length tells which.

        Args:
            option: option that gave the text, for messages.

        Raises:
            UserError: it has none of these forms.
        """
        name, equals, digits = text.strip().lower().rpartition("=")
        if not equals:
            name = next((name for name, length in _DIGITS.items() if length == len(digits)), "")
        if _DIGITS.get(name) != len(digits) or not re.fullmatch("[0-9a-f]+", digits):
            raise UserError(f"{option} {text[:100]}: not the digest of a manifest: {_EXPECTED}")
        return cls(name, digits)

    @classmethod
    def of(cls, content: bytes, algorithm: str = "xxh3") -> ManifestDigest:
        """The digest of a manifest as it is stored."""
        sha256 = algorithm == "sha256"
        return cls(algorithm, hashlib.sha256(content).hexdigest() if sha256 else xxhash.xxh3_64_hexdigest(content))

    def check(self, content: bytes, where: Path | str) -> None:
        """Compare the digest with that of a manifest, before anything in the manifest is used.

        Raises:
            ShardSetError: it has another digest.
        """
        found = self.of(content, self.algorithm)
        if found != self:
            raise ShardSetError(
                f"{where}: {self} expected, {found} found: not the set that was pinned; give the right set, or pin "
                "this one if it is meant to have changed"
            )

    def __str__(self) -> str:
        return f"{self.algorithm}={self.digits}"


def split_digest(location: Path | str, option: str | None = None) -> tuple[str, ManifestDigest | None]:
    """Divide LOCATION#xxh3=HEX or LOCATION#sha256=HEX into the location and the digest that is pinned.

    Args:
        option: value of --set-digest, the other way to pin.

    Raises:
        UserError: a malformed digest, or two that differ.
    """
    text = str(location)
    pins = [ManifestDigest.parse(option, "--set-digest")] if option is not None else []
    if match := _SUFFIX.search(text):
        text = text[: match.start()]
        pins.append(ManifestDigest.parse(match[0][1:], "#"))
    if len(set(pins)) > 1:
        raise UserError(f"--set-digest {pins[0]}, and #{pins[1]} in the location of the set: give one of them")
    return text, pins[0] if pins else None
