"""Remove credentials from text that is printed, logged or saved, and make messages single-line."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
import traceback
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

HIDDEN = "***"
# user:password@ of a URL; the user may also be a token (GitHub, Hugging Face). A password may contain an @.
# `Path` turns "://" into ":/".
_CREDENTIALS = re.compile(r"(:/{1,2})[^/?#\s\"'<>]*@")
# The query of a signed URL (S3, GCS, Azure) grants read access.
_QUERY = re.compile(r"(:/{1,2}[^\s?#\"'<>]*\?)[^\s#\"'<>]+")
# Control characters, line and paragraph separators, bidirectional control characters, and surrogates (bytes of names
# that are not UTF-8). Other characters that are not `str.isprintable`, such as U+3000 and joiners, occur in real names.
_ESCAPED = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")

_PATH = r"(?<![^\s'\"(])"  # the lookbehind matches only at the start of a path


def redact(text: str) -> str:
    """Replace user, password and query of every URL in `text` with ***. Idempotent."""
    return _QUERY.sub(rf"\g<1>{HIDDEN}", _CREDENTIALS.sub(rf"\g<1>{HIDDEN}@", text))


def redacted(value: Any) -> Any:
    """Redact all strings in nested dicts, lists and tuples, including keys. Paths are converted to strings."""
    if isinstance(value, dict):
        return {redact(key) if isinstance(key, str) else key: redacted(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(entry) for entry in value]
    return redact(str(value)) if isinstance(value, str | Path) else value


def printable(text: object) -> str:
    """Redact text, and convert it to a single line with `one_line`."""
    return one_line(redact(str(text)))


def with_relative_paths(line: str, source: Path) -> str:
    """Make paths in a message relative to the source, so that dataset.json does not depend on where the source is."""
    own_path, parent = (re.escape(str(path)) for path in (source.absolute(), source.absolute().parent))
    line = re.sub(rf"{_PATH}{own_path}/", "", line)
    line = re.sub(rf"{_PATH}{own_path}(?![^\s:;,'\")])", "the source", line)
    if parent != "/":
        line = re.sub(rf"{_PATH}{parent}/", "", line)
    return one_line(line)


def one_line(text: str) -> str:
    """Escape line breaks, control characters and surrogates, like Python's string literals.

    Paths and class names are untrusted: printed unescaped, they could inject log lines or terminal commands.
    """
    return _ESCAPED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def display_name(name: bytes) -> str:
    """Return a file name as a single line of text; bytes that are not UTF-8 are escaped."""
    return one_line(name.decode("utf-8", errors="backslashreplace"))


def protect_output() -> None:
    """Redact all log messages, warnings and tracebacks of this process, including those of libraries.

    Also escapes file names that are not UTF-8 on standard output. Called at the start of every command. Idempotent.
    """
    if logging.getLogRecordFactory() is not _redacted_record:
        logging.setLogRecordFactory(_redacted_record)
    if warnings.formatwarning is not _redacted_warning:
        warnings.formatwarning = _redacted_warning
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_exception
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _print_thread_exception
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def redacted_traceback(error: BaseException) -> str:
    """Format the traceback of an unexpected error without credentials."""
    return redact("".join(traceback.format_exception(error)))


_plain_record = logging.getLogRecordFactory()
_plain_warning = warnings.formatwarning


def _redacted_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = _plain_record(*args, **kwargs)
    try:
        record.msg, record.args = redact(record.getMessage()), None
    except (TypeError, ValueError):  # the log call's arguments do not match its format; logging reports this
        return record
    if record.exc_info and record.exc_info[1] is not None:
        record.exc_text = redacted_traceback(record.exc_info[1])
    return record


def _redacted_warning(*args: Any, **kwargs: Any) -> str:
    return redact(_plain_warning(*args, **kwargs))


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redacted_traceback(error), end="", file=sys.stderr, flush=True)


def _print_thread_exception(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and args.exc_type is not SystemExit:
        print(redacted_traceback(args.exc_value), end="", file=sys.stderr, flush=True)
