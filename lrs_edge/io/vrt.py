"""Refuses files made of XML that would have GDAL open something else than local rasters.

A VRT is a recipe: it may name any GDAL source, among them URLs, services described in XML, and
Python code. GDAL's own switches cover a part of that (see `gdal_env.py`), so a VRT is read here
first, and so are the VRTs that it names.
"""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

from lrs_edge.errors import ImageError

MAX_BYTES = 32 << 20
MAX_DEPTH = 8
#: Ends of the names of elements whose text GDAL opens.
_OPENED = ("filename", "dataset", "datasource", "cutlineds", "sourcefile", "relativefilename")


def check_recipe(path: Path, depth: int = 0) -> None:
    """Reads the start of a file, and all of it if it is a VRT.

    Raises:
        ImageError: The file is XML but no VRT; or a VRT that is not well-formed, too large, nested
            too deeply, runs Python, or names anything but existing local files.
    """
    with path.open("rb") as file:
        start = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"{"):
        raise ImageError(f"{path} is JSON, not an image; give the image file itself")
    if not start.startswith(b"<"):
        return
    if b"<VRTDataset" not in start:
        raise ImageError(f"{path} is XML or HTML, not an image; give the image file itself")
    if depth >= MAX_DEPTH:
        raise ImageError(f"{path} is a VRT inside {depth} others; flatten it with gdal_translate")
    for name in _sources(path):
        check_recipe(name, depth + 1)


def _sources(path: Path) -> list[Path]:
    """Files that a VRT names, each known to be a plain local file."""
    if path.stat().st_size > MAX_BYTES:
        raise ImageError(f"{path} is a VRT of more than {MAX_BYTES >> 20} MiB; build it in parts")
    text = path.read_bytes()
    # Entities could hide a name, or grow without bound; no VRT writer uses them.
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise ImageError(f"{path} is a VRT with a document type, which is refused; remove it")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314 (no entities: checked above)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ImageError(f"{path} is a VRT that is not well-formed XML ({error})") from None
    found: dict[Path, None] = {}
    for element in root.iter():
        name, value = element.tag.lower(), (element.text or "").strip()
        if name == "pixelfunctionlanguage" and value.lower() == "python":
            raise ImageError(f"{path} is a VRT that runs Python, which is refused; convert it")
        if name.endswith(_OPENED) and len(element) == 0 and value:
            found[_local(path, value, element.get("relativeToVRT", "0") == "1")] = None
    return list(found)


def _local(vrt: Path, name: str, relative: bool) -> Path:
    source = Path(os.path.abspath(vrt.parent / name if relative else name))
    if "://" in name or "/vsi" in name or name.startswith("<") or not source.is_file():
        raise ImageError(
            f"{vrt} is a VRT that names {name[:120]!r}, which is no local file; "
            "a VRT may only name files that exist on this machine"
        )
    return source
