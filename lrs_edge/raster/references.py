"""What an image leads GDAL to open beside itself, checked before GDAL is asked.

A VRT is a recipe that names other files; metadata in a TIFF or a sidecar may name a file of
overviews; `.ovr`, `.msk` and `.aux` beside an image are opened as images whatever they are. GDAL
would take URLs, services described in XML, devices and any format it knows. Here all of them come
under one rule: regular files in the image's own folder or below it, in a format of `FORMATS`.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lrs_edge.errors import ImageError
from lrs_edge.raster.claims import check_jpeg2000_tiles, check_tiff_tiles
from lrs_edge.raster.gdal_env import named_overviews
from lrs_edge.raster.tiff_tags import gdal_metadata, is_tiff
from lrs_edge.raster.xml_scan import MAX_BYTES, Found, XmlRefusedError, scan

MAX_DEPTH = 8
#: Most reads that one pixel window may take through VRTs inside VRTs.
MAX_READS = 20_000
#: Most bytes of a sidecar that is text; GDAL reads them whole.
MAX_SIDECAR_BYTES = 8 << 20

#: How files begin that may be named: JPEG, PNG, JPEG 2000, GIF, BMP, WebP, NITF, ERDAS Imagine.
_STARTS = (
    b"\xff\xd8\xff", b"\x89PNG", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"GIF8", b"BM", b"RIFF",
    b"NITF", b"NSIF", b"EHFA_HEADER_TAG",
)  # fmt: skip
_JPEG_2000 = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
#: Formats of which only a sidecar can name overviews, checked by itself.
_WITHOUT_METADATA = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF")
#: Sidecars by what they are appended to: the whole name, or the name without its ending.
_IMAGES_AFTER_NAME = (".ovr", ".msk", ".aux")
_IMAGES_AFTER_STEM = (".aux", ".rrd", ".ige")
_TEXTS_AFTER_NAME = (".aux.xml", ".xml", ".tfw", ".wld", ".hdr", ".prj")
_TEXTS_AFTER_STEM = (
    ".xml", ".wld", ".tfw", ".tifw", ".tiffw", ".jgw", ".jpgw", ".jpegw", ".j2w", ".jp2w", ".pgw",
    ".pngw", ".gfw", ".gifw", ".bpw", ".bmpw", ".wbw", ".webpw", ".blw", ".tab", ".prj", ".hdr",
    ".clr", ".stx", ".sta", ".imd", ".rpb", ".rpc", ".til", ".pvl", ".met", ".dim", ".txt",
    "_rpc.txt", "_metadata.txt", "_metadata.xml", "_mtl.txt", ".pass", ".eph", ".att", ".geo",
)  # fmt: skip


def check_references(path: Path) -> None:
    """Checks a file and all that GDAL would open because of it.

    Args:
        path: A plain local file, from `gdal_env.local_file`.

    Raises:
        ImageError: The file is XML but no VRT, or JSON; or something that it leads to is missing,
            no regular file, outside its folder, of another format, too large or nested too deeply.
    """
    start = _start(path)
    if start.startswith(b"{"):
        raise ImageError(f"{path} is JSON, not an image; give the image file itself")
    if start.startswith(b"<") and not _is_recipe(start):
        raise ImageError(f"{path} is XML or HTML, not an image; give the image file itself")
    _Walk(path).visit(path, start, 0)


def check_overviews(path: Path, names: list[str]) -> None:
    """Checks what GDAL says that an open file's metadata names as its overviews.

    Args:
        path: The file.
        names: From `gdal_env.overviews_of`.

    Raises:
        ImageError: As `check_references`.
    """
    _Walk(path).check_overviews(path, Found([], names), 0)


class _Walk:
    """One image's files, each looked at once."""

    def __init__(self, image: Path) -> None:
        self._image = image
        # An image that is a link may have its parts beside the link or beside what it leads to.
        self._folders = {os.path.realpath(image.parent), os.path.dirname(os.path.realpath(image))}
        self._listings: dict[str, dict[str, str] | None] = {}
        #: Reads that a window of a file takes; None while the file is being looked at.
        self._reads: dict[Path, int | None] = {}

    def visit(self, file: Path, start: bytes, depth: int) -> int:
        """Checks one file whose beginning is known; the reads that a window of it takes."""
        known = self._reads.get(file, 0)
        if depth > MAX_DEPTH or known is None:
            raise ImageError(
                f"{file} is a file inside {depth} others, or inside itself; flatten it with "
                "gdal_translate"
            )
        if known:
            return known
        self._reads[file] = None
        self._check_sidecars(file, depth)
        reads = 1
        try:
            if _is_recipe(start):
                reads = self._visit_recipe(file, depth)
            elif is_tiff(start):
                check_tiff_tiles(file)
                for text in gdal_metadata(file):
                    self.check_overviews(file, scan(text, recipe=False), depth)
            elif start.startswith(_JPEG_2000):
                check_jpeg2000_tiles(file)
            if (
                depth > 0
                and not (_is_recipe(start) or is_tiff(start))
                and not start.startswith(_WITHOUT_METADATA)
            ):
                self.check_overviews(file, Found([], named_overviews(file)), depth)
        except XmlRefusedError as error:
            raise ImageError(f"{file} {error}") from None
        self._reads[file] = reads
        return reads

    def _visit_recipe(self, vrt: Path, depth: int) -> int:
        if vrt.stat().st_size > MAX_BYTES:
            raise XmlRefusedError(f"is a VRT of more than {MAX_BYTES >> 20} MiB; build it in parts")
        found = scan(vrt.read_bytes(), recipe=True)
        self.check_overviews(vrt, found, depth)
        total, nested = 0, False
        for name, relative in found.files:
            source = self._named(vrt, name, relative, "is a VRT that names")
            reads = self._visit_named(vrt, source, depth)
            total, nested = total + reads, nested or reads > 1
        if nested and total > MAX_READS:
            raise ImageError(
                f"{self._image} leads to {total} sources through VRTs inside VRTs, more than "
                f"{MAX_READS}; build one VRT of the images themselves"
            )
        return max(total, 1)

    def check_overviews(self, file: Path, found: Found, depth: int) -> None:
        """Checks files named as overviews, which must be TIFFs."""
        for name in found.overviews:
            base = ":::base:::"
            relative = name.lower().startswith(base)
            source = self._named(
                file,
                name[len(base) :] if relative else name,
                relative,
                "has metadata that names as overviews",
            )
            if not is_tiff(_start(source)):
                raise ImageError(
                    f"{file} names {source} as overviews, which is not a TIFF; remove it"
                )
            self._visit_named(file, source, depth)

    def _visit_named(self, parent: Path, source: Path, depth: int) -> int:
        if self._reads.get(source):
            return self._reads[source] or 1
        start = _start(source)
        if not _is_allowed(start):
            _refuse_known(parent, source, start)
        return self.visit(source, start, depth + 1)

    def _named(self, file: Path, name: str, relative: bool, how: str) -> Path:
        """The file that a text names, known to be a regular one in the image's folder."""
        source = Path(os.path.abspath(file.parent / name if relative else name))
        local = "\0" not in name and "://" not in name and "/vsi" not in name
        if not local or name.startswith(("<", "{")) or not source.is_file():
            raise ImageError(
                f"{file} {how} {name[:120]!r}, which is not a local file; it may only name files "
                "that exist in its own folder or below it"
            )
        self._check_place(file, source, f"{how} {name[:120]!r}")
        return source

    def _check_place(self, file: Path, source: Path, how: str) -> None:
        real = os.path.realpath(source)
        if not any(os.path.commonpath((real, folder)) == folder for folder in self._folders):
            raise ImageError(
                f"{file} {how}, which is outside the image's folder; put the images into the "
                "folder of the file that you open, or below it"
            )
        if not os.access(real, os.R_OK):
            raise ImageError(f"{source} may not be read by this user; check its permissions")

    def _check_sidecars(self, file: Path, depth: int) -> None:
        names = [(file.name + end, True) for end in _IMAGES_AFTER_NAME]
        names += [(file.stem + end, True) for end in _IMAGES_AFTER_STEM]
        names += [(file.name + end, False) for end in _TEXTS_AFTER_NAME]
        names += [(file.stem + end, False) for end in _TEXTS_AFTER_STEM]
        names.append(("metadata.dim", False))
        listing = self._listing(file.parent)
        for name, image in dict.fromkeys(names):
            there = name if listing is None else listing.get(name.lower())
            if there is None or there == file.name:
                continue
            sidecar = file.parent / there
            if os.path.lexists(sidecar):
                self._check_sidecar(file, sidecar, image, depth)

    def _check_sidecar(self, file: Path, sidecar: Path, image: bool, depth: int) -> None:
        try:
            status = sidecar.stat()
        except OSError:  # a link that leads nowhere is not a sidecar
            return
        if stat.S_ISDIR(status.st_mode):
            return
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(
                f"{file} has {sidecar.name} beside it, which is not a regular file; remove it"
            )
        self._check_place(file, sidecar, f"has the sidecar {sidecar.name}")
        if self._reads.get(sidecar, 0) is not None and sidecar != self._image:
            self._check_content(file, sidecar, image, depth)

    def _check_content(self, file: Path, sidecar: Path, image: bool, depth: int) -> None:
        start, name = _start(sidecar), sidecar.name.lower()
        if name.endswith((".ovr", ".msk")) and not is_tiff(start):
            raise ImageError(
                f"{file} has the sidecar {sidecar.name}, which is not a TIFF; remove it"
            )
        if image:
            if is_tiff(start) or start.startswith(b"EHFA_HEADER_TAG"):
                self.visit(sidecar, start, depth + 1)
            return
        if _is_allowed(start) and not name.endswith(".aux.xml"):
            return  # an image of its own that shares the name
        size = sidecar.stat().st_size
        if size > MAX_SIDECAR_BYTES:
            raise ImageError(
                f"{file} has the sidecar {sidecar.name} of {size >> 20} MiB, more than "
                f"{MAX_SIDECAR_BYTES >> 20}; remove it"
            )
        if name.endswith(".aux.xml"):
            self.check_overviews(file, scan(sidecar.read_bytes(), recipe=False), depth)

    def _listing(self, folder: Path) -> dict[str, str] | None:
        """Names in a folder by their lower case; None where it may not be listed."""
        key = str(folder)
        if key not in self._listings:
            try:
                self._listings[key] = {name.lower(): name for name in os.listdir(folder)}
            except OSError:
                self._listings[key] = None
        return self._listings[key]


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}); check the path") from None


def _is_allowed(start: bytes) -> bool:
    return _is_recipe(start) or is_tiff(start) or start.startswith(_STARTS)


def _is_recipe(start: bytes) -> bool:
    """Whether GDAL takes a file for a VRT: wherever the tag stands, and before any other format."""
    return b"<VRTDataset" in start


def _refuse_known(parent: Path, source: Path, start: bytes) -> None:
    """Refuses a file that a driver would take that is not allowed; others GDAL tries to open."""
    if start.startswith((b"<", b"{", b"CDF", b"\x89HDF", b"SQLite", b"PK")):
        raise ImageError(
            f"{parent} names {source}, which is XML or HTML, or of a format that is not allowed; "
            "convert it with gdal_translate"
        )
