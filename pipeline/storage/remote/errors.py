"""Errors of remote servers, and their classification as permanent or transient."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

from shards.errors import UserError, first_line
from shards.redact import redact

CREDENTIAL_HELP = (
    "credentials are read from the environment (AWS_* for s3://), fsspec's configuration (~/.config/fsspec/) or, for "
    "http(s)://, ~/.netrc"
)
# botocore's errors for missing credentials, by name so that botocore need not be imported.
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
    """The server cannot be used, or does not have a file of the set."""


class ServerFailed(RemoteError):
    """Requests to the server failed for `RETRY_SECONDS`; a later attempt may succeed."""

    exit_code = 1


class NoRanges(RemoteError):
    """The server does not support range requests: it sends the complete file."""


class BadAnswer(Exception):
    """A response without the requested bytes. Another request may succeed."""


def no_ranges(url: str) -> str:
    """Return the message for a server without support for range requests, where they are needed."""
    return (
        f"{redact(url)}: the server ignores HTTP range requests and sends complete files, so shards can be read only "
        "from the cache, which is too small: specify a larger one (--cache DIR, --cache-size GIB), or use a server "
        "that supports range requests, such as nginx"
    )


def too_short(url: str, expected: int, found: int) -> str:
    """Return the message for a remote file that is shorter than the manifest requires."""
    return (
        f"{redact(url)}: truncated on the server: it has {found:,} bytes, but the manifest requires at least "
        f"{expected:,}; upload the file again"
    )


def permanent_failure(error: BaseException) -> str | None:
    """Return a message for a permanent error, or None for a transient one. No other code classifies these errors."""
    for cause in _chain(error):
        fact = getattr(cause, "verify_message", None)  # only TLS certificate errors have it
        if isinstance(cause, ssl.SSLCertVerificationError) and fact:
            return (
                f"the server's TLS certificate is not trusted ({fact}); set SSL_CERT_FILE (for s3://: AWS_CA_BUNDLE) "
                "to a file with the certificate of the authority that signed it"
            )
        if type(cause).__name__ in _NO_CREDENTIALS:
            return f"{describe(cause)}; {CREDENTIAL_HELP}"
    if isinstance(error, PermissionError):
        return f"access denied ({describe(error)}); {CREDENTIAL_HELP}"
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return f"not found on the server ({describe(error)}); check the URL"
    kind = {each.__name__ for each in type(error).__mro__}
    if "RedirectClientError" in kind:
        return f"the server redirects to a URL that is not http(s):// ({describe(error)}); check the URL"
    return f"not a valid URL ({describe(error)})" if kind & {"InvalidURL", "NonHttpUrlClientError"} else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def describe(error: BaseException) -> str:
    """Return the class and the first line of an error, without credentials."""
    text = redact(first_line(error))
    return text if isinstance(error, BadAnswer) else f"{type(error).__name__}: {text}".rstrip(": ")
