"""Remove credentials from text that is shown, logged or saved, and keep messages to one line."""

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
# user:password@ of a URL; the user may be a token too, as for GitHub or Hugging Face. A password may itself hold an @.
# `Path` makes one slash of two.
_CREDENTIALS = re.compile(r"(:/{1,2})[^/?#\s\"'<>]*@")
# Signed URLs (S3, GCS, Azure) carry the right to read in the query.
_QUERY = re.compile(r"(:/{1,2}[^\s?#\"'<>]*\?)[^\s#\"'<>]+")
# Control characters, line and paragraph separators, changes of the direction of writing, and surrogates, which stand
# for the bytes of names that are not UTF-8. Others that `str.isprintable` refuses occur in names: U+3000, joiners.
_ESCAPED = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")

_PATH = r"(?<![^\s'\"(])"  # at the beginning of a path


def redact(text: str) -> str:
    """Replace the user, the password and the query of every URL in `text` by ***. Idempotent."""
    return _QUERY.sub(rf"\g<1>{HIDDEN}", _CREDENTIALS.sub(rf"\g<1>{HIDDEN}@", text))


def redacted(value: Any) -> Any:
    """Redact every text in nested dicts, lists and tuples (keys too), as they are saved as JSON; paths become text."""
    if isinstance(value, dict):
        return {redact(key) if isinstance(key, str) else key: redacted(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(entry) for entry in value]
    return redact(str(value)) if isinstance(value, str | Path) else value


def printable(text: object) -> str:
    """Redact text and make it one line, as `one_line` does."""
    return one_line(redact(str(text)))


def with_relative_paths(line: str, source: Path) -> str:
    """Return a line about a source with paths below it, as it is kept in dataset.json: a copy gives the same."""
    here, above = (re.escape(str(path)) for path in (source.absolute(), source.absolute().parent))
    line = re.sub(rf"{_PATH}{here}/", "", line)
    line = re.sub(rf"{_PATH}{here}(?![^\s:;,'\")])", "the source", line)
    if above != "/":
        line = re.sub(rf"{_PATH}{above}/", "", line)
    return one_line(line)


def one_line(text: str) -> str:
    """Escape line breaks, control characters and what cannot be encoded, as Python's string literals do.

    Paths and class names come from outside: printed as they are, they could forge further lines or terminal commands.
    """
    return _ESCAPED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def display_name(name: bytes) -> str:
    """Return a file name of any bytes as one line of text."""
    return one_line(name.decode("utf-8", errors="backslashreplace"))


def protect_output() -> None:
    """Redact what this process logs and warns of, and its tracebacks; print file names that are no UTF-8 escaped.

    Messages of libraries are included. Called once at the start of every command. Idempotent.
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
    except (TypeError, ValueError):  # arguments that do not fit the message: logging itself reports that
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
