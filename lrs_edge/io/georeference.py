"""From pixels to places: polygons and ground resolution of a georeferenced image.

Coordinates are (x, y) in the image's CRS and (longitude, latitude) in degrees in WGS 84. Uses
rasterio's transforms; call inside `gdal_env.environment()`. A transform that fails gives None,
never an exception: an answer without coordinates is better than none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.warp import transform as transform_points

Ring = tuple[tuple[float, float], ...]

#: Pieces each edge of a window is cut into where it is a curve in WGS 84.
EDGE_PIECES = 8
#: An edge is a curve when it leaves its chord by more than this share of the longest edge.
STRAIGHT = 1e-3
_EARTH_RADIUS_M = 6371008.8


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

    def polygon(self, bounds: tuple[float, float, float, float]) -> tuple[Ring, Ring] | None:
        """Closed rings around a pixel window, in the CRS and in WGS 84.

        Args:
            bounds: x0, y0, x1, y1 in pixels of the image.

        Returns:
            The rings, counter-clockwise in WGS 84 as GeoJSON wants; None where a point has no
            place in WGS 84. Windows across the antimeridian are not cut.
        """
        x0, y0, x1, y1 = bounds
        corners = ((x0, y0), (x0, y1), (x1, y1), (x1, y0), (x0, y0))
        pixels = [corners[0]]
        for (ax, ay), (bx, by) in pairwise(corners):
            for piece in range(1, EDGE_PIECES + 1):
                share = piece / EDGE_PIECES
                pixels.append((ax + (bx - ax) * share, ay + (by - ay) * share))
        wgs84 = self._wgs84(tuple(self._place(x, y) for x, y in pixels))
        if wgs84 is None:
            return None
        # The transform from pixels is affine, so edges in the CRS are straight.
        native = tuple(self._place(x, y) for x, y in corners[:-1])
        native, wgs84 = (*native, native[0]), (*wgs84[:-1], wgs84[0])
        if _is_straight(wgs84):
            wgs84 = wgs84[::EDGE_PIECES]
        return (native, wgs84) if _area(wgs84) >= 0 else (native[::-1], wgs84[::-1])

    def gsd(self, width: int, height: int) -> float | None:
        """Metres on the ground that a pixel in the image's centre measures, or None.

        Taken in WGS 84, since units of a CRS need not be metres on the ground (Web Mercator is
        off by the cosine of the latitude).
        """
        x, y = width / 2, height / 2
        points = self._wgs84(tuple(self._place(*p) for p in ((x, y), (x + 1, y), (x, y + 1))))
        if points is None:
            return None
        (lon, lat), *others = points
        sides = []
        for other_lon, other_lat in others:
            turn = (other_lon - lon + 180) % 360 - 180
            east = math.radians(turn) * math.cos(math.radians(lat))
            sides.append(math.hypot(east, math.radians(other_lat - lat)) * _EARTH_RADIUS_M)
        metres = math.sqrt(sides[0] * sides[1])
        return metres if math.isfinite(metres) and metres > 0 else None

    def _place(self, col: float, row: float) -> tuple[float, float]:
        a, b, c, d, e, f = self.affine
        return a * col + b * row + c, d * col + e * row + f

    def _wgs84(self, ring: Ring) -> Ring | None:
        try:
            lons, lats = transform_points(
                self.crs, CRS.from_epsg(4326), [p[0] for p in ring], [p[1] for p in ring]
            )[:2]
        except (RasterioError, CPLE_BaseError, ValueError, RuntimeError):
            return None
        points = tuple((float(x), float(y)) for x, y in zip(lons, lats, strict=True))
        if not all(math.isfinite(x) and -90.0001 <= y <= 90.0001 for x, y in points):
            return None
        return points


def _area(ring: Ring) -> float:
    """Twice the signed area of a closed ring; positive when counter-clockwise."""
    return sum(ax * by - bx * ay for (ax, ay), (bx, by) in pairwise(ring))


def _is_straight(ring: Ring) -> bool:
    """Whether the points between the corners hardly leave the lines from corner to corner."""
    corners = ring[::EDGE_PIECES]
    size = max(math.dist(a, b) for a, b in pairwise(corners))
    for edge, (start, stop) in enumerate(pairwise(corners)):
        for piece in range(1, EDGE_PIECES):
            share = piece / EDGE_PIECES
            x, y = ring[edge * EDGE_PIECES + piece]
            on_line = (
                start[0] + (stop[0] - start[0]) * share,
                start[1] + (stop[1] - start[1]) * share,
            )
            if math.dist((x, y), on_line) > STRAIGHT * size:
                return False
    return True
