"""Validate JSON that comes from outside (a server, a copied folder, another version) before anything uses it."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, FiniteFloat, StringConstraints, TypeAdapter, ValidationError

T = TypeVar("T")

MAX_NAME = 255
"""Bytes of a file name, the limit of Linux file systems."""
_SHOWN = 60


def plain_file_name(name: str) -> str:
    """Return `name` if it names a file directly inside a folder, whatever the folder.

    Raises:
        ValueError: it is empty, hidden, too long, a path, or holds a control character.
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
"""A count or a size in bytes; larger ones cannot be exact in JSON."""
Finite = FiniteFloat


def parse_json(content: bytes, schema: TypeAdapter[T], *, limit: int) -> T:
    """Parse and validate a JSON document: strict types, no unknown fields.

    Args:
        content: UTF-8.
        schema: of a dataclass or another type whose fields state types and ranges.
        limit: bytes that the document may have; checked before it is parsed.

    Raises:
        ValueError: one line with the field, what was found and what was expected.
    """
    if len(content) > limit:
        raise ValueError(f"{len(content):,} bytes, more than the {limit:,} allowed")
    try:
        return schema.validate_json(content, strict=True, extra="forbid")
    except ValidationError as error:
        raise ValueError(first_error(error)) from None


def first_error(error: ValidationError) -> str:
    """Describe the first fault: field, expected, found, and how many more there are."""
    first: Any = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    # Of a document that is no JSON, or of a missing field, `input` is everything around it.
    if first["type"] in ("json_invalid", "missing"):
        found = ""
    else:
        shown = repr(first["input"])
        found = f", found {shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{field}: {message}{found}{more}" if field else f"{message}{found}{more}"
