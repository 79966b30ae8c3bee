"""Errors of servers, and which of them are permanent."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

from shards.errors import UserError, first_line
from shards.redact import redact

CREDENTIAL_HELP = (
    "credentials come from the environment (AWS_* for s3://), the configuration of fsspec (~/.config/fsspec/) or, for "
    "http(s)://, ~/.netrc"
)
# Names of botocore's errors for missing credentials, so that botocore need not be imported.
_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "NoAuthTokenError",
    "TokenRetrievalError",
    "SSOTokenLoadError",
    "UnauthorizedSSOTokenError",
    "ProfileNotFound",
)


class RemoteError(UserError):
    """A server that cannot be used, or lacks a file of the set."""


class ServerFailed(RemoteError):
    """A server that failed for `RETRY_SECONDS`; a later start may succeed."""

    exit_code = 1


class NoRanges(RemoteError):
    """A server that answers a request for a part of a file with the whole file."""


class BadAnswer(Exception):
    """An answer without the bytes that were asked for; the next one may have them."""


def no_ranges(url: str) -> str:
    """Return the message for a server that sends whole files where parts are needed."""
    return (
        f"{redact(url)}: this server ignores Range requests and sends whole files; give a cache with room for them "
        "(--cache DIR, --cache-size GIB), or serve the set by another server, such as nginx"
    )


def too_short(url: str, expected: int, found: int) -> str:
    """Return the message for a file that ends before the bytes that the manifest promises."""
    return (
        f"{redact(url)}: {expected:,} bytes or more expected by the manifest, {found:,} there: truncated; "
        "copy it there again"
    )


def permanent_failure(error: BaseException) -> str | None:
    """Return a message for a permanent error, or None for a transient one. No other code classifies these errors."""
    for cause in _chain(error):
        fact = getattr(cause, "verify_message", None)  # aiohttp's own error of this kind has none, but its cause has
        if isinstance(cause, ssl.SSLCertVerificationError) and fact:
            return (
                f"its certificate is not trusted ({fact}); name the authority "
                "that signed it in SSL_CERT_FILE (for s3:// in AWS_CA_BUNDLE)"
            )
        if type(cause).__name__ in _NO_CREDENTIALS:
            return f"{describe(cause)}; {CREDENTIAL_HELP}"
    if isinstance(error, PermissionError):
        return f"access denied ({describe(error)}); {CREDENTIAL_HELP}"
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return f"not there ({describe(error)}); check the URL"
    kind = {each.__name__ for each in type(error).__mro__}
    if "RedirectClientError" in kind:
        return f"redirects to another kind of address ({describe(error)}); refused"
    return f"not a URL ({describe(error)})" if kind & {"InvalidURL", "NonHttpUrlClientError"} else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def describe(error: BaseException) -> str:
    """Return an error's class and first line, without credentials."""
    text = redact(first_line(error))
    return text if isinstance(error, BadAnswer) else f"{type(error).__name__}: {text}".rstrip(": ")
