"""An answer as a GeoPackage (OGC 12-128r19, version 1.3): layers in the image's own CRS.

Written with the standard library's SQLite. `regions` are the tiles looked at, `tokens` the kept
ones, `objects` what the detector found, `answer` is one row without geometry.
"""

from __future__ import annotations

import math
import sqlite3
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrs_edge.answer.answer import Answer, Ring
from lrs_edge.answer.report import ImageFacts
from lrs_edge.errors import UsageError
from lrs_edge.reports.views import evidence_of

if TYPE_CHECKING:
    from lrs_edge.raster.raster import Raster

#: "GPKG", and version 1.3.0.
_APPLICATION_ID = 0x47504B47
_USER_VERSION = 10300

#: Ids from here on are free for systems without a code.
_OWN_SRS = 100_000

_TABLES = """
CREATE TABLE gpkg_spatial_ref_sys (
  srs_name TEXT NOT NULL, srs_id INTEGER NOT NULL PRIMARY KEY, organization TEXT NOT NULL,
  organization_coordsys_id INTEGER NOT NULL, definition TEXT NOT NULL, description TEXT);
CREATE TABLE gpkg_contents (
  table_name TEXT NOT NULL PRIMARY KEY, data_type TEXT NOT NULL, identifier TEXT UNIQUE,
  description TEXT DEFAULT '',
  last_change DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ','now')),
  min_x DOUBLE, min_y DOUBLE, max_x DOUBLE, max_y DOUBLE, srs_id INTEGER,
  CONSTRAINT fk_gc_r_srs_id FOREIGN KEY (srs_id) REFERENCES gpkg_spatial_ref_sys(srs_id));
CREATE TABLE gpkg_geometry_columns (
  table_name TEXT NOT NULL, column_name TEXT NOT NULL, geometry_type_name TEXT NOT NULL,
  srs_id INTEGER NOT NULL, z TINYINT NOT NULL, m TINYINT NOT NULL,
  CONSTRAINT pk_geom_cols PRIMARY KEY (table_name, column_name),
  CONSTRAINT uk_gc_table_name UNIQUE (table_name),
  CONSTRAINT fk_gc_tn FOREIGN KEY (table_name) REFERENCES gpkg_contents(table_name),
  CONSTRAINT fk_gc_srs FOREIGN KEY (srs_id) REFERENCES gpkg_spatial_ref_sys(srs_id));
"""

#: Columns of the layers besides `fid` and `geom`, in the order of their rows.
_LAYERS = {
    "regions": "level INTEGER, tile_row INTEGER, tile_col INTEGER, score REAL, kept BOOLEAN, "
    "tokens_kept INTEGER, evidence INTEGER",
    "tokens": "level INTEGER, rank INTEGER, score REAL",
    "objects": "label TEXT, score REAL, doubtful BOOLEAN",
}
_DESCRIPTIONS = {
    "regions": "Tiles looked at; evidence numbers the best of the finest level",
    "tokens": "Vision tokens kept, the best of their level first",
    "objects": "Objects that the detector found",
}

#: Name, organization, its code and the definition of the two systems that every file has.
_UNDEFINED = (
    ("Undefined Cartesian SRS", -1, "NONE", -1, "undefined"),
    ("Undefined geographic SRS", 0, "NONE", 0, "undefined"),
)


def to_geopackage(answer: Answer, facts: ImageFacts, raster: Raster) -> bytes:
    """The bytes of a GeoPackage.

    Raises:
        UsageError: The image has no CRS.
    """
    if facts.crs is None:
        raise UsageError(f"there is no GeoPackage of {facts.path}: it is not georeferenced")
    code, definition, wgs84 = _definitions(facts.crs, Path(raster.info.path))
    if hasattr(sqlite3.Connection, "serialize"):
        with closing(sqlite3.connect(":memory:")) as database:
            _fill(database, answer, facts, raster, code, definition, wgs84)
            return database.serialize()
    # Python 3.10 writes databases to files only.
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "report.gpkg"
        with closing(sqlite3.connect(place)) as database:
            _fill(database, answer, facts, raster, code, definition, wgs84)
        return place.read_bytes()


def _definitions(crs: str, path: Path) -> tuple[int | None, str, str]:
    """The EPSG code, if there is one, the WKT of a CRS, and that of WGS 84."""
    from rasterio.crs import CRS

    from lrs_edge.raster.gdal_env import environment

    code = int(crs[5:]) if crs.startswith("EPSG:") else None
    with environment(path, "located"):
        return code, str(CRS.from_string(crs).to_wkt()), str(CRS.from_epsg(4326).to_wkt())


def _fill(
    database: sqlite3.Connection,
    answer: Answer,
    facts: ImageFacts,
    raster: Raster,
    code: int | None,
    definition: str,
    wgs84: str,
) -> None:
    database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    database.execute(f"PRAGMA user_version = {_USER_VERSION}")
    database.executescript(_TABLES)
    own = _OWN_SRS if code is None else code
    systems = {row[1]: row for row in (*_UNDEFINED, ("WGS 84 geodetic", 4326, "EPSG", 4326, wgs84))}
    systems.setdefault(
        own, (facts.crs[:80] if facts.crs else "", own, "EPSG" if code else "NONE", own, definition)
    )
    database.executemany(
        "INSERT INTO gpkg_spatial_ref_sys VALUES (?, ?, ?, ?, ?, NULL)", systems.values()
    )
    rows = {
        "regions": _regions(answer),
        "tokens": _tokens(answer, raster),
        "objects": _objects(answer, raster),
    }
    for layer, columns in _LAYERS.items():
        _add_layer(database, layer, columns, own, rows[layer])
    _add_answer(database, answer, facts)
    database.commit()


def _add_layer(
    database: sqlite3.Connection,
    layer: str,
    columns: str,
    srs: int,
    rows: Iterable[tuple[Ring, tuple[Any, ...]]],
) -> None:
    database.execute(
        f"CREATE TABLE {layer} (fid INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, geom POLYGON, "
        f"{columns})"
    )
    places = ", ".join("?" * (len(columns.split(",")) + 1))
    # Names of layers are those above.
    insert = f"INSERT INTO {layer} VALUES (NULL, {places})"  # noqa: S608
    boxes: list[list[float]] = []
    for ring, values in rows:
        boxes.append(_extent(ring))
        database.execute(insert, (_geometry(ring, boxes[-1], srs), *values))
    corners: list[float | None] = [None] * 4
    if boxes:
        left, bottom, right, top = zip(*boxes, strict=True)
        corners = [min(left), min(bottom), max(right), max(top)]
    database.execute(
        "INSERT INTO gpkg_contents (table_name, data_type, identifier, description, min_x, min_y, "
        "max_x, max_y, srs_id) VALUES (?, 'features', ?, ?, ?, ?, ?, ?, ?)",
        (layer, layer, _DESCRIPTIONS[layer], *corners, srs),
    )
    database.execute(
        "INSERT INTO gpkg_geometry_columns VALUES (?, 'geom', 'POLYGON', ?, 0, 0)", (layer, srs)
    )


def _extent(ring: Ring) -> list[float]:
    """Least x and y, greatest x and y."""
    xs, ys = zip(*ring, strict=True)
    return [min(xs), min(ys), max(xs), max(ys)]


def _geometry(ring: Ring, box: list[float], srs: int) -> bytes:
    """GeoPackage's header, little-endian and with an envelope, before a polygon's WKB."""
    header = struct.pack("<2sBBi4d", b"GP", 0, 0b0000_0011, srs, box[0], box[2], box[1], box[3])
    points = b"".join(struct.pack("<2d", *point) for point in ring)
    return header + struct.pack("<BIII", 1, 3, 1, len(ring)) + points


def _has_area(ring: Ring | None) -> bool:
    """False for tiles in the padding of their level, and where coordinates are not numbers."""
    if ring is None or not all(math.isfinite(value) for point in ring for value in point):
        return False
    return len(set(ring)) > 3


def _regions(answer: Answer) -> Iterator[tuple[Ring, tuple[Any, ...]]]:
    """Coarse levels first, so that a map draws the finer ones over them."""
    numbers = {id(region): place for place, region in enumerate(evidence_of(answer), 1)}
    for region in reversed(answer.regions):
        if region.polygon is not None and _has_area(region.polygon):
            yield (
                region.polygon,
                (
                    region.level,
                    region.row,
                    region.col,
                    region.score,
                    region.kept,
                    region.tokens_kept,
                    numbers.get(id(region)),
                ),
            )


def _tokens(answer: Answer, raster: Raster) -> Iterator[tuple[Ring, tuple[Any, ...]]]:
    for level in answer.kept:
        for rank, (bounds, score) in enumerate(zip(level.bounds, level.scores, strict=True), 1):
            ring = raster.native_ring(bounds)
            if ring is not None and _has_area(ring):
                yield ring, (level.level, rank, score)


def _objects(answer: Answer, raster: Raster) -> Iterator[tuple[Ring, tuple[Any, ...]]]:
    for found in answer.objects:
        ring = raster.native_ring(found.bbox)
        if ring is not None and _has_area(ring):
            yield ring, (found.label, found.score, found.doubtful)


def _add_answer(database: sqlite3.Connection, answer: Answer, facts: ImageFacts) -> None:
    values = {
        "question": _text(answer.question),
        "answer": _text(answer.text),
        "confidence": answer.confidence,
        "finish_reason": answer.finish_reason,
        "search_end": answer.search_end,
        "model": _text(answer.model),
        "image": _text(facts.path),
        "warnings": _text("\n".join(answer.warnings)),
    }
    columns = ", ".join(f"{name} {'REAL' if name == 'confidence' else 'TEXT'}" for name in values)
    database.execute(f"CREATE TABLE answer (fid INTEGER PRIMARY KEY AUTOINCREMENT, {columns})")
    places = ", ".join("?" * len(values))
    insert = f"INSERT INTO answer VALUES (NULL, {places})"  # noqa: S608
    database.execute(insert, tuple(values.values()))
    database.execute(
        "INSERT INTO gpkg_contents (table_name, data_type, identifier, description) "
        "VALUES ('answer', 'attributes', 'answer', 'Question and answer')"
    )


def _text(text: str) -> str:
    """Text that UTF-8 can hold: names of files may have bytes that are none."""
    return text.encode(errors="replace").decode()
