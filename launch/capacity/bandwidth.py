"""Parse rates such as "400 Gbit/s" and "5 GB/s"."""

from __future__ import annotations

import re

from shards.errors import UserError
from shards.redact import printable

_RATE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([kmgt])(bit|bits|b|byte|bytes)(?:/s|ps)?", re.ASCII | re.IGNORECASE)
_PREFIXES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def parse_rate(option: str, text: str) -> float:
    """Return bytes/s of a decimal number with a unit: kbit, Mbit, Gbit, Tbit, kB, MB, GB or TB, with or without "/s".

    A small b alone is rejected, because it is used for bits and for bytes.

    Raises:
        UserError: the text is not a positive rate.
    """
    match = _RATE.fullmatch(text.strip())
    if match is None or match[3] == "b" or not float(match[1]):
        raise UserError(f"{option} {printable(text[:40])}: expected a rate such as '400 Gbit/s' or '5 GB/s'")
    scale = _PREFIXES[match[2].lower()]
    return float(match[1]) * scale / (8 if match[3].lower().startswith("bit") else 1)
