"""Remove credentials from text that is shown, logged or saved."""

from __future__ import annotations

import re

HIDDEN = "***"
# user:password@ of a URL; the user may be a token too, as for GitHub or Hugging Face. A password may itself hold an @.
_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s\"'<>]*@")
# Signed URLs (S3, GCS, Azure) carry the right to read in the query.
_QUERY = re.compile(r"(://[^\s?#\"'<>]*\?)[^\s#\"'<>]+")


def redact(text: str) -> str:
    """Replace the user, the password and the query of every URL in `text` by ***. Idempotent."""
    return _QUERY.sub(rf"\g<1>{HIDDEN}", _CREDENTIALS.sub(f"{HIDDEN}@", text))
