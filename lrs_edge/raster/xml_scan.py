"""Reads XML that GDAL will read (VRTs, `.aux.xml`, metadata inside a TIFF) for what it names.

The text is parsed as a stream, so that a small file of deeply nested elements costs no memory, and
strictly: what this parser and GDAL's lenient one could understand differently is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from xml.etree import ElementTree

#: Most bytes of XML that GDAL is given; it needs about ten times as much memory.
MAX_BYTES = 16 << 20
MAX_ELEMENTS = 500_000
MAX_NESTING = 32

#: Ends of the names of elements whose text GDAL opens.
_OPENED = ("filename", "dataset", "datasource", "cutlineds", "sourcefile", "dempath")
#: The root of a VRT ends like them.
_ROOT = "vrtdataset"
#: A literal section inside such an element: this parser joins it to the text, GDAL does not.
_SECTION = re.compile(rb"(?i)<[^<>]*(?:" + "|".join(_OPENED).encode() + rb")[^<>]*>[^<]*<!\[")
#: Parts of a VRT that name files in ways of their own, or read any file as numbers.
_CLOSED = {
    "group": "multidimensional arrays",
    "arraysource": "multidimensional arrays",
    "processingsteps": "processing steps",
    "geoloctransformer": "geolocation arrays",
    "pixelfunctioncode": "code of its own",
}
_RAW = ("vrtrawrasterband", "vrtprocesseddataset")
#: Options for a source's driver that change no path.
_OPEN_OPTIONS = {"overview_level", "num_threads", "georef_sources", "sparse_ok"}


class XmlRefusedError(ValueError):
    """The XML is refused; the message ends a sentence that begins with the file's name."""


@dataclass
class Found:
    """What a piece of XML names.

    Attributes:
        files: (text, relative to the file that holds the XML) of every file that GDAL would open.
        overviews: Files named by metadata as holding overviews.
    """

    files: list[tuple[str, bool]] = field(default_factory=list)
    overviews: list[str] = field(default_factory=list)


def scan(text: bytes, *, recipe: bool) -> Found:
    """Reads a whole document.

    Args:
        text: The XML.
        recipe: Whether it is a VRT; otherwise it is metadata, which only overviews can be named in.

    Raises:
        XmlRefusedError: It is too large, not well-formed, or says what is refused.
    """
    if len(text) > MAX_BYTES:
        raise XmlRefusedError(f"has more than {MAX_BYTES >> 20} MiB of XML; build it in parts")
    # Entities could hide a name, or grow without bound; no writer of these files uses them.
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise XmlRefusedError("has XML with a document type, which is refused; remove it")
    if recipe and b"<![" in text and _SECTION.search(text):
        raise XmlRefusedError("writes a file name as a literal section, which is refused")
    target = _Target(recipe)
    # GDAL takes the bytes as UTF-8, whatever the declaration says.
    parser = ElementTree.XMLParser(target=target, encoding="utf-8")  # noqa: S314 (no entities)
    try:
        # In pieces: the parser calls back for each, and stops at the first refusal.
        for start in range(0, len(text), 1 << 16):
            parser.feed(text[start : start + (1 << 16)])
        parser.close()
    except XmlRefusedError:
        raise
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise XmlRefusedError(f"has XML that is not well-formed ({error})") from None
    return target.found


class _Target:
    """Called by the parser for every part of a document."""

    def __init__(self, recipe: bool) -> None:
        self.found = Found()
        self._recipe = recipe
        self._count = 0
        #: Lower-case names and attributes of the open elements, and the text of the innermost.
        self._open: list[tuple[str, dict[str, str]]] = []
        self._text: list[str] = []
        self._interrupted = False

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        name = tag.rpartition("}")[2].lower()
        self._count += 1
        if self._count > MAX_ELEMENTS:
            raise XmlRefusedError(f"has more than {MAX_ELEMENTS} XML elements; build it in parts")
        if len(self._open) >= MAX_NESTING:
            raise XmlRefusedError(f"has XML nested deeper than {MAX_NESTING} elements")
        given = {key.rpartition("}")[2].lower(): value for key, value in attributes.items()}
        if len(given) != len(attributes):
            raise XmlRefusedError(f"has an attribute of <{tag}> twice")
        parent = self._open[-1][0] if self._open else ""
        if self._recipe and _opens(parent):
            raise XmlRefusedError(f"has <{tag}> inside a file name, which is refused")
        # GDAL takes an element for an attribute of that name.
        if parent in ("mdi", "item") and name in ("key", "name"):
            raise XmlRefusedError(f"has <{tag}> inside <{parent}>, which is refused")
        if self._recipe:
            _check_recipe_element(name, given)
        self._open.append((name, given))
        self._text, self._interrupted = [], False

    def end(self, tag: str) -> None:  # noqa: ARG002 (the parser has matched it)
        name, given = self._open.pop()
        text = "".join(self._text)
        if self._recipe:
            self._end_recipe(name, given, text)
        self._end_metadata(name, given, text)
        self._text, self._interrupted = [], False

    def _end_recipe(self, name: str, given: dict[str, str], text: str) -> None:
        if name == "pixelfunctionlanguage" and text.strip().lower() == "python":
            raise XmlRefusedError("is a VRT that runs Python, which is refused; convert it")
        if not _opens(name) or not text.strip():
            return
        relative = given.get("relativetovrt", "0")
        # Comments and sections cut a text in pieces, of which GDAL takes the first.
        if relative not in ("0", "1") or text != text.strip() or self._interrupted:
            raise XmlRefusedError(f"writes the file name {text.strip()[:80]!r} in a way of its own")
        self.found.files.append((text, relative == "1"))

    def _end_metadata(self, name: str, given: dict[str, str], text: str) -> None:
        key = given.get("key", given.get("name", "")).strip().lower()
        # In whichever domain: GDAL knows several ways to write that.
        if name in ("mdi", "item") and key == "overview_file" and text.strip():
            self.found.overviews.append(text.strip())

    def data(self, text: str) -> None:
        self._text.append(text)

    def comment(self, text: str) -> None:  # noqa: ARG002 (comments say nothing to GDAL)
        self._interrupted = True

    def pi(self, target: str, data: str | None = None) -> None:  # noqa: ARG002 (as comments)
        self._interrupted = True

    def close(self) -> None:
        """Called at the end of the document."""


def _opens(name: str) -> bool:
    return name.endswith(_OPENED) and name != _ROOT


def _check_recipe_element(name: str, given: dict[str, str]) -> None:
    """Refuses an element of a VRT that leads to more than local rasters."""
    if name == "subclass":
        raise XmlRefusedError("is a VRT with an element <subClass>, which is refused")
    if name in _CLOSED:
        raise XmlRefusedError(f"is a VRT with {_CLOSED[name]}, which is refused; convert it")
    if given.get("subclass", "").strip().lower() in _RAW:
        raise XmlRefusedError(
            "is a VRT of raw bands or processing steps, which is refused; convert it"
        )
    if name == "ooi" and given.get("key", "").lower() not in _OPEN_OPTIONS:
        raise XmlRefusedError(
            f"gives the open option {given.get('key', '')[:40]!r}, which is refused"
        )
    for attribute in given:
        # GDAL takes an attribute for an element of that name.
        if (
            _opens(attribute)
            or attribute in _CLOSED
            or attribute in ("pixelfunctionlanguage", "ooi")
        ):
            raise XmlRefusedError(f"names a file in the attribute {attribute!r}, which is refused")
