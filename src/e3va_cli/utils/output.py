"""Standard output and standard error, to which printing ends no command: files of results come before what is said.

A reader that has gone (`| head`, a terminal that has closed), a full disk under `> log`, a descriptor that was closed
from the start (`>&-`), and an encoding that lacks a character are all the same to what prints.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.ESHUTDOWN)  # nobody reads it any more; EIO of a terminal
SIGPIPE_EXIT = 141  # a shell's code for a program whose reader has gone, as of `git log | head`
UNWRITTEN_EXIT = 1
LOOKALIKES = {
    **{"…": "...", "•": "*", "·": ".", "–": "-", "—": "-", "−": "-"},  # noqa: RUF001 (they are what is replaced)
    **{"→": "->", "←": "<-", "≤": "<=", "≥": ">=", "×": "x", "‘": "'", "’": "'", "“": '"', "”": '"'},  # noqa: RUF001
}


class OutputStream(io.FileIO):
    """A descriptor that takes whatever is written: once that fails, all goes to the null device instead.

    Attributes:
        lost: why it failed, or None.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.lost: OSError | None = None

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write some of `data` and return how much."""
        try:
            while (written := super().write(data)) is None:  # whoever made the pipe made it non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            self.lost = error
            redirect_to_devnull([self.fileno()])
            return len(data)


def redirect_to_devnull(descriptors: list[int]) -> None:
    """Let whatever is written to these descriptors from now on vanish, by child processes too."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    if nowhere not in descriptors:
        os.close(nowhere)


@contextmanager
def robust_output() -> Iterator[None]:
    """Within the block, a command prints to streams that cannot fail.

    Raises:
        SystemExit: the command succeeded, but not all that it printed could be written. Where its reader has gone,
            without a word and with a shell's code for it; otherwise one line on standard error says why.
    """
    _fill_closed()
    output, _ = _replace("stdout", 1), _replace("stderr", 2)
    try:
        yield
    except SystemExit as error:
        if error.code in (1, 2):  # not where a signal has stopped it
            _hint_at_locale()
        if error.code:
            raise
    sys.stdout.flush()
    lost = None if output is None else output.lost
    if lost is None or os.environ.get("LOCAL_RANK", "0") != "0":  # whose end would end the other processes of a run
        return
    if lost.errno in GONE:
        sys.exit(SIGPIPE_EXIT)
    print(f"e3va: error: standard output cannot be written: {lost.strerror}; the files are whole", file=sys.stderr)
    sys.exit(UNWRITTEN_EXIT)


def _fill_closed() -> None:
    """Give the standard descriptors that are closed to the null device, lest a file of results is opened as one."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            redirect_to_devnull([descriptor])


def _hint_at_locale() -> None:
    """Say what may be behind a failure: files that the locale cannot name, which are not found."""
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":
        hint = f"arguments and names of files are read as {encoding} here; where that is wrong, set PYTHONUTF8=1"
        print(f"e3va: note: {hint}", file=sys.stderr)


def _replace(name: str, descriptor: int) -> OutputStream | None:
    """Put a stream that cannot fail in place of `sys.stdout` or `sys.stderr`, unless it is none of Python's own."""
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
    except OSError:  # of a notebook or a test, which keep what is written
        return None


def _legible(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace a character that the encoding lacks by one that resembles it, or by its escape: `\\u732b`."""
    assert isinstance(error, UnicodeEncodeError)
    letter = error.object[error.start]
    plain = LOOKALIKES.get(letter) or _frame(letter) or letter.encode("ascii", "backslashreplace").decode()
    return plain, error.start + 1


def _legible_or_byte(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write a byte of a file's name that was no character as that byte again, as Python does in the C locale."""
    assert isinstance(error, UnicodeEncodeError)
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    return _legible(error)


def _frame(letter: str) -> str:
    """What stands for a piece of a table's frame or of a progress bar, or nothing."""
    name = unicodedata.name(letter, "")
    if not name.startswith("BOX DRAWINGS"):
        return ""
    directions = set(name.split()) & {"HORIZONTAL", "LEFT", "RIGHT", "VERTICAL", "UP", "DOWN"}
    if directions <= {"HORIZONTAL", "LEFT", "RIGHT"}:
        return "-"
    return "|" if directions <= {"VERTICAL", "UP", "DOWN"} else "+"


codecs.register_error("legible", _legible)
codecs.register_error("legible_or_byte", _legible_or_byte)
