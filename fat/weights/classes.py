"""The classes of a model's outputs, which are stored with its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fat.config import LIMITS

MAX_TEXT = 4 * 2**20
"""Maximum bytes of a class list in a weights file's header. The 21,841 named classes of ImageNet-21k take 1.2 MB."""
MAX_COUNT = LIMITS["num_classes"][1]
_DIGEST_DIGITS = 64


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """Classes in the order of a model's outputs. A model may have more outputs than classes.

    If the list is too long for a file's header, the file stores only its length and digest.
    """

    count: int
    digest: str
    """SHA-256 of the ordered folder names, 64 hex digits. Human-readable names are not included."""
    folders: tuple[str, ...] | None = None
    """Folder name or synset id of each class, which identifies the class. None: only the digest is known."""
    names: tuple[str | None, ...] | None = None
    """Human-readable names, which need not be unique. None: no class has a name."""

    @classmethod
    def of(cls, folders: Sequence[str], names: Sequence[str | None] | None = None) -> ClassList:
        """Create a list from folder names, in the order of the outputs, and optional human-readable names."""
        folders, names = tuple(folders), tuple(names or ())
        return cls(count=len(folders), digest=_digest(folders), folders=folders, names=names if any(names) else None)

    def dumps(self, limit: int | None = None) -> str:
        """Return the list as JSON; if this has more than `limit` bytes, only its length and digest."""
        content: dict[str, Any] = {"count": self.count, "digest": self.digest}
        short = json.dumps(content)
        if self.folders is None:
            return short
        content["folders"] = self.folders
        if self.names is not None:
            content["names"] = self.names
        text = json.dumps(content, ensure_ascii=False)
        return text if limit is None or len(text.encode("utf-8", "surrogatepass")) <= limit else short

    @classmethod
    def loads(cls, text: str) -> ClassList:
        """Parse the output of `dumps`, from an untrusted file.

        Raises ValueError if the text is not a class list, or its classes do not match its count or digest.
        """
        try:
            content = json.loads(text)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(content, dict) or not {"count", "digest"} <= content.keys():
            raise ValueError("expected a mapping with the keys count and digest")
        count, digest = content["count"], content["digest"]
        if type(count) is not int or not 1 <= count <= MAX_COUNT:
            raise ValueError(f"count: expected an integer from 1 to {MAX_COUNT:,}")
        if not isinstance(digest, str) or len(digest) != _DIGEST_DIGITS:
            raise ValueError(f"digest: expected {_DIGEST_DIGITS} hex digits")
        folders, names = content.get("folders"), content.get("names")
        for name, values, kinds in (("folders", folders, (str,)), ("names", names, (str, type(None)))):
            if values is not None and not (
                isinstance(values, list) and len(values) == count and all(isinstance(v, kinds) for v in values)
            ):
                raise ValueError(f"{name}: expected a list of {count} strings")
        if folders is not None and _digest(folders) != digest:
            raise ValueError("digest: does not match the folders")
        return cls(
            count=count,
            digest=digest,
            folders=None if folders is None else tuple(folders),
            names=None if names is None else tuple(names),
        )

    def has_same_classes(self, other: ClassList) -> bool:
        """Return whether both lists have the same classes in any order; False if only the digest of one is known."""
        if self.folders is None or other.folders is None or self.count != other.count:
            return False
        return len(set(self.folders)) == self.count and set(self.folders) == set(other.folders)


def _digest(folders: Sequence[str]) -> str:
    text = json.dumps(list(folders), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
