"""Encodings of text files: as declared, else UTF-8, else as configured."""

from __future__ import annotations

import codecs
import re

DECLARED = re.compile(rb"""\s*<\?xml[^>]{0,200}?\sencoding\s*=\s*["']([A-Za-z0-9._:-]{1,40})["']""")
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# Decode declared encodings as their supersets, as https://encoding.spec.whatwg.org/#names-and-labels has it.
SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949"}


def decode_text(data: bytes, encoding: str | None = None) -> str:
    """Decode a text file: by its byte order mark, else as UTF-8, else in `encoding`.

    Raises:
        UnicodeError: none of these applies.
    """
    mark = next((mark for mark in MARKS if data.startswith(mark)), None)
    if mark is not None:
        return data.decode(MARKS[mark])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        if encoding is None:
            raise
        return data.decode(_superset(encoding))


def decode_xml(data: bytes, encoding: str | None = None) -> tuple[str, bool]:
    """Decode an XML file; return also whether its encoding is a guess (latin-1, which decodes any bytes).

    Args:
        data: of the file.
        encoding: of a file that is not UTF-8 and declares none.

    Raises:
        UnicodeError, LookupError: the declared encoding is wrong or unknown.
    """
    declared = DECLARED.match(data)
    name = _superset(declared[1].decode()) if declared else "utf-8"
    if name != "utf-8" and not data.startswith(tuple(MARKS)):
        return data.decode(name), False
    try:
        return decode_text(data, encoding), False
    except UnicodeDecodeError:
        return data.decode("latin-1"), True


def _superset(name: str) -> str:
    """Return Python's name of an encoding, or of its superset.

    Raises:
        LookupError: there is no such text encoding.
    """
    "".encode(name)  # raises LookupError
    codec = codecs.lookup(name).name.replace("-", "_")
    return SUPERSETS.get(codec, codec.replace("_", "-") if codec == "utf_8" else codec)


def is_encoding(name: str) -> bool:
    """Return whether Python has a text encoding of that name."""
    try:
        "".encode(name)
    except (LookupError, UnicodeError, ValueError):
        return False
    return True
