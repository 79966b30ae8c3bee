"""Validation of the URLs of remote shard sets."""

from __future__ import annotations

import ipaddress
import logging
from urllib.parse import urlsplit

from pipeline.storage.remote.errors import CREDENTIAL_HELP
from shards.errors import UserError
from shards.redact import redact

log = logging.getLogger(__name__)


def is_remote(location: object) -> bool:
    """Return whether the location of a set is a URL."""
    return "://" in str(location)


def check_url(url: str) -> None:
    """Raise UserError if a URL contains credentials, which would appear in recipe.json, logs and process lists.

    Raises:
        UserError: the URL contains a password, a user name for a web server (often a token), a query (often a
            signature) or a fragment.
    """
    for part in url.split("::"):
        try:
            split = urlsplit(part)
            secret = split.password is not None or (split.scheme in ("http", "https") and split.username is not None)
        except ValueError as error:
            raise UserError(f"{redact(url)}: not a valid URL ({redact(str(error))})") from None
        if secret:
            raise UserError(f"{redact(url)}: the URL contains credentials; remove them from it: {CREDENTIAL_HELP}")
        if split.query or split.fragment:
            raise UserError(
                f"{redact(part.partition('#')[0])}: the URL of a set must not have a query (?...), or a fragment "
                f"(#...) other than #xxh3=HEX or #sha256=HEX; remove it: {CREDENTIAL_HELP}"
            )


def warn_without_tls(url: str) -> None:
    """Log a warning if the URL is http:// and the server is not on this machine."""
    split = urlsplit(url.rpartition("::")[2])
    if split.scheme == "http" and not _is_loopback(split.hostname or ""):
        log.warning(
            "%s: http:// is not encrypted: others on the network can read and modify the data; the hashes of the set "
            "detect damage, not an attack; use https://",
            redact(url),
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
