"""Outlines on the globe: from a ring of longitudes and latitudes to valid GeoJSON polygons.

Pure geometry in degrees, points are (longitude, latitude). The result keeps RFC 7946: longitudes
within -180..180, cut at the antimeridian (section 3.1.9), exterior rings counter-clockwise, and an
area around a pole closed along latitude 90 or -90. Shapely (GEOS) clips, merges and validates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

Point = tuple[float, float]
Ring = tuple[Point, ...]
#: Rings of each polygon, the exterior one first: the coordinates of a GeoJSON MultiPolygon.
Polygons = tuple[tuple[Ring, ...], ...]

#: Degrees to which outlines are rounded, about a millimetre.
GRID = 1e-8
#: Degrees of longitude between neighbouring points of a curve, at most.
LONGEST_STEP = 30.0


def wrapped(longitude: float) -> float:
    """The same longitude within -180..180; 180 stays 180."""
    if -180 <= longitude <= 180:
        return longitude
    return (longitude + 180) % 360 - 180


def turn(start: float, stop: float) -> float:
    """Degrees from one longitude to another the short way round, -180 (excluded) to 180."""
    return -((start - stop + 180) % 360 - 180)


def unrolled(ring: Sequence[Point]) -> list[Point]:
    """The ring with longitudes that follow each other without jumps, beyond 180 where need be.

    Args:
        ring: Points that are less than 180 degrees of longitude apart.
    """
    longitude = ring[0][0]
    points = [ring[0]]
    for (before, _), (after, latitude) in pairwise(ring):
        longitude += turn(before, after)
        points.append((longitude, latitude))
    return points


def outline(ring: Sequence[Point], *, north: bool, south: bool) -> BaseGeometry | None:
    """The area inside a ring on the globe.

    Args:
        ring: Closed and unrolled: the last point is the first, up to whole turns of longitude.
        north: Whether the north pole lies inside.
        south: Whether the south pole does.

    Returns:
        A valid Polygon or MultiPolygon within -180..180 and -90..90; None where the ring and the
        poles contradict each other, or nothing is left.
    """
    from shapely.geometry import Polygon, box

    # Far below the grid, and no number too small for GEOS to divide by.
    ring = [(round(x, 10), round(y, 10)) for x, y in ring]
    turns = round((ring[-1][0] - ring[0][0]) / 360)
    if abs(turns) != int(north != south):
        return None
    if turns:
        ring = _closed_at_pole(ring, 90.0 if north else -90.0)
    area = _on_the_map(Polygon(ring))
    if area is not None and north and south:
        # Both poles inside: the ring goes around what is left out.
        area = box(-180, -90, 180, 90).difference(area)
    return None if area is None or area.is_empty else area


def _closed_at_pole(ring: Sequence[Point], pole: float) -> list[Point]:
    """A ring once around a pole, led along the pole's latitude instead of around it.

    It starts and ends at the point next to the pole, so that the way there crosses nothing.
    """
    full_turn = ring[-1][0] - ring[0][0]
    points = list(ring[:-1])
    first = max(range(len(points)), key=lambda place: points[place][1] * math.copysign(1, pole))
    points = points[first:] + [(x + full_turn, y) for x, y in points[: first + 1]]
    return [*points, (points[-1][0], pole), (points[0][0], pole)]


def _on_the_map(area: BaseGeometry) -> BaseGeometry | None:
    """An area of the unrolled plane folded into -180..180, and cut off at the poles."""
    import shapely
    from shapely.affinity import translate
    from shapely.geometry import box

    if not area.is_valid:
        area = shapely.make_valid(area)
    if area.is_empty:
        return None
    west, _, east, _ = area.bounds
    pieces = []
    for world in range(math.floor((west + 180) / 360), math.ceil((east + 180) / 360)):
        part = area.intersection(box(360 * world - 180, -90, 360 * world + 180, 90))
        pieces.append(translate(part, xoff=-360.0 * world))
    # Pieces that meet, as the two halves of a 0..360 grid do, become one.
    whole = shapely.union_all(pieces)
    rounded = shapely.set_precision(whole, GRID)
    # Points on straight lines go, such as those where pieces met.
    return _areas_only((whole if rounded.is_empty else rounded).simplify(GRID / 10))


def _areas_only(geometry: BaseGeometry) -> BaseGeometry:
    """Without the lines and points that cutting can leave."""
    from shapely.geometry import MultiPolygon, Polygon

    if isinstance(geometry, Polygon | MultiPolygon):
        return geometry
    parts = [part for part in getattr(geometry, "geoms", ()) if isinstance(part, Polygon)]
    return MultiPolygon(parts)


def holds(area: BaseGeometry, places: Iterable[Point]) -> bool:
    """Whether all places lie within an area on the globe, or on its boundary."""
    from shapely.geometry import Point as ShapelyPoint

    return all(area.distance(ShapelyPoint(wrapped(x), y)) <= 10 * GRID for x, y in places)


def polygons(area: BaseGeometry) -> Polygons:
    """Coordinates of an area, exterior rings counter-clockwise and holes clockwise.

    Args:
        area: A Polygon or MultiPolygon.
    """
    from shapely.geometry.polygon import orient

    parts = [orient(part) for part in getattr(area, "geoms", (area,))]
    parts.sort(key=lambda part: -part.bounds[0])
    return tuple(
        (_ring(part.exterior.coords), *(_ring(hole.coords) for hole in part.interiors))
        for part in parts
    )


def _ring(points: Iterable[Sequence[float]]) -> Ring:
    # Rounding to the grid leaves the last bits of a float.
    return tuple((round(float(x), 8) + 0.0, round(float(y), 8) + 0.0) for x, y, *_ in points)


def single_ring(parts: Polygons, ring: Sequence[Point]) -> Ring:
    """One closed ring for readers that know no more than that, counter-clockwise.

    Args:
        parts: The area, from `polygons`.
        ring: The outline that it came from, unrolled.

    Returns:
        The exterior of a single polygon without holes; else the outline uncut, whose longitude
        steps from 180 to -180 at the antimeridian.
    """
    if len(parts) == 1 and len(parts[0]) == 1:
        return parts[0][0]
    ordered = ring if twice_area(ring) >= 0 else ring[::-1]
    return _ring((wrapped(x), y) for x, y in (*ordered[:-1], ordered[0]))


def twice_area(ring: Sequence[Point]) -> float:
    """Twice the signed area of a closed ring in a plane; positive when counter-clockwise."""
    # Relative to the first point, so that large coordinates do not drown a small area.
    x0, y0 = ring[0]
    return sum(
        (ax - x0) * (by - y0) - (bx - x0) * (ay - y0) for (ax, ay), (bx, by) in pairwise(ring)
    )


def ground_degrees(a: Point, b: Point) -> float:
    """Length of a short step, longitudes shortened by the latitude."""
    return math.hypot((b[0] - a[0]) * math.cos(math.radians((a[1] + b[1]) / 2)), b[1] - a[1])


def _off_chord(point: Point, start: Point, end: Point) -> float:
    """Degrees on the ground between a point and the straight line between two others."""
    shorter = math.cos(math.radians(point[1]))
    px, py = (point[0] - start[0]) * shorter, point[1] - start[1]
    ex, ey = (end[0] - start[0]) * shorter, end[1] - start[1]
    length = ex * ex + ey * ey
    share = min(max((px * ex + py * ey) / length, 0), 1) if length else 0
    return math.hypot(px - share * ex, py - share * ey)


def _long_step(a: Point, b: Point) -> bool:
    """Whether a step is too wide to be judged by the point in its middle."""
    return abs(b[0] - a[0]) > LONGEST_STEP and a[1] != b[1]


def bends(points: Sequence[Point], tolerance: float) -> bool:
    """Whether a curve needs a point between two of its points, given all three, unrolled."""
    a, middle, b = points
    return _long_step(a, b) or _off_chord(middle, a, b) > tolerance


def is_straight(curve: Sequence[Point], tolerance: float) -> bool:
    """Whether the points between the ends hardly leave the line from end to end."""
    if any(_long_step(a, b) for a, b in pairwise(curve)):
        return False
    return all(_off_chord(point, curve[0], curve[-1]) <= tolerance for point in curve[1:-1])


def joined(edges: list[list[Point]]) -> list[Point]:
    """Edges as one ring, each shifted by whole turns to where the one before ends."""
    ring = [edges[0][0]]
    for edge in edges:
        shift = ring[-1][0] + turn(ring[-1][0], edge[0][0]) - edge[0][0]
        ring += [(x + shift, y) for x, y in edge[1:]]
    return ring
