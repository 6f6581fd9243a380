"""The encodings of text files: as they declare them, else UTF-8, else as the user says."""

from __future__ import annotations

import codecs
import re

DECLARED = re.compile(rb"""\s*<\?xml[^>]{0,200}?\sencoding\s*=\s*["']([A-Za-z0-9._:-]{1,40})["']""")
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# What programs mean that declare the narrower one, as https://encoding.spec.whatwg.org/#names-and-labels has it.
WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949"}


def decode_text(data: bytes, encoding: str | None = None) -> str:
    """The text of a file: by its byte order mark, else UTF-8, else of that `encoding`.

    Raises:
        UnicodeError: it is none of these.
    """
    mark = next((mark for mark in MARKS if data.startswith(mark)), None)
    if mark is not None:
        return data.decode(MARKS[mark])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        if encoding is None:
            raise
        return data.decode(_wider(encoding))


def decode_xml(data: bytes, encoding: str | None = None) -> tuple[str, bool]:
    """The text of an XML file, and whether its encoding is a guess: latin-1, which any bytes are.

    Args:
        data: of the file.
        encoding: of a file that is not UTF-8 and declares no other.

    Raises:
        UnicodeError, LookupError: it is not of the encoding that it declares, or there is no such encoding.
    """
    declared = DECLARED.match(data)
    name = _wider(declared[1].decode()) if declared else "utf-8"
    if name != "utf-8" and not data.startswith(tuple(MARKS)):
        return data.decode(name), False
    try:
        return decode_text(data, encoding), False
    except UnicodeDecodeError:
        return data.decode("latin-1"), True


def _wider(name: str) -> str:
    """The encoding that is meant by a name, as Python calls it.

    Raises:
        LookupError: there is none, or it is not one of text.
    """
    "".encode(name)  # raises for what is no encoding of text
    found = codecs.lookup(name).name.replace("-", "_")
    return WIDER.get(found, found.replace("_", "-") if found == "utf_8" else found)


def is_encoding(name: str) -> bool:
    """Return whether Python has an encoding of text of that name."""
    try:
        "".encode(name)
    except (LookupError, UnicodeError, ValueError):
        return False
    return True
