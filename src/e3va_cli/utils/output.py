"""Standard output and standard error that never raise, and the log of the library.

A command that prints must still write its results if nobody reads its output (`| head`, a terminal that is closed), the
disk is full (`> log`), the descriptor is closed (`>&-`), or the encoding lacks a character.
"""

from __future__ import annotations

import codecs
import errno
import io
import logging
import os
import select
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.ESHUTDOWN)  # without a reader; EIO of a terminal
SIGPIPE_EXIT = 141  # a shell's code for a program whose reader has exited
UNWRITTEN_EXIT = 1
LOOKALIKES = {
    **{"…": "...", "•": "*", "·": ".", "–": "-", "—": "-", "−": "-"},  # noqa: RUF001 (replaced here)
    **{"→": "->", "←": "<-", "≤": "<=", "≥": ">=", "×": "x", "‘": "'", "’": "'", "“": '"', "”": '"'},  # noqa: RUF001
}


class OutputStream(io.FileIO):
    """A descriptor whose writes never fail: after an error, it is redirected to the null device.

    Attributes:
        lost: the error, or None.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.lost: OSError | None = None

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write some of `data` and return the number of bytes."""
        try:
            while (written := super().write(data)) is None:  # a non-blocking pipe that is full
                select.select([], [self], [])
            return written
        except OSError as error:
            self.lost = error
            redirect_to_devnull([self.fileno()])
            return len(data)


def redirect_to_devnull(descriptors: list[int]) -> None:
    """Redirect descriptors to the null device, for child processes too."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(null, descriptor)
    if null not in descriptors:
        os.close(null)


@contextmanager
def robust_output() -> Iterator[None]:
    """Replace standard output and standard error by streams that never raise.

    Raises:
        SystemExit: the command succeeded, but some of its output could not be written. If its reader has exited, the
            code is a shell's for SIGPIPE; otherwise an error is printed to standard error.
    """
    _fill_closed()
    output, _ = _replace("stdout", 1), _replace("stderr", 2)
    try:
        yield
    except SystemExit as error:
        if error.code in (1, 2):  # not after a signal
            _hint_at_locale()
        if error.code:
            raise
    sys.stdout.flush()
    lost = None if output is None else output.lost
    if lost is None or os.environ.get("LOCAL_RANK", "0") != "0":  # a child that fails would end the other processes
        return
    if lost.errno in GONE:
        sys.exit(SIGPIPE_EXIT)
    print(f"e3va: error: standard output cannot be written: {lost.strerror}; the files are whole", file=sys.stderr)
    sys.exit(UNWRITTEN_EXIT)


def _fill_closed() -> None:
    """Redirect closed standard descriptors to the null device, so that no file is opened as one of them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            redirect_to_devnull([descriptor])


def _hint_at_locale() -> None:
    """Print a hint after an error: files whose names the locale cannot encode are not found."""
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":
        hint = f"file names are decoded as {encoding}; if they are UTF-8, set PYTHONUTF8=1"
        print(f"e3va: note: {hint}", file=sys.stderr)


def _replace(name: str, descriptor: int) -> OutputStream | None:
    """Replace `sys.stdout` or `sys.stderr`, unless it is not the descriptor's own stream."""
    stream: TextIO | None = getattr(sys, name)
    encoding, errors, by_line = "utf-8", "strict", True
    if stream is not None:
        if not isinstance(stream, io.TextIOWrapper) or _descriptor_of(stream) != descriptor:
            return None
        stream.flush()
        encoding, errors = stream.encoding, stream.errors or errors
        by_line = stream.line_buffering or stream.write_through
    output = OutputStream(descriptor)
    errors = {"strict": "legible", "surrogateescape": "legible_or_byte"}.get(errors, errors)
    setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(output), encoding, errors, line_buffering=by_line))
    return output


def _descriptor_of(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except OSError:  # of a notebook or a test, which capture output
        return None


def _legible(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace a character that the encoding lacks by a similar one, or by its escape: `\\u732b`."""
    assert isinstance(error, UnicodeEncodeError)
    letter = error.object[error.start]
    plain = LOOKALIKES.get(letter) or _frame(letter) or letter.encode("ascii", "backslashreplace").decode()
    return plain, error.start + 1


def _legible_or_byte(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write an undecodable byte of a file name as that byte, as Python does in the C locale."""
    assert isinstance(error, UnicodeEncodeError)
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    return _legible(error)


def _frame(letter: str) -> str:
    """Return the ASCII character for a box drawing character, else an empty string."""
    name = unicodedata.name(letter, "")
    if not name.startswith("BOX DRAWINGS"):
        return ""
    directions = set(name.split()) & {"HORIZONTAL", "LEFT", "RIGHT", "VERTICAL", "UP", "DOWN"}
    if directions <= {"HORIZONTAL", "LEFT", "RIGHT"}:
        return "-"
    return "|" if directions <= {"VERTICAL", "UP", "DOWN"} else "+"


class _LogHandler(logging.Handler):
    """Prints a message to standard error as one line: `e3va: warning: ...`."""

    def emit(self, record: logging.LogRecord) -> None:
        level = {logging.INFO: "note"}.get(record.levelno, record.levelname.lower())
        print(f"e3va: {level}: {record.getMessage()}", file=sys.stderr, flush=True)


log = logging.getLogger("e3va_cli")
log.setLevel(logging.INFO)
log.propagate = False
log.handlers = [_LogHandler()]
codecs.register_error("legible", _legible)
codecs.register_error("legible_or_byte", _legible_or_byte)
