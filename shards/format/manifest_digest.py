"""The digest of a set's manifest, which identifies the exact set on the command line.

An xxh3-64 digest detects damage and a different set, but is not a cryptographic hash. A SHA-256 digest also detects
deliberate changes of the manifest. The hashes of indexes and shards in the manifest are always xxh3-64.
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
_EXPECTED = "expected xxh3= and 16, or sha256= and 64 hexadecimal digits; 'pipeline info SET' prints them"


@dataclass(frozen=True)
class ManifestDigest:
    """The expected digest of a set's dataset.json."""

    algorithm: str
    """Name of the hash function: xxh3 or sha256."""
    digits: str
    """Digest in lower-case hexadecimal digits."""

    @classmethod
    def parse(cls, text: str, option: str) -> ManifestDigest:
        """Parse `xxh3=HEX`, `sha256=HEX`, or only `HEX`, whose length determines the algorithm.

        Args:
            option: option with this value, for messages.

        Raises:
            UserError: the text has none of these forms.
        """
        name, equals, digits = text.strip().lower().rpartition("=")
        if not equals:
            name = next((name for name, length in _DIGITS.items() if length == len(digits)), "")
        if _DIGITS.get(name) != len(digits) or not re.fullmatch("[0-9a-f]+", digits):
            raise UserError(f"{option} {text[:100]}: not a digest of a manifest: {_EXPECTED}")
        return cls(name, digits)

    @classmethod
    def of(cls, content: bytes, algorithm: str = "xxh3") -> ManifestDigest:
        """Compute the digest of the content of a manifest file."""
        sha256 = algorithm == "sha256"
        return cls(algorithm, hashlib.sha256(content).hexdigest() if sha256 else xxhash.xxh3_64_hexdigest(content))

    def check(self, content: bytes, where: Path | str) -> None:
        """Check the digest of a manifest, before the manifest is used.

        Raises:
            ShardSetError: the manifest has a different digest.
        """
        found = self.of(content, self.algorithm)
        if found != self:
            raise ShardSetError(
                f"{where}: expected digest {self}, found {found}: not the expected set; specify the right set, or the "
                "digest of this one if the change is intended"
            )

    def __str__(self) -> str:
        return f"{self.algorithm}={self.digits}"


def split_digest(location: Path | str, option: str | None = None) -> tuple[str, ManifestDigest | None]:
    """Split LOCATION#xxh3=HEX or LOCATION#sha256=HEX into the location and the expected digest.

    Args:
        option: value of --set-digest, the alternative to a digest in the location.

    Returns:
        The location, and the expected digest; None if neither specifies one.

    Raises:
        UserError: a digest is malformed, or two different digests are specified.
    """
    text = str(location)
    digests = [ManifestDigest.parse(option, "--set-digest")] if option is not None else []
    if match := _SUFFIX.search(text):
        text = text[: match.start()]
        digests.append(ManifestDigest.parse(match[0][1:], "#"))
    if len(set(digests)) > 1:
        raise UserError(f"--set-digest {digests[0]}, but #{digests[1]} in the location of the set; specify one of them")
    return text, digests[0] if digests else None
