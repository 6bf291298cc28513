"""From pixels to places: polygons and ground resolution of a georeferenced image.

Coordinates are (x, y) in the image's CRS and (longitude, latitude) in degrees in WGS 84. Uses
rasterio's transforms; call inside `gdal_env.environment()`. What has no place in WGS 84 gives
None, never an exception: an answer without coordinates is better than none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.warp import transform as transform_points

from lrs_edge.pyramid.box import Box
from lrs_edge.raster.footprint import (
    Point,
    Polygons,
    Ring,
    bends,
    ground_degrees,
    holds,
    is_straight,
    joined,
    outline,
    polygons,
    single_ring,
    twice_area,
    unrolled,
    wrapped,
)

#: Pieces each edge of a window is cut into at first; more where it bends.
EDGE_PIECES = 8
#: An edge is a curve where it leaves its chord by more than this share of the longest edge.
STRAIGHT = 1e-3
#: Rounds of halving, and points of an outline, after which it is given up.
_MOST_ROUNDS = 48
_MOST_POINTS = 4000
#: Pixels by which an outline keeps clear of a pole that lies on it.
_POLE_CLEARANCE = 1e-3

_EARTH_RADIUS_M = 6371008.8
#: Coordinates beyond this are nowhere on the earth. PROJ turns longitudes back one by one, for
#: ever where they are large enough.
_FARTHEST_M = 1e8
#: A place must lead back to its point this closely. Datum shifts may differ on the way back by
#: metres; places of points outside of the projection's domain are off by whole continents.
_RETURN_M = 1000.0

#: Names of grid files inside a CRS; `@null` and `null` are none.
_GRID_FILES = re.compile(
    r"(?:nadgrids|geoidgrids|grids)=(?!@?null\b)|PARAMETERFILE\s*\[", re.IGNORECASE
)


@dataclass(frozen=True)
class Place:
    """Where a pixel window lies.

    Attributes:
        polygon: The window as a closed ring in the image's CRS, counter-clockwise there.
        polygon_wgs84: As one closed ring of (longitude, latitude); None without such a place.
        geometry_wgs84: The same as polygons (each its exterior ring, then holes), cut at the
            antimeridian and closed at the poles; None without such a place.
        centre_wgs84: Longitude and latitude of the window's centre; None without such a place.
    """

    polygon: Ring
    polygon_wgs84: Ring | None
    geometry_wgs84: Polygons | None
    centre_wgs84: Point | None


@dataclass(frozen=True)
class Georeference:
    """CRS of an image and the affine transform from its pixels.

    Attributes:
        crs: Coordinate reference system.
        affine: (a, b, c, d, e, f): x = a col + b row + c, y = d col + e row + f, with col and row
            counted in pixels from the outer corner of the image.
    """

    crs: CRS
    affine: tuple[float, float, float, float, float, float]

    def name(self) -> str:
        """`EPSG:n` where the CRS has a code, else its WKT."""
        try:
            code = self.crs.to_epsg()
        except (RasterioError, CPLE_BaseError, ValueError):
            code = None
        return f"EPSG:{code}" if code else str(self.crs.to_wkt())

    def short_name(self) -> str:
        """`EPSG:n` where the CRS has a code, else the name in its WKT, if that says anything."""
        name = self.name()
        quoted = re.search(r'"([^"]*)"', name)
        short = " ".join((quoted.group(1) if quoted else name).split())[:80]
        return "its CRS" if short.lower() in ("", "unknown", "unnamed") else short

    def place(self, bounds: Box) -> Place | None:
        """Where a pixel window lies.

        A window of which any part has no place in WGS 84 has no polygon there.

        Args:
            bounds: x0, y0, x1, y1 in pixels of the image.

        Returns:
            None where even the coordinates in the CRS are not numbers.
        """
        ring = self.ring(bounds)
        if ring is None:
            return None
        x0, y0, x1, y1 = bounds
        centre = self._wgs84([((x0 + x1) / 2, (y0 + y1) / 2)])
        middle = None if centre is None else (wrapped(centre[0][0]), centre[0][1])
        # What lies around no centre is not worth its outline.
        found = None if centre is None else self._outline(bounds)
        if found is None:
            return Place(ring, None, None, middle)
        return Place(ring, *found, middle)

    def ring(self, bounds: Box) -> Ring | None:
        """A pixel window as a closed ring in the CRS, counter-clockwise there.

        Args:
            bounds: x0, y0, x1, y1 in pixels of the image.

        Returns:
            None where its coordinates are not numbers.
        """
        x0, y0, x1, y1 = bounds
        # The transform from pixels is affine, so edges in the CRS are straight.
        native = self._native(((x0, y0), (x0, y1), (x1, y1), (x1, y0), (x0, y0)))
        if not all(math.isfinite(value) for point in native for value in point):
            return None
        return tuple(native if twice_area(native) >= 0 else native[::-1])

    def located(self, points: Sequence[Point]) -> int:
        """How many of some points (col, row) have a place in WGS 84."""
        if self._wgs84(points) is not None:
            return len(points)
        return sum(self._wgs84([point]) is not None for point in points)

    def gsd(self, width: int, height: int) -> float | None:
        """Metres on the ground that a pixel in the image's centre measures, or None.

        Taken in WGS 84, since units of a CRS need not be metres on the ground (Web Mercator is
        off by the cosine of the latitude).
        """
        x, y = width / 2, height / 2
        points = self._wgs84([(x, y), (x + 1, y), (x, y + 1)])
        if points is None:
            return None
        here, *others = (_unit_vector(point) for point in points)
        sides = [2 * math.asin(min(math.dist(here, other) / 2, 1)) for other in others]
        metres = math.sqrt(sides[0] * sides[1]) * _EARTH_RADIUS_M
        return metres if math.isfinite(metres) and metres > 0 else None

    def _outline(self, bounds: Box) -> tuple[Ring, Polygons] | None:
        """The outline of a window in WGS 84 as one ring and as valid polygons, or None."""
        if bounds[0] >= bounds[2] or bounds[1] >= bounds[3]:
            return None
        (x0, y0, x1, y1), north, south = self._clear_of_poles(bounds)
        corners = [(x0, y0), (x0, y1), (x1, y1), (x1, y0), (x0, y0)]
        pixels = [
            _between(start, end, piece / EDGE_PIECES)
            for start, end in pairwise(corners)
            for piece in range(EDGE_PIECES + 1)
        ]
        inside = [
            _between((x0, y0), (x1, y1), 0.5),
            *((x0 + (x1 - x0) * s, y0 + (y1 - y0) * t) for s in (0.2, 0.8) for t in (0.2, 0.8)),
        ]
        # All points at once: most of the time of a transform is spent before its first point.
        places = self._wgs84([*pixels, *inside])
        if places is None:
            return None
        count = EDGE_PIECES + 1
        edges = [places[side * count : (side + 1) * count] for side in range(4)]
        # A bend is judged by the size of the whole window, in degrees on the ground.
        size = max(sum(ground_degrees(a, b) for a, b in pairwise(unrolled(e))) for e in edges)
        curves = []
        for side, edge in enumerate(edges):
            steps = pixels[side * count : (side + 1) * count]
            curve = self._curve(steps, edge, STRAIGHT * size)
            if curve is None:
                return None
            curves.append(curve)
        ring = joined(curves)
        area = outline(ring, north=north, south=south)
        # A last check of the geometry: what lies inside the window lies inside its outline.
        if area is None or not holds(area, places[4 * count :]):
            return None
        parts = polygons(area)
        return single_ring(parts, ring), parts

    def _curve(
        self, pixels: list[Point], places: list[Point], tolerance: float
    ) -> list[Point] | None:
        """An edge with as many points as its curve needs.

        Args:
            pixels: Points along the edge as (col, row).
            places: The same in WGS 84.
            tolerance: Degrees on the ground that make a curve.

        Returns:
            Its points, unrolled; only the ends where it is straight. None where a point between
            has no place, or there is no end to its bends.
        """
        curve = unrolled(places)
        if is_straight(curve, tolerance):
            return [curve[0], curve[-1]]
        nodes = list(zip(pixels, places, strict=True))
        unsettled = set(range(len(nodes) - 1))
        for _ in range(_MOST_ROUNDS):
            if not unsettled or len(nodes) > _MOST_POINTS:
                break
            order = sorted(unsettled)
            middles = [_between(nodes[step][0], nodes[step + 1][0], 0.5) for step in order]
            found = self._wgs84(middles)
            if found is None:
                return None
            added = dict(zip(order, zip(middles, found, strict=True), strict=True))
            grown, unsettled = [], set()
            for step, node in enumerate(nodes):
                grown.append(node)
                if step not in added:
                    continue
                a, middle, b = (place for _, place in (node, added[step], nodes[step + 1]))
                if bends(unrolled([a, middle, b]), tolerance / 4):
                    unsettled |= {len(grown) - 1, len(grown)}
                    grown.append(added[step])
            nodes = grown
        if unsettled:
            return None
        curve = unrolled([place for _, place in nodes])
        return [curve[0], curve[-1]] if is_straight(curve, tolerance) else curve

    def _clear_of_poles(self, bounds: Box) -> tuple[Box, bool, bool]:
        """A window that no pole touches, and whether the north and the south pole lie inside.

        At a pole itself the longitude jumps, so an edge that meets one is moved inwards by a
        thousandth of a pixel.
        """
        x0, y0, x1, y1 = bounds
        inside = []
        for pole in self._poles:
            if pole is None or not (
                x0 - _POLE_CLEARANCE < pole[0] < x1 + _POLE_CLEARANCE
                and y0 - _POLE_CLEARANCE < pole[1] < y1 + _POLE_CLEARANCE
            ):
                inside.append(False)
                continue
            x, y = pole
            near = [abs(x - x0), abs(x - x1), abs(y - y0), abs(y - y1)]
            inside.append(min(near) >= _POLE_CLEARANCE)
            if near[0] < _POLE_CLEARANCE:
                x0 = x + _POLE_CLEARANCE
            elif near[1] < _POLE_CLEARANCE:
                x1 = x - _POLE_CLEARANCE
            elif near[2] < _POLE_CLEARANCE:
                y0 = y + _POLE_CLEARANCE
            elif near[3] < _POLE_CLEARANCE:
                y1 = y - _POLE_CLEARANCE
        return (x0, y0, x1, y1), inside[0], inside[1]

    @cached_property
    def _poles(self) -> tuple[Point | None, Point | None]:
        """The north and the south pole as (col, row), where the CRS shows them as points."""
        a, b, c, d, e, f = self.affine
        scale = a * e - b * d
        found: list[Point | None] = []
        for latitude in (90.0, -90.0):
            seen = self._from_wgs84([(lon, latitude) for lon in (-170.0, -60.0, 10.0, 130.0)])
            points = [
                ((e * (x - c) - b * (y - f)) / scale, (a * (y - f) - d * (x - c)) / scale)
                for x, y in seen or []
            ]
            one = points and all(math.dist(points[0], point) < 1e-3 for point in points)
            found.append(points[0] if one and math.isfinite(sum(points[0])) else None)
        return found[0], found[1]

    @cached_property
    def _unit(self) -> float:
        """Metres that one unit of the CRS measures, on the equator for degrees."""
        try:
            factor = float(self.crs.units_factor[1])
        except (RasterioError, CPLE_BaseError, ValueError, TypeError):
            factor = 0.0
        if not (math.isfinite(factor) and factor > 0):
            factor = math.radians(1) if self.crs.is_geographic else 1.0
        return factor * _EARTH_RADIUS_M if self.crs.is_geographic else factor

    @cached_property
    def _usable(self) -> bool:
        """Whether the CRS is one of the earth's surface, and reads no files."""
        if not (self.crs.is_geographic or self.crs.is_projected):
            return False
        return _GRID_FILES.search(str(self.crs.to_wkt())) is None

    @cached_property
    def _goes_round(self) -> bool:
        """Whether x repeats itself after one turn: meridians are parallel lines (cylindrical)."""
        if self.crs.is_geographic:
            return True
        longitudes = (-100.0, 20.0, 140.0)
        seen = self._from_wgs84([(lon, lat) for lat in (10.0, 50.0) for lon in longitudes])
        if seen is None:
            return False
        return all(abs(seen[i][0] - seen[i + 3][0]) * self._unit < 1 for i in range(3))

    def _native(self, pixels: Sequence[Point]) -> list[Point]:
        a, b, c, d, e, f = self.affine
        return [(a * col + b * row + c, d * col + e * row + f) for col, row in pixels]

    def _wgs84(self, pixels: Sequence[Point]) -> list[Point] | None:
        """Places of points (col, row); None where one of them has none."""
        if not self._usable:
            return None
        native = self._native(pixels)
        if self.crs.is_geographic:
            native = self._within_latitudes(native)
        limit = _FARTHEST_M / self._unit
        # Also false for NaN.
        if not all(abs(x) <= limit and abs(y) <= limit for x, y in native):
            return None
        places = _transformed(self.crs, None, native)
        if places is None or not all(abs(y) <= 90.0001 for _, y in places):
            return None
        places = [(x, min(max(y, -90.0), 90.0)) for x, y in places]
        return places if self._lead_back(native, places) else None

    def _within_latitudes(self, native: list[Point]) -> list[Point]:
        """Latitudes without the half pixel beyond the poles that grids of cell centres have."""
        pole = math.pi / 2 * _EARTH_RADIUS_M / self._unit
        pixel = abs(self.affine[3]) + abs(self.affine[4])
        return [
            (x, math.copysign(pole, y) if pole < abs(y) <= pole + pixel else y) for x, y in native
        ]

    def _lead_back(self, native: list[Point], places: list[Point]) -> bool:
        """Whether places lead back to their points, which those outside a projection do not."""
        if self.crs.is_geographic:
            return True
        back = self._from_wgs84(places)
        if back is None:
            return False
        a, b, _, d, e, _ = self.affine
        limit = max(_RETURN_M / self._unit, math.hypot(a, d), math.hypot(b, e))
        return all(
            abs(y - v) <= limit and (self._goes_round or abs(x - u) <= limit)
            for (x, y), (u, v) in zip(native, back, strict=True)
        )

    def _from_wgs84(self, places: Sequence[Point]) -> list[Point] | None:
        return _transformed(None, self.crs, places)


def _transformed(
    source: CRS | None, target: CRS | None, points: Sequence[Point]
) -> list[Point] | None:
    """Points from one CRS to another, None for WGS 84; None where one of them has no image."""
    try:
        # Without a database of its own version, PROJ knows not even this code.
        wgs84 = CRS.from_epsg(4326)
        xs, ys = transform_points(
            source or wgs84, target or wgs84, *([p[i] for p in points] for i in (0, 1))
        )[:2]
    except (RasterioError, CPLE_BaseError, ValueError, RuntimeError):
        return None
    found = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
    return found if all(math.isfinite(x) and math.isfinite(y) for x, y in found) else None


def _between(start: Point, end: Point, share: float) -> Point:
    return start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share


def _unit_vector(place: Point) -> tuple[float, float, float]:
    lon, lat = math.radians(place[0]), math.radians(place[1])
    return math.cos(lat) * math.cos(lon), math.cos(lat) * math.sin(lon), math.sin(lat)
