"""Mutate valid files: their bytes, or the values of a JSON document."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

# Typical causes of parser faults: integer limits in both byte orders, NaN, separators, long numbers.
TOKENS = (
    b"\0",
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x7f" + b"\xff" * 7,
    b"\xff" * 7 + b"\x7f",
    b"\0\0\0\x80",
    b"\x80\0\0\0",
    b"NaN",
    b"-1",
    b"1e999",
    b"9" * 5000,
    b"../",
    b"/etc/passwd",
    b"\n",
    b"\r\n",
    b'"',
    b"{}",
    b"[" * 5000,
    b"\xc3\x28",
    b"\xef\xbb\xbf",
    b"%s%n",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**32,
    2**53 + 1,
    2**63,
    -(2**63) - 1,
    10**40,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../x",
    "/etc/passwd",
    ".hidden",
    "a\nb",
    "\0",
    "\ud800",
    "[red]x",
    "9" * 5000,
    "x" * 70_000,
    [],
    [[]],
    {},
    {"": None},
)
MAX_GROWTH = 1 << 20


def mutate_bytes(data: bytes, other: bytes, draw: Random) -> bytes:
    """Return `data` with one to eight mutations; `other` is a valid file from which parts are copied."""
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
        at, size = draw.randrange(len(content) + 1), draw.choice((1, 2, 4, 8, 64, 512, 4096))
        kind = draw.randrange(9)
        if kind == 0 and content:
            content[min(at, len(content) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1 and content:
            content[min(at, len(content) - 1)] = draw.randrange(256)
        elif kind == 2:
            del content[at : at + size]
        elif kind == 3:
            del content[at:]
        elif kind == 4:
            content[at:at] = content[at : at + size]
        elif kind == 5:
            token = draw.choice(TOKENS)
            content[at : at + len(token)] = token
        elif kind == 6:
            content[at:at] = draw.choice(TOKENS)
        elif kind == 7 and other:
            start = draw.randrange(len(other))
            content[at : at + size] = other[start : start + size]
        else:
            content[at : at + size] = bytes(size)
        if len(content) > len(data) + MAX_GROWTH:
            del content[len(data) + MAX_GROWTH :]
    return bytes(content)


def mutate_document(document: Any, draw: Random) -> Any:
    """Return a copy of a JSON document with one to three changed values, keys or items."""
    document = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        locations = list(_locations(document))
        if not locations:
            return draw.choice(VALUES)
        parent, key = draw.choice(locations)
        kind = draw.randrange(8)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[str(draw.choice(VALUES))] = parent[key]
        elif kind == 1:
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == 2:
            other, other_key = draw.choice(locations)
            parent[key] = copy.deepcopy(other[other_key])
        elif kind == 3 and isinstance(parent[key], int | float):
            parent[key] = _near(parent[key], draw)
        elif kind == 4 and isinstance(parent[key], str) and parent[key]:
            at = draw.randrange(len(parent[key]))
            parent[key] = parent[key][:at] + draw.choice("0\n\0/.é[") + parent[key][at + 1 :]
        else:
            parent[key] = copy.deepcopy(draw.choice(VALUES))
    return document


def dumps(document: Any) -> bytes:
    """Encode as JSON, including lone surrogates and NaN."""
    return json.dumps(document, indent=1, sort_keys=True).encode()


def _near(number: float, draw: Random) -> float:
    try:
        return draw.choice((number + 1, number - 1, -number, number * 10, number * 2**32, float(number), str(number)))
    except OverflowError:
        return 0


def _locations(document: Any) -> Any:
    """Yield (container, key) of every value in the document, without recursion."""
    stack = [document]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            yield node, key
            stack.append(node[key])
