"""URLs of shard sets: which locations are remote, and which URLs are rejected."""

from __future__ import annotations

import ipaddress
import logging
from urllib.parse import urlsplit

from pipeline.storage.remote.errors import CREDENTIAL_HELP
from shards.errors import UserError
from shards.redact import redact

log = logging.getLogger(__name__)


def is_remote(location: object) -> bool:
    """Whether a set's location is a URL."""
    return "://" in str(location)


def check_url(url: str) -> None:
    """Reject a URL that carries credentials: it would end up in recipe.json, in logs and in lists of processes.

    Raises:
        UserError: a password, a user of a web server (often a token), or a query (such as a signature).
    """
    for part in url.split("::"):
        try:
            split = urlsplit(part)
            secret = split.password is not None or (split.scheme in ("http", "https") and split.username is not None)
        except ValueError as error:
            raise UserError(f"{redact(url)}: not a URL ({redact(str(error))})") from None
        if secret:
            raise UserError(f"{redact(url)}: credentials in the URL; give it without them: {CREDENTIAL_HELP}")
        if split.query or split.fragment:
            raise UserError(
                f"{redact(part.partition('#')[0])}: a query (?...) or fragment (#...) in the URL of a folder; "
                f"give it without: {CREDENTIAL_HELP}; a digest is pinned by #xxh3=HEX or #sha256=HEX"
            )


def warn_without_tls(url: str) -> None:
    """Log a warning if others on the network can read and change the data."""
    split = urlsplit(url.rpartition("::")[2])
    if split.scheme == "http" and not _is_this_machine(split.hostname or ""):
        log.warning(
            "%s: http without TLS: others on the network can read and change what is sent; hashes notice damage, not "
            "an attacker; use https://",
            redact(url),
        )


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
