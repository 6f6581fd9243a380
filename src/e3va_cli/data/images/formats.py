"""Image formats: supported ones, and common unsupported ones, which are reported with a remedy and never skipped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path, PurePath

from PIL import features

from e3va_cli.utils.text import escape_text, pluralize, truncate_list

# Restricted, as Pillow would start Ghostscript for some files, whatever their suffix is.
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
    "HEIC": f"`pip install pillow-heif`, or {CONVERT}",
}
RAW = "raw camera"  # Pillow would read them as TIFF: a small preview, or undeveloped pixels
FILES_SHOWN = 3  # of each format
HEADER_BYTES = 512
FTYP_BRANDS = {  # of the container shared by several formats
    "AVIF": (b"avif", b"avis"),
    "HEIC": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"),
}
READABLE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF")  # of supported formats
UNSUPPORTED_MAGIC = {
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

UNSUPPORTED_SUFFIXES = {suffix: name for name, suffixes in SUFFIXES.items() for suffix in suffixes}
KNOWN_SUFFIXES = frozenset({*IMAGE_SUFFIXES, *UNSUPPORTED_SUFFIXES})  # of all images, supported or not


def unsupported_format(path: Path) -> str | None:
    """Return the name of a file's unsupported format, by its first bytes, else by its suffix; None if supported."""
    named = UNSUPPORTED_SUFFIXES.get(path.suffix.lower())
    try:
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError:
        return named
    if head.startswith(READABLE_MAGIC):
        return None
    if head[4:8] == b"ftyp":
        end = min(int.from_bytes(head[:4], "big"), HEADER_BYTES)
        brands = {head[8:12], *(head[at : at + 4] for at in range(16, end, 4))}
        matches = [name for name, known in FTYP_BRANDS.items() if not brands.isdisjoint(known)]
        return next((name for name in matches if name in SUFFIXES), None if matches else named)
    for name, beginnings in UNSUPPORTED_MAGIC.items():
        if head.startswith(beginnings):
            return name
    return "SVG" if b"<svg" in head else named


def conversion_hint(name: str) -> str:
    """Return how to make files of an unsupported format readable."""
    return REMEDIES.get(name, CONVERT)


def describe_unsupported(names: Iterable[str]) -> str:
    """Return the files with suffixes of unsupported formats and how to convert them; empty if there are none."""
    by_format: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        if (format_name := UNSUPPORTED_SUFFIXES.get(PurePath(name).suffix.lower())) is not None:
            by_format[format_name].append(escape_text(name))
    return "; ".join(
        f"{pluralize(len(files), f'{format_name} file')} that cannot be read "
        f"({truncate_list(files, FILES_SHOWN)}): {conversion_hint(format_name)}"
        for format_name, files in sorted(by_format.items())
    )
