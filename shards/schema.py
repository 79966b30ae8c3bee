"""Validate untrusted JSON (from a server, a copied folder or another version) before it is used."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, FiniteFloat, StringConstraints, TypeAdapter, ValidationError

T = TypeVar("T")

MAX_NAME = 255
"""Maximum length of a file name in bytes: the limit of Linux file systems."""
_SHOWN = 60


def plain_file_name(name: str) -> str:
    """Return `name` if it is a plain file name, without a path.

    Raises:
        ValueError: it is empty, hidden, too long or a path, or contains a control character.
    """
    if not name or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError("not a plain file name")
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
        raise ValueError(f"a file name of more than {MAX_NAME} bytes")
    return name


FileName = Annotated[str, AfterValidator(plain_file_name)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
"""xxh3-64, 16 hex digits."""
Count = Annotated[int, Field(ge=0, le=1 << 53)]
"""A count or a size in bytes, up to the largest integer that is exact in JSON."""
Finite = FiniteFloat


def parse_json(content: bytes, schema: TypeAdapter[T], *, limit: int) -> T:
    """Parse and validate a JSON document: strict types, no unknown fields.

    Args:
        content: UTF-8 text.
        schema: adapter of a dataclass or another type with field types and ranges.
        limit: maximum size in bytes, checked before parsing.

    Raises:
        ValueError: the message is one line with the field, the found value and the expected one.
    """
    if len(content) > limit:
        raise ValueError(f"{len(content):,} bytes, more than the {limit:,} bytes that are allowed")
    try:
        return schema.validate_json(content, strict=True, extra="forbid")
    except ValidationError as error:
        raise ValueError(first_error(error)) from None


def first_error(error: ValidationError) -> str:
    """Describe the first validation error: field, expected and found value, and the number of further errors."""
    first: Any = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    # For invalid JSON or a missing field, `input` is the whole surrounding object.
    if first["type"] in ("json_invalid", "missing"):
        found = ""
    else:
        shown = repr(first["input"])
        found = f", found {shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{field}: {message}{found}{more}" if field else f"{message}{found}{more}"
