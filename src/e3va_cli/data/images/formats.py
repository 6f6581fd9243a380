"""Formats of image files: those that are read, and those that people have but that cannot be read here.

Files of the latter are named with what to do, never passed over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path, PurePath

from PIL import features

from e3va_cli.utils.text import escape_text, pluralize, truncate_list

# Of all that Pillow knows: it would start Ghostscript for a file of another kind, whatever its suffix is.
FORMATS = ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
IMAGE_SUFFIXES = {
    *(".bmp", ".gif", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    *(".png", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".webp"),
}
SUFFIXES = {
    "AVIF": (".avif", ".avifs"),
    "HEIC": (".heic", ".heics", ".heif", ".heifs", ".hif"),
    "JPEG XL": (".jxl",),
    "raw camera": (
        *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".orf", ".rw2", ".raf", ".raw"),
        *(".pef", ".srw", ".3fr", ".iiq", ".rwl", ".x3f", ".kdc", ".dcr", ".erf", ".mrw"),
    ),
    "SVG": (".svg", ".svgz"),
    "Photoshop": (".psd", ".psb"),
    "OpenEXR": (".exr",),
    "Radiance HDR": (".hdr",),
    "DICOM": (".dcm", ".dicom"),
    "NIfTI": (".nii",),
    "TGA": (".tga",),
    "DDS": (".dds",),
    "GIMP": (".xcf",),
}
CONVERT = "convert them to JPEG or PNG"
REMEDIES = {
    "AVIF": f"install Pillow 11.3 or newer, or {CONVERT}",
    "HEIC": f"`pip install pillow-heif` to have them read, or {CONVERT}",
}
RAW = "raw camera"  # which would be read as TIFF: a small preview, or pixels that are no picture
NAMED = 3  # files of each format
HEAD = 512  # bytes of a file that tell of its format
BRANDS = {  # of the container that several formats have
    "AVIF": (b"avif", b"avis"),
    "HEIC": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"),
}
READ = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF")  # that what is read begins with
BEGINNINGS = {
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL "),
    "Photoshop": (b"8BPS",),
    "PDF or PostScript": (b"%PDF", b"%!PS"),
    "OpenEXR": (b"\x76\x2f\x31\x01",),
    "Radiance HDR": (b"#?RADIANCE",),
    "DDS": (b"DDS ",),
    "GIMP": (b"gimp xcf",),
}


def _add_readable(name: str, format_name: str) -> None:
    FORMATS.append(format_name)
    IMAGE_SUFFIXES.update(SUFFIXES.pop(name))


if features.check_module("avif") if "avif" in features.modules else False:  # Pillow 11.3, built with libavif
    _add_readable("AVIF", "AVIF")
if find_spec("pillow_heif") is not None:  # the extra `heif`
    import_module("pillow_heif").register_heif_opener()
    _add_readable("HEIC", "HEIF")

UNREAD = {suffix: name for name, suffixes in SUFFIXES.items() for suffix in suffixes}
KNOWN_SUFFIXES = frozenset({*IMAGE_SUFFIXES, *UNREAD})  # of what people mean as images, read or not


def unread_format(path: Path) -> str | None:
    """Return the name of the format of a file that is not read here, by its beginning, else by its suffix."""
    named = UNREAD.get(path.suffix.lower())
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return named
    if head.startswith(READ):
        return None
    if head[4:8] == b"ftyp":
        brands = {head[8:12], *(head[at : at + 4] for at in range(16, min(int.from_bytes(head[:4], "big"), HEAD), 4))}
        found = [name for name, known in BRANDS.items() if not brands.isdisjoint(known)]
        return next((name for name in found if name in SUFFIXES), None if found else named)
    for name, beginnings in BEGINNINGS.items():
        if head.startswith(beginnings):
            return name
    return "SVG" if b"<svg" in head else named


def remedy(name: str) -> str:
    """Return what to do about files of a format that is not read here."""
    return REMEDIES.get(name, CONVERT)


def describe_unread(names: Iterable[str]) -> str:
    """Return how many of some files have the suffix of a format that is not read here, which, and what to do.

    Nothing where there is none.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        if (kind := UNREAD.get(PurePath(name).suffix.lower())) is not None:
            found[kind].append(escape_text(name))
    return "; ".join(
        f"{pluralize(len(files), f'{kind} file')} that cannot be read here "
        f"({truncate_list(files, NAMED)}): {remedy(kind)}"
        for kind, files in sorted(found.items())
    )
