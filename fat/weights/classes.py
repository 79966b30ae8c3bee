"""The classes that a model's outputs stand for; they travel with its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fat.config import LIMITS

MAX_TEXT = 4 * 2**20
"""Bytes of a list in the header of a weights file: the 21,841 classes of ImageNet-21k with their names take 1.2 MB."""
MAX_COUNT = LIMITS["num_classes"][1]
_DIGEST_DIGITS = 64


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """Classes in the order of a model's outputs. A model may have further outputs, which no class uses.

    Where a list is too long for a file's header, only its length and digest are known.
    """

    count: int
    digest: str
    """SHA-256 of the folder names in their order, 64 hex digits. Human-readable names are no part of it."""
    folders: tuple[str, ...] | None = None
    """Folder name or synset id of each class, which identifies it; None where only the digest is known."""
    names: tuple[str | None, ...] | None = None
    """Human-readable names, which may repeat; None where no class has one."""

    @classmethod
    def of(cls, folders: Sequence[str], names: Sequence[str | None] | None = None) -> ClassList:
        """Make the list of these classes."""
        folders, names = tuple(folders), tuple(names or ())
        return cls(count=len(folders), digest=_digest(folders), folders=folders, names=names if any(names) else None)

    def dumps(self, limit: int | None = None) -> str:
        """Return the list as JSON, or its length and digest alone where that takes more than `limit` bytes."""
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
        """Read what `dumps` wrote, from a file that anybody may have written.

        Raises ValueError where it is not such a list, or contradicts itself.
        """
        try:
            content = json.loads(text)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(content, dict) or not {"count", "digest"} <= content.keys():
            raise ValueError("no count and digest of classes in it")
        count, digest = content["count"], content["digest"]
        if type(count) is not int or not 1 <= count <= MAX_COUNT:
            raise ValueError(f"count: an integer from 1 to {MAX_COUNT:,} expected")
        if not isinstance(digest, str) or len(digest) != _DIGEST_DIGITS:
            raise ValueError(f"digest: {_DIGEST_DIGITS} hex digits expected")
        folders, names = content.get("folders"), content.get("names")
        for name, values, kinds in (("folders", folders, (str,)), ("names", names, (str, type(None)))):
            if values is not None and not (
                isinstance(values, list) and len(values) == count and all(isinstance(v, kinds) for v in values)
            ):
                raise ValueError(f"{name}: a list of {count} texts expected")
        if folders is not None and _digest(folders) != digest:
            raise ValueError("the classes do not match their digest")
        return cls(
            count=count,
            digest=digest,
            folders=None if folders is None else tuple(folders),
            names=None if names is None else tuple(names),
        )

    def has_same_classes(self, other: ClassList) -> bool:
        """Whether both hold the same classes, in any order; False where one is known by its digest alone."""
        if self.folders is None or other.folders is None or self.count != other.count:
            return False
        return len(set(self.folders)) == self.count and set(self.folders) == set(other.folders)


def _digest(folders: Sequence[str]) -> str:
    text = json.dumps(list(folders), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
